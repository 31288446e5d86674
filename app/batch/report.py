"""The contact sheet: one HTML file beside the pictures, with filters, that asks nothing of any network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from hasten.app.batch.folder import BatchPlan
from hasten.app.batch.jobs import Job
from hasten.app.batch.report_template import TEMPLATE


def report_page(rows: Sequence[dict[str, Any]], jobs: Sequence[Job], plan: BatchPlan) -> str:
    """The page. Pictures are named relative to it, so the folder can be moved as a whole.

    Args:
        rows: Of the manifest.
        jobs: The whole list; those without a row are shown as waiting.
        plan: Of the folder.
    """
    known = {row["id"]: row for row in rows}
    entries = [_entry(job, known.get(job.id)) for job in jobs]
    head = {"jobs": len(jobs), "model": plan.model, "dtype": plan.dtype, "device": plan.device, "batch": plan.batch_size}
    # Prompts are anybody's text: no "<" of theirs may end the script that holds them, and the page only ever sets text.
    data = json.dumps({"head": head, "rows": entries}, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.replace("{{DATA}}", data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _entry(job: Job, row: dict[str, Any] | None) -> dict[str, Any]:
    """What is shown of a job."""
    entry = {"id": job.id, "prompt": job.prompt, "seed": job.seed, "status": "waiting", "settings": _settings(job)}
    if row is not None:
        entry |= {name: row[name] for name in ("status", "score", "seconds", "plan_hash", "error", "width", "height", "sha256")}
        entry["src"] = quote(row["path"]) if row["path"] else None
    return entry


def _settings(job: Job) -> str:
    """What the job says beside prompt, seed and id."""
    row = {name: value for name, value in job.to_row().items() if name not in ("id", "prompt", "seed")}
    return ", ".join(f"{name} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}" for name, value in row.items())
