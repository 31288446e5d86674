"""Static plans: nothing waits for the device, and blocks compiled one by one stay compiled and are compiled once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hasten
from hasten.accelerators.caching.compose import Composed
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import Session
from hasten.pipelines.accelerated import trace
from tests.families import flux, pixart, wan

STEPS = 8
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Probe(TorchDispatchMode):
    """Counts the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self.waits[str(func)] += 1
        return func(*args, **(kwargs or {}))


def weighed(found: Any, steps: int) -> Plan:
    """A planner's plan in form: uneven steps, weights for three stored offsets."""
    column = np.full(steps, Action.FORECAST)
    column[[0, 1, 3, 6]] = Action.COMPUTE
    actions = np.repeat(column[:, None], len(found.sites), 1)
    weights = np.broadcast_to(np.array([0.5, 0.3, 0.2], np.float32), (steps, len(found.sites), 1, 3))
    return Plan(actions, found.sites, weights=weights)


METHODS: dict[str, Any] = {
    "delta-dit": hasten.DeltaDiT(interval=2),
    "forecast": hasten.Forecast(interval=2, order=2, start=2),
    "fora": hasten.FORA(interval=2),
    "planned": None,
    "skipped guidance": Composed((hasten.Forecast(interval=2), hasten.SkipGuidance(interval=2, start=2, conditional="second"))),
}


MOVING = ("hidden_states", "timestep")
"""What a pipeline gives anew at every step; the conditioning is the same tensors throughout."""


def run(
    model: nn.Module, inputs: Any, method: Any, found: Any, *, probe: Probe | None = None, state: str | None = None
) -> list[torch.Tensor]:
    """The outputs of a loop; only the denoiser calls after the first are probed."""
    outs = []
    traces = {(found.resolution, getattr(torch, found.dtype)): found}
    calls = [{**inputs(0), **{name: value for name, value in inputs(i).items() if name in MOVING}} for i in range(STEPS)]
    constant = {name: value for name, value in calls[0].items() if name not in MOVING}
    with torch.no_grad(), Session(model, method, STEPS, traces=traces, nan_check="off", state=state) as session:
        for i in range(STEPS):
            call = {**calls[i], **constant}
            latents = call["hidden_states"]
            call["hidden_states"] = latents[:1].repeat(len(latents), *[1] * (latents.ndim - 1))  # both halves of a guided batch are alike
            with session.step(i):
                if probe is None or i == 0:
                    outs.append(model(**call)[0])
                    continue
                with probe:
                    outs.append(model(**call)[0])
    return outs


@pytest.mark.parametrize("state", [None, "int8"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", [pixart, flux, wan])
def test_a_static_plan_waits_for_nothing(family: Any, name: str, state: str | None) -> None:
    model, inputs = family()
    found = trace(model, **inputs(0))
    method = METHODS[name] if METHODS[name] is not None else weighed(found, STEPS)
    bare = Probe()
    with torch.no_grad(), bare:
        model(**inputs(1))
    probe = Probe()
    run(model, inputs, method, found, probe=probe, state=state)
    own = {op: count - bare.waits[op] * (STEPS - 1) for op, count in probe.waits.items()}
    assert all(count <= 0 for count in own.values()), own


def test_the_probe_sees_what_waits() -> None:
    probe = Probe()
    with probe:
        bool(torch.ones(1).sum() > 0)
    assert probe.waits


def test_parts_of_compiled_blocks_are_refused() -> None:
    model, inputs = pixart()
    found = trace(model, **inputs(0))
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend="eager")
    with pytest.raises(hasten.PlanError, match="compiled, so the calls of its parts cannot be seen"):
        run(model, inputs, METHODS["fora"], found)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fora"])
def test_compiled_blocks_are_compiled_once_under_every_static_plan(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = pixart()
    found = trace(model, **inputs(0))
    method = METHODS[name] if METHODS[name] is not None else weighed(found, STEPS)
    expected = run(model, inputs, method, found)
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    for a, b in zip(run(model, inputs, method, found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    compiled = len(graphs)
    run(model, inputs, method, found)
    assert 0 < len(graphs) == compiled, "nothing is compiled after the first run"
