"""Job files: JSON lines and CSV, whole or broken, and what is said of every bad line."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.app.batch.jobs import Rules
from hasten.app.batch.reading import JobList, call_arguments, read_defaults, read_jobs
from hasten.app.errors import BadInput
from hasten.app.models import choose_model

RULES = Rules(arguments=("eta",))


def read(path: Path, data: bytes, defaults: dict[str, Any] | None = None) -> JobList:
    path.write_bytes(data)
    return read_jobs(str(path), defaults or {}, RULES)


def test_every_bad_line_is_reported_with_its_number(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt": "a", "id": "one"}',
        b"",
        b"{",
        b"[1]",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "guidance": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "id": "ONE"}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "a", "steps": -1}\r',
        b'{"prompt": "last", "id": "two"}',
    ]
    found = read(tmp_path / "jobs.jsonl", b"\n".join(lines))
    assert [job.id for job in found.jobs] == ["one", "two"]
    said = [
        "line 3: it must be a JSON object",
        'line 4: it must be a JSON object such as {"prompt": "a red circle"}, not a list',
        "line 5: key 'prompt' is given twice",
        'line 6: it must be a JSON object such as {"prompt": "a red circle"}: NaN is no JSON',
        "line 7: it must be UTF-8 text",
        "line 8: id 'ONE' is that of line 1 too",
        "line 9: it is nested too deeply",
        "line 10: ",
        "line 11: steps must be a whole number from 1 to 10000, not -1",
    ]
    assert len(found.errors) == len(said)
    for error, beginning in zip(found.errors, said, strict=True):
        assert error.startswith(beginning) and "\n" not in error


def test_seeds_of_lines_do_not_move_when_a_bad_line_is_left_out(tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", b'{"prompt": "a"}\nbad\n{"prompt": "b"}\n', {"seed": 10})
    assert [job.seed for job in found.jobs] == [10, 12]
    assert [job.id[:7] for job in found.jobs] == ["000001-", "000003-"]


def test_csv_says_the_same_as_json(tmp_path: Path) -> None:
    table = (
        "id,prompt,seed,steps,guidance,negative_prompt,eta,method,cached\n"
        'x,"a ""red"", circle",7,4,2.5,123,0.5,,\n'
        "y,a\nblue\n"
        '"z","two\nlines",,,,,,delta-dit,0.5\n'
    )
    found = read(tmp_path / "jobs.csv", table.encode())
    assert found.errors == ["line 3: it has 2 cells, but there are 9 columns", "line 4: it has 1 cells, but there are 9 columns"]
    rows = (
        b'{"id": "x", "prompt": "a \\"red\\", circle", "seed": 7, "steps": 4, "guidance": 2.5, "negative_prompt": "123", "eta": 0.5}\n\n\n'
    )
    rows += b'{"id": "z", "prompt": "two\\nlines", "method": "delta-dit", "cached": "0.5", "seed": 3}'
    assert found.jobs == read(tmp_path / "jobs.jsonl", rows).jobs
    assert read(tmp_path / "jobs.tsv", b"prompt\tseed\na b, c\t3\n").jobs[0].prompt == "a b, c"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"prompt,promt\na,b\n", "line 1: unknown column 'promt'; did you mean prompt?"),
        (b"prompt,seed,seed\na,1,2\n", "line 1: column 'seed' is there twice"),
        (b'prompt\n"a', "line 2: it is no CSV"),
        (b"prompt\na\n\xff\n", "line 3: it must be UTF-8 text"),
        (b"prompt,seed\na,one\n", "line 2: seed must be a whole number from 0 to 4611686018427387903, not 'one'"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, table: bytes, said: str) -> None:
    found = read(tmp_path / "jobs.csv", table)
    assert len(found.errors) == 1 and found.errors[0].startswith(said)


def test_stdin_is_json_where_it_begins_with_a_brace(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b'\n {"prompt": "a b", "seed": 3}', b"prompt,seed\na b,3"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        (job,) = read_jobs("-", {}, RULES).jobs
        assert (job.prompt, job.seed) == ("a b", 3)


def test_empty_and_missing_files_and_bad_defaults_are_refused_at_once(tmp_path: Path) -> None:
    for data in (b"", b"\n\n"):
        with pytest.raises(BadInput, match="at least one job"):
            read(tmp_path / "empty.jsonl", data)
    with pytest.raises(BadInput, match="JOBS must be a file of jobs"):
        read_jobs(str(tmp_path / "nowhere.jsonl"), {}, RULES)
    with pytest.raises(BadInput, match="defaults: steps must be"):
        read(tmp_path / "a.jsonl", b'{"prompt": "a"}\n' * 3, {"steps": -2})
    with pytest.raises(BadInput, match="defaults: id cannot have a default"):
        read(tmp_path / "a.jsonl", b'{"prompt": "a"}', {"id": "x"})


def test_defaults_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "defaults.yaml"
    path.write_text("steps: 4\nset: {lambda: 3}\n")
    assert read_defaults(path) == {"steps": 4, "set": {"lambda": 3}}
    for text, said in (("- 1", "keys with values"), ("a: [", "must be YAML"), ("!!python/object:os.system {}", "must be YAML")):
        path.write_text(text)
        with pytest.raises(BadInput, match=said) as error:
            read_defaults(path)
        assert "\n" not in str(error.value)


def test_arguments_of_the_call_are_known_without_the_weights(tiny_pipeline_folder: Path) -> None:
    known = call_arguments(choose_model(str(tiny_pipeline_folder)))
    assert known is not None and "max_sequence_length" in known and "prompt" not in known and "latents" not in known


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from([".jsonl", ".csv", ".tsv"]))
@settings(max_examples=150)
def test_any_bytes_are_jobs_or_lines_about_them(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    try:
        found = read(path, data)
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert all(error.startswith("line ") and "\n" not in error for error in found.errors)
