"""Requests made up from the OpenAPI document, right and wrong ones: every answer is one that the document promises, and none is a 500."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.app.batch.painter import Painter
from hasten.app.serving.application import Room, Service, create_app
from hasten.app.serving.images import Frame, Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.texts import Desk
from hasten.pipelines.text import TextPipeline

load_all_checks()
QUICK, THOROUGH = 25, 340
"""Requests to each route that takes something."""


@pytest.fixture(scope="module")
def application(painter: Painter, puzzles: TextPipeline) -> Iterator[FastAPI]:
    chats = TextPipeline(puzzles.model, copy.deepcopy(puzzles.tokenizer), CreditDecoding(0.9), block_length=16)
    chats.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    metrics = Metrics()
    studio = Studio("tiny", painter, metrics, {"steps": 1}, Frame(unit=8, pixels=64 * 64, steps=2))
    service = Service(studio, Desk("puzzles", chats, metrics, 16), metrics, Room(wait=0.0, timeout=30))
    yield create_app(service)
    service.close()


def fuzz(application: FastAPI, path: str, examples: int) -> None:
    """Sends requests to one route, and holds each answer against the document."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())
    ways = [
        operation.as_strategy(generation_mode=mode) for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    ]

    @given(case=ways[0] | ways[1])
    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def holds(case: schemathesis.Case) -> None:
        # What a schema cannot say (a context's length, a model's sizes) may be refused with status 400. And what is larger than any request
        # may be is refused with 413 before it is looked at, whether it is wrong besides or not.
        response = case.call()
        large = [negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, excluded_checks=[positive_data_acceptance, *large])

    holds()


PATHS = ["/v1/images/generations", "/v1/completions", "/v1/chat/completions"]


@pytest.mark.parametrize("path", PATHS)
def test_made_up_requests(application: FastAPI, path: str) -> None:
    fuzz(application, path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_made_up_requests(application: FastAPI, path: str) -> None:
    fuzz(application, path, THOROUGH)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
def test_routes_that_take_nothing(application: FastAPI, path: str) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", application)
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())
    operation.Case().call_and_validate()
