"""Jobs as rows of a Ray Data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.app.batch.begin import use_threads
from hasten.app.batch.failures import one_line
from hasten.app.batch.jobs import KEYS, Job, Rules
from hasten.app.batch.painter import Painter
from hasten.app.batch.work import Made, failed, painted

OUTPUTS = ("id", "status", "image", "sha256", "seconds", "score", "plan_hash", "error")
"""Columns that are added."""


class RayPainter:
    """Draws the jobs of a Ray Data set: a class for `Dataset.map_batches`.

        import ray
        from hasten.app.batch import RayPainter

        jobs = ray.data.read_json("jobs.jsonl", lines=True)
        drawn = jobs.map_batches(RayPainter, fn_constructor_kwargs={"model": "shapes"}, batch_size=8, concurrency=1, num_cpus=1)
        drawn.write_parquet("pictures")

    Columns are the keys of a job (`prompt` is needed, see `hasten.app.batch.jobs.KEYS`), or one column `job` that holds whole jobs as JSON;
    then there is a column `row` too, with rows of a manifest as JSON.
    All columns stay, and these are added: id, status ("done" or "failed"), image (bytes of a PNG), sha256 (of its pixels), seconds, score,
    plan_hash, error. Jobs of a batch that cannot be drawn together are drawn one group after another; a batch that fails is drawn again in
    parts, so that one bad job harms no other.

    Args:
        model, dtype, device, score: As for `hasten.app.batch.painter.Painter`.
        defaults: What holds where a row says nothing.
        threads: Of torch; 0 leaves them as they are.

    Raises:
        BadInput: The model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "shapes",
        dtype: str = "auto",
        device: str = "auto",
        score: str | None = "auto",
        defaults: Mapping[str, Any] | None = None,
        threads: int = 0,
    ) -> None:
        use_threads(threads)
        self._painter = Painter(model, dtype, device, score=score)
        self._rules = Rules(self._painter.model.choice.shipped, self._painter.call_arguments)
        self._defaults = dict(defaults or {})

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Draws a batch: columns in, columns out."""
        import numpy as np

        rows = _rows(batch)
        made: list[Made | None] = [None] * len(rows)
        groups: dict[str, list[tuple[int, Job]]] = {}
        for i, row in enumerate(rows):
            try:
                job = Job.from_row(row, self._defaults, f"row {i + 1}", number=i, rules=self._rules)
                groups.setdefault(job.key(), []).append((i, job))
            except ValueError as why:
                name = row.get("id")
                made[i] = failed(Job(name if isinstance(name, str) else "", str(row.get("prompt"))), one_line(why))
        for group in groups.values():
            for (i, _), one in zip(group, self._drawn([job for _, job in group]), strict=True):
                made[i] = one
        drawn = [one for one in made if one is not None]
        images = [one.encoded() for one in drawn]  # puts the hash into the row
        columns: dict[str, Any] = {}
        for name in OUTPUTS:
            values = images if name == "image" else [one.row[name] for one in drawn]
            columns[name] = np.empty(len(values), dtype=object)
            columns[name][:] = values
        if "job" in batch:
            columns["row"] = np.array([json.dumps(one.row) for one in drawn], dtype=object)
        return {**batch, **columns}

    def _drawn(self, jobs: Sequence[Job]) -> list[Made]:
        """What came of jobs of one key; halves of what does not fit into memory, and single jobs of what fails."""
        outcome = painted(self._painter, jobs, lambda: False, lambda done, total: None)
        if isinstance(outcome, list):
            return outcome
        if len(jobs) == 1:
            return [failed(jobs[0], outcome.error)]
        size = (len(jobs) + 1) // 2 if outcome.memory else 1
        return [one for start in range(0, len(jobs), size) for one in self._drawn(jobs[start : start + size])]


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of plain data from columns; what is None or NaN says nothing."""
    if "job" in batch:
        return [json.loads(text) for text in batch["job"]]
    names = [name for name in batch if name in KEYS]
    count = len(next(iter(batch.values())))
    return [{name: value for name in names if (value := _plain(batch[name][i])) is not None} for i in range(count)]


def _plain(value: Any) -> Any:
    """A cell as JSON has it: whole numbers that pandas made fractions of, for lack of a whole "nothing", are whole again."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return value
