"""`hasten batch --engine ray`: the actors of a Ray cluster draw, this process writes.

Actors return PNGs, so they need no file system in common with the output folder; batches are the plan's, and what this process does not
get to write is drawn again by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hasten.app.batch.begin import Wanted, begun, settled
from hasten.app.batch.folder import BatchPlan, Folder, batches_of
from hasten.app.batch.jobs import Job
from hasten.app.batch.progress import BatchBar
from hasten.app.batch.stopping import Stopper
from hasten.app.batch.work import Ledger
from hasten.app.errors import BadInput

MOST_ACTORS = 64


def check_ray() -> None:
    """Refuses to go on without Ray.

    Raises:
        BadInput: It is not installed.
    """
    if find_spec("ray") is None:
        raise BadInput('--engine ray needs Ray: pip install "hasten[ray]"')


def measure(wanted: dict[str, Any], rows: Sequence[dict[str, Any]], shipped: bool) -> dict[str, Any]:
    """On an actor's machine: the plan of the folder, with the batch size that fits there."""
    from hasten.app.batch.jobs import Rules

    asked = Wanted(**wanted)
    jobs = [Job.from_row(row, rules=Rules(shipped)) for row in rows]
    return asdict(settled(asked, asked.painter(), jobs, 1, 1, lambda text: None))


def draw_with_ray(folder: Folder, wanted: Wanted, jobs: Sequence[Job], retry_failed: bool, stopper: Stopper, bar: BatchBar) -> BatchPlan:
    """Draws what is not done on the cluster that RAY_ADDRESS names, else on one that is started here.

    Raises:
        BadInput: The folder belongs to another list of jobs.
        WriteError: The folder cannot be written.
    """
    ray: Any = import_module("ray")

    from hasten.app.models import choose_model

    began_here = not ray.is_initialized()
    if began_here:
        bar.say("starting Ray")
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if wanted.device in ("auto", "cuda") else 0
        each = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        shipped = choose_model(wanted.model).shipped

        def make() -> BatchPlan:
            bar.say("measuring")
            remote = ray.remote(measure).options(**each)
            return BatchPlan(**ray.get(remote.remote(asdict(wanted), [job.to_row() for job in jobs], shipped)))

        plan = begun(folder, wanted, jobs, make)
        batches = batches_of(jobs, plan.batch_size)
        folder.sweep(len(batches))
        ledger = Ledger(folder, batches, retry_failed)
        for rows in ledger.news():
            bar.batch(rows)
        todo = [batch for batch in range(len(batches)) if batch not in ledger.complete and folder.take(batch)]
        todo = [batch for batch in todo if ledger.look(batch) is None]
        if todo:
            bar.begin()
            actors = max(1, min(gpus or int(resources.get("CPU", 1)), len(todo), MOST_ACTORS))
            stopper.patient = True
            _draw(folder, wanted, plan, ledger, todo, stopper, bar, actors, each)
        return plan
    finally:
        if began_here:
            ray.shutdown()


def _draw(
    folder: Folder,
    wanted: Wanted,
    plan: BatchPlan,
    ledger: Ledger,
    todo: Sequence[int],
    stopper: Stopper,
    bar: BatchBar,
    actors: int,
    each: dict[str, int],
) -> None:
    pa: Any = import_module("pyarrow")
    data: Any = import_module("ray.data")

    from hasten.app.batch.ray_painter import RayPainter

    data.DataContext.get_current().enable_progress_bars = False
    # A block for each batch, and blocks as they are: what is drawn together is what the plan says.
    tables = [
        pa.table({"batch": [batch] * len(part), "job": [json.dumps(job.to_row()) for job in part]})
        for batch in todo
        if (part := ledger.batches[batch])
    ]
    drawn = data.from_arrow(tables).map_batches(
        RayPainter,
        fn_constructor_kwargs={
            "model": plan.model, "dtype": plan.dtype, "device": plan.device, "score": wanted.score, "threads": plan.threads,
        },
        batch_size=None,
        concurrency=actors,
        **each,
    )  # fmt: skip
    for block in drawn.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        columns = {name: block.column(name).to_pylist() for name in block.column_names}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for batch in dict.fromkeys(columns["batch"]):
            _written(folder, ledger, batch, {row["id"]: row for row in rows if row["batch"] == batch}, bar)
        if stopper.asked():
            return


def _written(folder: Folder, ledger: Ledger, batch: int, drawn: dict[str, dict[str, Any]], bar: BatchBar) -> None:
    """Writes what came back of a batch."""
    tried = ledger.attempts(batch)
    before = ledger.standing(batch)
    rows, pictures = [], {}
    for job in ledger.batches[batch]:
        if job.id in before:
            rows.append(before[job.id])
            continue
        rows.append(json.loads(drawn[job.id]["row"]) | {"batch": batch, "attempt": tried.get(job.id, 0) + 1})
        if drawn[job.id]["image"] is not None:
            pictures[job.id] = drawn[job.id]["image"]
    folder.save(batch, pictures, rows)
    folder.release(batch)
    ledger.complete.add(batch)
    bar.batch(rows)
