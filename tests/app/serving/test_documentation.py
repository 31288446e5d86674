"""The examples of docs/serving.md run, and its tables list what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from hasten.app.batch.painter import Painter
from hasten.app.serving.application import Room, Service
from hasten.app.serving.images import Frame, Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.openapi import MEANINGS
from hasten.app.serving.schemas import ImageRequest
from hasten.app.serving.texts import Desk
from hasten.pipelines.text import TextPipeline
from tests.app.serving.stand_ins import listening

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
CURL, PYTHON = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("sh", "python"))


@pytest.fixture(scope="module")
def root(painter: Painter, puzzles: TextPipeline) -> Iterator[str]:
    """As `hasten serve` would, with the tiny pipeline in the place of `shapes`."""
    metrics = Metrics()
    service = Service(
        Studio("shapes", painter, metrics, {"steps": 2}, Frame()), Desk("puzzles", puzzles, metrics, 32), metrics, Room(wait=0.0)
    )
    with listening(service) as (url, _):
        yield url.removesuffix("/v1")


def test_the_python_example(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = PYTHON
    exec(compile(example.replace("http://localhost:8000", root), "serving.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle-7.png", "circle-8.png"]
    assert "34+57" in (out := capsys.readouterr().out) and out.rstrip().endswith("4231")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_examples(root: str, tmp_path: Path) -> None:
    (examples,) = (block for block in CURL if block.startswith("curl"))
    done = subprocess.run(["bash", "-ec", examples.replace("localhost:8000", root)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "circle.png").size == (64, 64)
    assert '"text":"111:1242"' in done.stdout and done.stdout.rstrip().endswith("data: [DONE]")


def test_the_tables_list_every_key_status_and_metric(root: str) -> None:
    cells = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| "))
    named = set(re.findall(r"`([a-z_0-9]+)`", cells))
    assert set(ImageRequest.model_fields) <= named
    assert {str(status) for status in MEANINGS if status != 500} <= set(cells.split())
    page = httpx.get(f"{root}/metrics").text
    metrics = {name for name, kind in re.findall(r"# TYPE (\w+) (\w+)", page) if not name.endswith("_created")}
    assert metrics == {name for name in named if name.startswith("hasten_")}
