"""Services with real models, each loaded once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.app.batch.painter import Painter
from hasten.app.serving.application import Room, Service
from hasten.app.serving.images import Frame, Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.texts import Desk
from hasten.pipelines.text import TextPipeline
from tests.app.serving.stand_ins import listening


@pytest.fixture(scope="session")
def painter(tiny_pipeline_folder: Path) -> Painter:
    return Painter(str(tiny_pipeline_folder), score=None)


@pytest.fixture(scope="session")
def puzzles() -> TextPipeline:
    return TextPipeline.from_pretrained("puzzles", CreditDecoding(0.9))


@pytest.fixture(scope="module")
def service(painter: Painter, puzzles: TextPipeline) -> Iterator[Service]:
    """The tiny pipeline as `tiny`, and `puzzles`. Waits long enough for requests sent together to meet."""
    metrics = Metrics()
    studio = Studio("tiny", painter, metrics, {"steps": 2}, Frame(unit=8, pixels=128 * 128, steps=4))
    made = Service(studio, Desk("puzzles", puzzles, metrics, 32), metrics, Room(wait=0.1, timeout=60, body=200_000), key="right")
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as (found, _):
        yield found
