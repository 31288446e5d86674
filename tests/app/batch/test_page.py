"""docs/batch.md: its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")
COMMAND, PROGRAM = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "docs/batch.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [f"{step} of 4" for step in (1, 2, 3, 4)] and len(printed) == 6
    assert all(re.fullmatch(r"\(64, 64\) [01]\.\d+ [0-9a-f]{16}", line) for line in printed[4:])


@pytest.mark.slow
def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(COMMAND, "docs/batch.md", "exec"), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " done " in line]
    assert [row[2] for row in rows] == [f"images/{row[0]}.png" for row in rows] and rows[1][0] == "cross"
    assert (tmp_path / "pictures" / "report.html").is_file()


def test_every_key_of_a_job_is_explained() -> None:
    from hasten.app.batch.jobs import KEYS

    assert not [key for key in KEYS if f"`{key}`" not in PAGE]
