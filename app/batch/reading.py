"""Reads job lists: JSON lines, CSV, or either from stdin. Every bad line is found before anything runs."""

from __future__ import annotations

import csv
import inspect
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hasten.app.batch.jobs import KEYS, TEXTS, Job, Rules
from hasten.app.errors import BadInput
from hasten.app.models import Choice
from hasten.app.rewards import closest

LINE_LIMIT = 1_000_000
"""Bytes of a line of JSON."""
SAMPLE_PROMPT = "a small red circle"
"""A prompt that every reward can judge: defaults are tried with it."""


@dataclass
class JobList:
    """What a file of jobs holds.

    Attributes:
        jobs: The good ones, in their order.
        errors: One line for each bad line of the file, with its number.
    """

    jobs: list[Job] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def read_jobs(source: str, defaults: Mapping[str, Any], rules: Rules) -> JobList:
    """The jobs of a file, or of stdin where it is "-".

    Files whose names end in .csv or .tsv are CSV with a line of column names; others hold one JSON object a line. On stdin the first
    letter tells: JSON begins with a brace.

    Raises:
        BadInput: The file cannot be read, has no job at all, or the defaults are not allowed.
    """
    check_defaults(defaults, rules)
    data = _bytes_of(source)
    if source == "-":
        table = not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        delimiter = ","
    else:
        suffix = Path(source).suffix.lower()
        table, delimiter = suffix in (".csv", ".tsv"), "\t" if suffix == ".tsv" else ","
    found, lines = JobList(), dict[str, int]()
    rows = _csv_rows(data, delimiter, rules) if table else _json_rows(data)
    number = 0
    for line, row in rows:
        if isinstance(row, str):
            found.errors.append(f"line {line}: {row}")
        else:
            try:
                job = Job.from_row(row, defaults, f"line {line}", number=number, rules=rules)
                first = lines.setdefault(job.id.casefold(), line)  # some file systems do not tell A from a
                if first != line:
                    raise BadInput(f"line {line}: id {job.id!r} is that of line {first} too; every job needs a name of its own")
                found.jobs.append(job)
            except BadInput as why:
                found.errors.append(str(why))
        number += 1
    if not number:
        raise BadInput(f"JOBS must hold at least one job, one a line; {'stdin' if source == '-' else source} is empty")
    return found


def check_defaults(defaults: Mapping[str, Any], rules: Rules) -> None:
    """Refuses defaults once, so that they are not reported for every line.

    Raises:
        BadInput: They are not allowed.
    """
    if defaults.get("id") is not None:
        raise BadInput("defaults: id cannot have a default: every job needs a name of its own")
    Job.from_row({"prompt": SAMPLE_PROMPT}, defaults, "defaults", rules=rules)


def read_defaults(path: Path) -> dict[str, Any]:
    """Defaults from a YAML file (JSON is YAML too): the keys of a row.

    Raises:
        BadInput: It cannot be read, or is no mapping; or PyYAML is missing.
    """
    if find_spec("yaml") is None:
        raise BadInput('--defaults needs PyYAML: pip install "hasten[batch]"')
    yaml: Any = import_module("yaml")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInput(f"--defaults must be a YAML file, not {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"--defaults must be YAML; {path} is not: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise BadInput(f"--defaults must hold keys with values, such as `steps: 20`; {path} holds something else")
    return read


def call_arguments(choice: Choice) -> list[str] | None:
    """Names of the further arguments that the model's call takes, without its weights; None where its class is not one of diffusers'."""
    import diffusers

    from hasten.app.batch.painter import job_arguments

    if choice.folder is None:
        return None
    try:
        name = json.loads((choice.folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is said when it is loaded
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return job_arguments(inspect.signature(kind.__call__).parameters) if isinstance(kind, type) else None


def _bytes_of(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"JOBS must be a file of jobs (JSON lines or CSV), or - for stdin, not {source}: {reason}") from None


def _json_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number with the object, or with what is wrong."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        if len(line) > LINE_LIMIT:
            yield number, f"a line must have at most {LINE_LIMIT:,} bytes, not {len(line):,}"
            continue
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
        except UnicodeDecodeError:
            yield number, "it must be UTF-8 text"
        except _Repeated as key:
            yield number, f"key {key} is given twice"
        except RecursionError:
            yield number, "it is nested too deeply"
        except ValueError as error:
            what = getattr(error, "msg", None) or str(error)
            yield number, f'it must be a JSON object such as {{"prompt": "a red circle"}}: {" ".join(what.split())[:120]}'
        else:
            yield (
                number,
                row if isinstance(row, dict) else f'it must be a JSON object such as {{"prompt": "a red circle"}}, not {_kind(row)}',
            )


class _Repeated(Exception):
    """A key stands in an object twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(repr(key[:40]))
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _csv_rows(data: bytes, delimiter: str, rules: Rules) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of a record's first line with its cells by column, or with what is wrong."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield data[: error.start].count(b"\n") + 1, "it must be UTF-8 text"
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"it is no CSV: {error}"
            return  # nobody knows where the next record begins
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            wrong = _wrong_columns(header, rules)
            if wrong is not None:
                yield line, wrong
                return
        elif len(cells) != len(header):
            yield line, f"it has {len(cells)} cells, but there are {len(header)} columns"
        else:
            yield line, _cells(header, cells)


def _wrong_columns(header: list[str], rules: Rules) -> str | None:
    """What is wrong with the names of the columns."""
    allowed = [*KEYS, *sorted(rules.arguments or ())]
    for name in header:
        if header.count(name) > 1:
            return f"column {name!r} is there twice"
        # Where the arguments of the call are not known yet, the row's own check says more.
        if name not in allowed and rules.arguments is not None:
            return f"unknown column {name[:60]!r}{closest(name, allowed)}; allowed are {', '.join(allowed)}"
    return None


def _cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    """Words stay words; other cells are read as JSON where they are some. Empty cells say nothing."""
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.strip():
            continue
        row[name] = cell
        if name not in TEXTS:
            with suppress(ValueError, RecursionError, _Repeated):  # else it is a word, and refused where it must be none
                row[name] = json.loads(cell, parse_constant=_no_constant, object_pairs_hook=_object)
    return row
