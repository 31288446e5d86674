"""The manifest: one row for each job, merged from the rows of the batches."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hasten.app.batch.folder import FAILED, Folder
from hasten.app.batch.jobs import Job
from hasten.app.batch.locks import MANIFEST
from hasten.app.errors import BadInput

FORMATS = ("jsonl", "parquet")
COLUMNS = {
    "id": "string",
    "status": "string",
    "path": "string",
    "sha256": "string",
    "seconds": "float64",
    "score": "float64",
    "plan_hash": "string",
    "error": "string",
    "prompt": "string",
    "seed": "int64",
    "width": "int32",
    "height": "int32",
    "batch": "int32",
    "attempt": "int32",
    "warnings": "strings",
}
"""In their order, with their types in Parquet."""


def check_format(format_: str) -> None:
    """Refuses a format that there is not.

    Raises:
        BadInput: So it is, or pyarrow is missing.
    """
    if format_ not in FORMATS:
        raise BadInput(f"--manifest must be {' or '.join(FORMATS)}, not {format_!r}")
    if format_ == "parquet" and find_spec("pyarrow") is None:
        raise BadInput('--manifest parquet needs pyarrow: pip install "hasten[batch]"')


def collect(folder: Folder, batches: Sequence[tuple[Job, ...]], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Rows of all jobs that are done or have failed, in the order of the list."""
    found: dict[str, dict[str, Any]] = {}
    for batch, members in enumerate(batches):
        rows = folder.rows(batch)
        found |= {job.id: rows[job.id] for job in members if job.id in rows}
    return [{column: found[job.id].get(column) for column in COLUMNS} for job in jobs if job.id in found]


def merge(folder: Folder, batches: Sequence[tuple[Job, ...]], jobs: Sequence[Job], format_: str) -> list[dict[str, Any]]:
    """Writes the manifest as far as the work is, and returns its rows."""
    folder.locks.take(MANIFEST)
    try:
        rows = collect(folder, batches, jobs)
        folder.write_manifest(f"manifest.{format_}", _parquet(rows) if format_ == "parquet" else _lines(rows))
        for other in FORMATS:
            if other != format_:
                (folder.out / f"manifest.{other}").unlink(missing_ok=True)  # it would be out of date
        return rows
    finally:
        folder.locks.release(MANIFEST)


def failures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of jobs that failed."""
    return [row for row in rows if row["status"] == FAILED]


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    # Some readers take these three for ends of lines; within JSON they may be escaped.
    return "".join(line.translate({ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}) + "\n" for line in lines).encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    pa: Any = import_module("pyarrow")
    pq: Any = import_module("pyarrow.parquet")
    types = {"string": pa.string(), "strings": pa.list_(pa.string()), "float64": pa.float64(), "int64": pa.int64(), "int32": pa.int32()}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()
