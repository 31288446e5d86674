"""`hasten.accelerate(..., attention=...)` on tiny pipelines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hasten
from tests.families import PIPELINES, run


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
def test_calls_run_the_back_end_and_leave_the_model_as_it_was(name: str) -> None:
    pipe, call = PIPELINES[name]()
    layers = {path: module.processor for path, module in pipe.transformer.named_modules() if hasattr(module, "processor")}
    method = hasten.DeltaDiT(interval=2)
    plain, cached = run(pipe, call), run(hasten.accelerate(pipe, method), call)
    fast = hasten.accelerate(pipe, method, attention="math")
    made = run(fast, call)
    torch.testing.assert_close(made, cached, rtol=1e-4, atol=1e-4 * float(cached.abs().max()))
    report = fast.attention["transformer"]
    assert report.attention == "math" and len(report.layers) > 0
    assert all(layer.how in ("set", "routed") for layer in report.layers)
    assert {back for by in report.ran.values() for back in by} == {"math"}, "every call ran it"
    assert fast.report.computed_fraction < 1
    for path, module in pipe.transformer.named_modules():
        assert path not in layers or module.processor is layers[path]
    assert torch.equal(run(pipe, call), plain)


def test_the_plain_pipeline_is_timed_as_it_is() -> None:
    pipe, call = PIPELINES["pixart"]()
    fast = hasten.accelerate(pipe, hasten.DeltaDiT(), attention="math")
    fast.baseline(**call)
    assert fast.attention == {}
    run(fast, call)
    assert fast.report.speedup is not None


def test_what_cannot_be_is_said_before_anything_runs() -> None:
    pipe, _ = PIPELINES["pixart"]()
    with pytest.raises(ValueError, match=r"attention must be one of .*xformers.*, not 'fast'"):
        hasten.accelerate(pipe, hasten.DeltaDiT(), attention="fast")
    with pytest.raises(ValueError, match="attention='sage' cannot be used"):
        hasten.accelerate(pipe, hasten.DeltaDiT(), attention="sage")
