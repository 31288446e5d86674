"""Graphs: a replayed call gives what the call itself gives, whatever was stored where and whatever happened in between.

There is no GPU here. The stand-in records every operation of a call and does it again on the same memory, so Python is not run at a
replay, what was not copied into the graph's memory is stale, and what the graph leaves in its pool is ruined before the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hasten
from hasten.accelerators import fused_blocks
from hasten.accelerators.caching import graphs as module
from hasten.accelerators.caching.compose import Composed
from hasten.accelerators.caching.graphs import CudaCapture, Graphs, flatten, unflatten
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import Session
from hasten.accelerators.caching.trace import Trace
from hasten.pipelines.accelerated import trace
from tests.families import flux, flux_pipeline, pixart, pixart_pipeline, run, sd_pipeline, wan, wan_pipeline

ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default}


class Tape(TorchDispatchMode):
    """Records operations on tensors, each with what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"{func} waits for the device while it is captured")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in value for tensor in tensors_in(entry)] if isinstance(value, list | tuple) else []


def memory_of(tensor: Tensor) -> int:
    """Tells whether two tensors share memory; packed weights have none that could be shared."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


class Recorder:
    """The stand-in for CUDA graphs. All its graphs share a pool: a replay ruins what the others left there."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self) -> None:
        self.pools: list[list[Tensor]] = []
        self.replays = 0
        self.forgotten = 0
        Recorder.made.append(self)

    def accepts(self, tensor: Tensor) -> bool:
        return True

    def forget(self) -> None:
        self.pools.clear()
        self.forgotten += 1

    def settle(self, device: torch.device) -> None:
        return None

    def capture(self, function: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
        tape = Tape()
        with tape:
            outputs = function()
        steps, pool = [], []
        for func, args, kwargs, out in tape.operations:
            given = {memory_of(t) for t in tensors_in([*args, *kwargs.values()])}
            fresh = [memory_of(t) not in given for t in tensors_in(out)]
            pool += [t for t, own in zip(tensors_in(out), fresh, strict=True) if own and t.is_floating_point()]
            if any(fresh) or func._schema.is_mutable:
                steps.append((func, args, kwargs, out, fresh))
        self.pools.append(pool)

        @torch.inference_mode()  # in which everything may be written to
        def ruin() -> None:
            for tensor in (tensor for one in self.pools for tensor in one):
                tensor.fill_(float("nan"))

        @torch.inference_mode()
        def replay() -> None:
            self.replays += 1
            ruin()
            for func, args, kwargs, out, fresh in steps:
                again = func(*args, **kwargs)
                for kept, new, own in zip(tensors_in(out), tensors_in(again), fresh, strict=True):
                    if own:
                        kept.copy_(new)

        ruin()
        return replay, outputs


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    Recorder.made = []
    monkeypatch.setattr(module, "CudaCapture", Recorder)
    yield Recorder


def both(pipeline: Callable[[], Any], method: Any, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A wrapper without graphs and one with, on models of the same weights, and a call for them."""
    pipe, call = pipeline()
    asked = options.pop("graphs", 64)
    return hasten.accelerate(pipe, method, **options), hasten.accelerate(pipeline()[0], method, graphs=asked, **options), call


def graphs_in(fast: Any) -> Graphs:
    return next(iter(fast.graphs.values()))


CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "pixart delta-dit": (pixart_pipeline, hasten.DeltaDiT(interval=2)),
    "pixart forecast": (pixart_pipeline, hasten.Forecast(interval=2, order=2, start=2)),
    "pixart fora": (pixart_pipeline, hasten.FORA(interval=3)),
    "pixart skipped guidance": (pixart_pipeline, Composed((hasten.Forecast(interval=2), hasten.SkipGuidance(interval=2, start=2)))),
    "flux delta-dit": (flux_pipeline, hasten.DeltaDiT(interval=2)),
    "flux forecast": (flux_pipeline, hasten.Forecast(interval=3, order=1, start=2)),
    "flux fora": (flux_pipeline, hasten.FORA(interval=2)),
    "wan delta-dit": (wan_pipeline, hasten.DeltaDiT(interval=2)),
    "wan forecast": (wan_pipeline, hasten.Forecast(interval=2, order=2, start=2)),
    "wan fora": (wan_pipeline, hasten.FORA(interval=3)),
    "sd deepcache": (sd_pipeline, hasten.DeepCache(interval=3)),
}


STATES = [(name, None) for name in CASES] + [("flux forecast", "int8"), ("pixart fora", "int8"), ("sd deepcache", "fp8")]


@pytest.mark.parametrize(("name", "state"), STATES)
def test_every_run_gives_what_it_gives_without(name: str, state: str | None) -> None:
    plain, fast, call = both(*CASES[name], state=state)
    for i in range(3):
        text = {key: value * (1 + 0.2 * i) for key, value in call.items() if key.endswith("embeds")}
        changes = {**text, "latents": call["latents"] + 0.1 * i}
        assert torch.equal(run(plain, call, **changes), run(fast, call, **changes)), i
        assert (fast.report.plan.actions == plain.report.plan.actions).all()
        assert (fast.report.reasons, fast.report.warnings) == (plain.report.reasons, plain.report.warnings)
    graphs = graphs_in(fast)
    assert graphs.captured == len(graphs) == len(Recorder.made[-1].pools) > 0
    before = graphs.direct, Recorder.made[-1].replays
    run(fast, call)
    assert graphs.direct == before[0] and Recorder.made[-1].replays > before[1], "the fourth run is replayed throughout"


@pytest.mark.parametrize("name", ["pixart delta-dit", "sd deepcache"])
def test_few_graphs_serve_a_run_that_repeats_itself(name: str) -> None:
    _, fast, call = both(*CASES[name])
    for _ in range(3):
        run(fast, call, num_inference_steps=9)
    assert len(graphs_in(fast)) <= 5, "as many as there are kinds of steps: the plan's second half reuses other blocks"


def test_two_evaluations_a_step() -> None:
    from diffusers import HeunDiscreteScheduler

    plain, fast, call = both(lambda: pixart_pipeline(HeunDiscreteScheduler()), hasten.DeltaDiT(interval=2))
    for _ in range(3):
        assert torch.equal(run(plain, call), run(fast, call))
    assert graphs_in(fast).replayed


def test_another_resolution_has_graphs_of_its_own() -> None:
    plain, fast, call = both(*CASES["pixart delta-dit"])
    large = {"latents": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(4)), "width": 96}
    for changes in ({}, large, {}, large):
        assert torch.equal(run(plain, call, **changes), run(fast, call, **changes))
    graphs = graphs_in(fast)
    before = graphs.direct
    for changes in ({}, large):
        assert torch.equal(run(plain, call, **changes), run(fast, call, **changes))
    assert graphs.direct == before and not len(graphs) % 2


@pytest.mark.parametrize("name", ["pixart delta-dit", "pixart fora", "flux forecast", "wan delta-dit"])
def test_fused_blocks_are_captured_once_and_replayed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_blocks, "at_hand", lambda: True)
    monkeypatch.setattr(fused_blocks, "LEAST", 1)
    monkeypatch.setattr(fused_blocks, "fuses", lambda *tensors: True)
    plain, fast, call = both(*CASES[name])
    for _ in range(3):
        assert torch.equal(run(plain, call), run(fast, call)) and not fast.report.warnings
    graphs = graphs_in(fast)
    before = graphs.captured, graphs.direct
    run(fast, call)
    assert (graphs.captured, graphs.direct) == before and graphs.captured == len(graphs)


def test_kernels_that_are_turned_off_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, call = both(*CASES["pixart delta-dit"])
    for _ in range(3):
        run(fast, call)
    graphs = graphs_in(fast)
    before = graphs.captured
    monkeypatch.setattr(module.backend, "usable", lambda device: True)
    for _ in range(2):
        run(fast, call)
    assert graphs.captured == 2 * before == len(graphs)


# ----------------------------------------------------------------------------------------------------------- the bound


def test_no_more_graphs_than_asked_for_and_none_captured_over_and_over() -> None:
    plain, fast, call = both(*CASES["pixart forecast"], graphs=2)
    for _ in range(4):
        assert torch.equal(run(plain, call), run(fast, call))
    graphs = graphs_in(fast)
    assert (len(graphs), graphs.captured) == (2, 2)
    assert graphs.replayed, "those that are kept are used"
    assert any("more kinds of calls than the 2 graphs" in warning for warning in fast.report.warnings)


def test_graphs_that_nobody_asks_for_give_way() -> None:
    plain, fast, call = both(*CASES["pixart delta-dit"], graphs=2)
    for _ in range(3):
        run(fast, call)
    graphs = graphs_in(fast)
    held = graphs.bytes
    small = {"latents": call["latents"][..., :4].clone(), "width": 32}
    for _ in range(4):
        assert torch.equal(run(plain, call, **small), run(fast, call, **small))
    assert len(graphs) == 2 and graphs.captured == 4
    assert graphs.bytes < held, "the memory of the larger ones is given back"
    assert torch.equal(run(plain, call), run(fast, call))


# -------------------------------------------------------------------------------------------------- one denoiser in a loop


TRACES: dict[int, tuple[Any, dict[Any, Trace]]] = {}


def traces_of(built: Any) -> dict[Any, Trace]:
    """A denoiser is traced once; its inputs hold it alive."""
    if id(built) not in TRACES:
        found = trace(built[0], **built[1](0))
        TRACES[id(built)] = built, {(found.resolution, getattr(torch, found.dtype)): found}
    return TRACES[id(built)][1]


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    yield
    TRACES.clear()


def loop(
    built: Any, method: Any, graphs: Graphs | None, steps: int = 8, seed: int = 0, between: Any = None, **options: Any
) -> tuple[list[Tensor], Session]:
    """The outputs of a loop over a denoiser, as they are when it ends."""
    model, inputs = built
    traces = traces_of(built)
    outs = []
    text = {name: value for name, value in inputs(seed).items() if name not in ("hidden_states", "timestep")}
    with torch.no_grad(), Session(model, method, steps, traces=traces, graphs=graphs, **options) as session:
        for k in range(steps):
            call = {**inputs(seed + k), **text}
            with session.step(k):
                if between is not None:
                    between(session, k, call)
                outs.append(model(**call)[0])
    return outs, session


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weighed(sites: tuple[str, ...], steps: int) -> Plan:
    """Every half of the blocks at steps of its own, three stored offsets to each forecast."""
    actions = np.full((steps, len(sites)), Action.FORECAST)
    actions[[0, 1, 3, 6]] = Action.COMPUTE
    actions[4, : len(sites) // 2] = Action.COMPUTE
    weights = np.broadcast_to(np.array([0.5, 0.3, 0.2], np.float32), (steps, len(sites), 1, 3))
    return Plan(actions, sites, weights=weights)


@pytest.mark.parametrize("family", [pixart, flux, wan])
def test_older_values_outlive_the_graph_that_displaces_them(family: Any) -> None:
    built = family()
    (found,) = traces_of(built).values()
    method = weighed(found.sites, 8)
    graphs = Graphs(limit=64, capture=Recorder())
    for seed in range(4):
        before = graphs.direct
        assert same(loop(built, method, None, seed=seed)[0], loop(built, method, graphs, seed=seed)[0])
    assert graphs.captured == len(graphs) >= 6 and graphs.direct == before


@pytest.mark.parametrize("method", [hasten.DeltaDiT(interval=4, cached=0.75), hasten.FORA(interval=4), hasten.Forecast(interval=4)])
@pytest.mark.parametrize("index", [[1, 0], [1], [0, 1, 1]])
def test_resampled_particles(index: list[int], method: Any) -> None:
    built, graphs = pixart(), Graphs(limit=64, capture=Recorder())

    def between(session: Session, k: int, call: dict[str, Any]) -> None:
        if k == 6:
            session.reindex(index)
        if k >= 6:
            call |= {name: value[index] for name, value in call.items() if isinstance(value, Tensor)}

    for seed in range(3):
        without, with_graphs = (loop(built, method, g, seed=seed, between=between) for g in (None, graphs))
        assert same(without[0], with_graphs[0])
        assert not with_graphs[1].report.reasons
    assert graphs.replayed


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_a_run_that_ends_early_leaves_the_next_one_right(at: int, inside: bool) -> None:
    built, graphs = pixart(), Graphs(capture=Recorder())
    method = hasten.Forecast(interval=2, order=1, start=2)

    def between(session: Session, k: int, call: dict[str, Any]) -> None:
        if k == at and inside:
            call["encoder_hidden_states"] = torch.zeros(2, 5, 23)  # some way into the call this does not fit
        elif k == at:
            raise RuntimeError("interrupted")

    for seed in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied" if inside else "interrupted"):
            loop(built, method, graphs, seed=seed, between=between)
        assert same(loop(built, method, None, seed=seed)[0], loop(built, method, graphs, seed=seed)[0])
    assert graphs.replayed


def test_a_call_that_fails_while_it_is_captured_raises_nothing_and_the_run_goes_on() -> None:
    class Failing(Recorder):
        def capture(self, function: Any, device: Any) -> Any:
            super().capture(function, device)
            raise RuntimeError("operation not permitted when stream is capturing")

    built, graphs = pixart(), Graphs(capture=Failing())
    method = hasten.Forecast(interval=2, order=1, start=2)
    for seed in range(3):
        outs, session = loop(built, method, graphs, seed=seed)
        assert same(loop(built, method, None, seed=seed)[0], outs)
    assert not graphs.captured and not len(graphs)
    assert session.report.warnings == ["without a graph: 3 captures have failed"]


@pytest.mark.parametrize(
    ("case", "number"),
    [*((hasten.Forecast(interval=2, order=2, start=2), number) for number in range(5)), *((hasten.FORA(interval=3), i) for i in range(2))],
)
def test_a_replay_that_gives_something_else_is_never_used(case: Any, number: int) -> None:
    class Wrong(Recorder):
        count = 0

        def capture(self, function: Any, device: Any) -> Any:
            replay, outputs = super().capture(function, device)
            wrong, Wrong.count = Wrong.count == number, Wrong.count + 1
            stored = graphs._memory

            def broken() -> None:
                replay()
                if wrong:
                    for tensor in (*outputs, *stored.values()):
                        tensor.mul_(2)

            return broken, outputs

    built = pixart()
    graphs = Graphs(limit=64, capture=Wrong())
    for seed in range(3):
        assert same(loop(built, case, None, seed=seed)[0], loop(built, case, graphs, seed=seed)[0])
    assert Wrong.count > number and graphs.captured == Wrong.count - 1


def test_what_is_handed_out_stays() -> None:
    built, graphs = pixart(), Graphs(capture=Recorder())
    kept = [loop(built, hasten.DeltaDiT(interval=2), graphs, seed=seed)[0] for seed in range(3)]
    for seed in range(3):
        assert same(kept[seed], loop(built, hasten.DeltaDiT(interval=2), None, seed=seed)[0])


def test_with_and_without_inference_mode() -> None:
    built, graphs = pixart(), Graphs(capture=Recorder())
    method = hasten.FORA(interval=2)
    for seed, inference in enumerate((True, False, True, False)):
        with torch.inference_mode(inference):
            assert same(loop(built, method, None, 6, seed=seed)[0], loop(built, method, graphs, 6, seed=seed)[0])
    assert graphs.replayed


def test_a_replay_waits_for_nothing() -> None:
    class Probe(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in WAITS, func
            return func(*args, **(kwargs or {}))

    built, graphs = pixart(), Graphs(capture=Recorder())
    for _ in range(2):
        loop(built, hasten.DeltaDiT(interval=2), graphs, nan_check="off")
    captured = graphs.captured
    probe = Probe()

    def between(session: Session, k: int, call: dict[str, Any]) -> None:
        if k == 1:
            probe.__enter__()

    try:
        loop(built, hasten.DeltaDiT(interval=2), graphs, nan_check="off", between=between)
    finally:
        probe.__exit__(None, None, None)
    assert graphs.captured == captured


def test_values_that_are_not_finite_are_found_after_a_replay() -> None:
    built, graphs = pixart(), Graphs(capture=Recorder())

    def between(session: Session, k: int, call: dict[str, Any]) -> None:
        if k == 4:
            call["hidden_states"] = call["hidden_states"] * float("nan")

    method = hasten.DeltaDiT(interval=2)
    for seed in range(3):
        loop(built, method, graphs, seed=seed)
    without, with_graphs = (loop(built, method, g, between=between) for g in (None, graphs))
    assert with_graphs[1].report.reasons == without[1].report.reasons != {}
    assert same(without[0][:4] + without[0][5:], with_graphs[0][:4] + with_graphs[0][5:])
    assert bool(with_graphs[0][4].isnan().all())


C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
# By case: what is done at each step, and the step whose call is of a new kind in every run, so that it has no graph.
BETWEEN: dict[str, tuple[list[list[Action]], int]] = {
    "a newer value is copied to where an older one lives": ([[C] * 4, [C] * 4, [R] * 4, [F] * 4, [F] * 4], 1),
    "memory that was let go is written to again": ([[C] * 4, [R, R, C, C], [C] * 4, [R, R, C, C], [R] * 4], 3),
    "a reuse has no graph": ([[C] * 4, [R] * 4, [R] * 4, [C] * 4, [F] * 4], 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_calls_without_a_graph_between_those_with_one(name: str) -> None:
    rows, odd = BETWEEN[name]
    built, graphs = scaled(), Graphs(capture=Recorder())
    (found,) = traces_of(built).values()
    method = Plan(np.array(rows), found.sites, facts={"forecast_order": 1})

    def between(session: Session, k: int, call: dict[str, Any]) -> None:
        if k == odd:
            call["flag"] = seed + 0.5

    for seed in range(4):
        without, with_graphs = (loop(built, method, g, len(rows), seed, between) for g in (None, graphs))
        assert same(without[0], with_graphs[0])
        assert not with_graphs[1].report.reasons and not with_graphs[1].report.warnings
    assert graphs.replayed and graphs.direct >= 4


# ------------------------------------------------------------------------------------------------------ what a graph bakes in


def corrected(sites: tuple[str, ...], steps: int, seed: int) -> Plan:
    generator = np.random.default_rng(seed)
    actions = np.full((steps, len(sites)), Action.REUSE)
    actions[::3] = Action.COMPUTE
    return Plan(actions, sites, corrections={sites[-1]: generator.normal(1, 0.3, (2, steps, 1, 32)).astype(np.float32)})


@pytest.mark.parametrize("parts", [False, True])
def test_corrections_are_those_of_the_plan_and_the_step(parts: bool) -> None:
    built, graphs = pixart(), Graphs(limit=64, capture=Recorder())
    (found,) = traces_of(built).values()
    sites = tuple(part.path for part in found.parts) if parts else found.sites
    for seed in (0, 0, 0, 1, 1, 1, 0):
        method = corrected(sites, 8, seed)
        assert same(loop(built, method, None, seed=seed)[0], loop(built, method, graphs, seed=seed)[0])
    assert graphs.replayed and not graphs.direct > 4 * 8


class Scaled(nn.Module):
    """Two blocks of a toy transformer whose layers have a scale beside their weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList([ScaledBlock() for _ in range(4)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, flag: Any = None) -> tuple[Tensor]:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states + 0.01 * timestep)
        return (hidden_states,)


class ScaledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scaling = {"default": 1.0}
        self.table = torch.ones(4)
        self.chosen = ["default"]
        self.mode: Any = None

    def forward(self, x: Tensor) -> Tensor:
        factor = sum(self.scaling[name] for name in self.chosen)
        if self.mode is not None:
            factor = self.mode(x, factor)
        return x + factor * self.table * torch.tanh(self.layer(x))


def scaled() -> Any:
    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)),
            "timestep": torch.tensor([1.0 + seed]),
        }

    return Scaled().eval(), inputs


def test_quantised_layers_are_at_the_step_of_the_replay() -> None:
    built, graphs, steps = scaled(), Graphs(limit=64, capture=Recorder()), 6
    (found,) = traces_of(built).values()
    actions = np.repeat(np.array([C, R] * (steps // 2))[:, None], len(found.sites), 1)
    ranges = np.array([[-0.5 * (k + 1), 0.5 * (k + 1)] for k in range(steps)], np.float32)
    layers = {f"range.transformer_blocks.{i}.layer": ranges for i in range(4)}
    plan = Plan(actions, found.sites, facts={"quantised": {"weights": "int8", "activations": "int8"}}, tables=layers)
    copies: dict[str, Any] = {}
    for seed, quantised in enumerate((copies, copies, copies, {}, copies)):
        without, with_graphs = (loop(built, plan, g, steps, seed, quantised=quantised) for g in (None, graphs))
        assert same(without[0], with_graphs[0])
        assert not with_graphs[1].report.warnings
    assert graphs.replayed >= steps
    assert not same(without[0], loop(built, hasten.Forecast(interval=2, order=0, start=1), None, steps, seed)[0])


def replaced_parameter(block: Any) -> None:
    block.layer.weight = nn.Parameter(block.layer.weight.detach() * 2)


def moved_parameter(block: Any) -> None:
    block.layer.weight.data = block.layer.weight.data * 2


def replaced_layer(block: Any) -> None:
    block.layer = nn.Linear(4, 4).eval()


def in_place(block: Any) -> None:
    with torch.no_grad():
        block.layer.weight.mul_(2)


CHANGES: dict[str, Any] = {
    "scale": lambda block: block.scaling.update(default=0.5),
    "list": lambda block: block.chosen.append("default"),
    "tensor": lambda block: setattr(block, "table", torch.full((4,), 0.5)),
    "parameter": replaced_parameter,
    "moved": moved_parameter,
    "layer": replaced_layer,
    "in place": in_place,
}


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_never_answered_from_an_old_graph(name: str, during: bool) -> None:
    method = hasten.Forecast(interval=2, order=0, start=1)
    results = []
    for graphs in (None, Graphs(capture=Recorder())):
        torch.manual_seed(0)
        built = scaled()
        for _ in range(3):
            loop(built, method, graphs)
        torch.manual_seed(1)
        change = CHANGES[name]
        blocks = built[0].transformer_blocks

        def between(session: Session, k: int, call: dict[str, Any], change: Any = change, blocks: Any = blocks) -> None:
            if k == 4:
                change(blocks[1])

        if not during:
            change(blocks[1])
        results.append([loop(built, method, graphs, between=between if during else None)[0] for _ in range(2)])
    assert graphs is not None and graphs.replayed
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_another_model_of_the_same_make() -> None:
    graphs = Graphs(capture=Recorder())
    method = hasten.Forecast(interval=2, order=0, start=1)
    for built in (scaled(), scaled()):
        with torch.no_grad():
            built[0].transformer_blocks[0].layer.bias.add_(float(graphs.captured))
        for _ in range(3):
            assert same(loop(built, method, None)[0], loop(built, method, graphs)[0])


def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    built, graphs = pixart(), Graphs(capture=Recorder())
    method = hasten.DeltaDiT(interval=2)
    for block in built[0].transformer_blocks:
        block.compile(backend="eager")
    for _ in range(3):
        assert same(loop(built, method, None)[0], loop(built, method, graphs)[0])
    assert graphs.replayed


# ------------------------------------------------------------------------------------------------------- what has no graph


def noisy(x: Tensor, factor: float) -> Any:
    return factor + torch.rand(())


def asking(x: Tensor, factor: float) -> Any:
    return factor if float(x.sum()) > 0 else 2 * factor


def set_mode(mode: Any) -> Any:
    return lambda model: setattr(model.transformer_blocks[1], "mode", mode)


REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "training": (lambda model: model.train(), {}, "is in training mode"),
    "hook": (lambda model: model.transformer_blocks[1].register_forward_hook(lambda *_: None), {}, "has a forward hook"),
    "offloaded": (lambda model: setattr(model.transformer_blocks[2], "_hf_hook", object()), {}, "a hook that moves or casts"),
    "host": (set_mode(asking), {}, "waits for the device"),
    "random": (set_mode(noisy), {}, "another result than the call itself"),
    "observed": (None, {"observe": lambda *_: None}, "every call is observed"),
    "prepared": (None, {"prepare": lambda *_: None}, "every call is observed"),
    "argument": (None, {"between": lambda session, k, call: call.update(flag=object())}, "'flag' has a object"),
    "sparse": (None, {"between": lambda session, k, call: call.update(flag=[torch.eye(2).to_sparse()])}, "not dense"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_replayed_runs_as_always_and_says_why(name: str) -> None:
    change, options, why = REFUSALS[name]
    method = hasten.Forecast(interval=2, order=0, start=1)
    results, said = [], [""]
    for graphs in (None, Graphs(capture=Recorder())):
        torch.manual_seed(0)
        built = scaled()
        if change is not None:
            change(built[0])
        torch.manual_seed(2)
        for _ in range(3):
            outs, session = loop(built, method, graphs, **options)
            said = session.report.warnings
            results.append(outs)
    assert graphs is not None and bool(graphs.replayed) == (name in ("host", "random")), "calls without that block can be replayed"
    assert len(said) == 1 and why in said[0], "every run says it, once"
    if name != "random":
        assert all(same(a, b) for a, b in zip(results[:3], results[3:], strict=True))


def test_a_method_that_decides_as_it_goes_has_no_graphs() -> None:
    plain, fast, call = both(pixart_pipeline, hasten.FirstBlock(threshold=0.1))
    for _ in range(2):
        assert torch.equal(run(plain, call), run(fast, call))
    assert fast.report.warnings == ["without a graph: the method decides during the run what is reused"]
    fast.method = fast.report.plan
    for _ in range(3):
        run(fast, call)


def test_gradients_and_autocast() -> None:
    built, graphs = scaled(), Graphs(capture=Recorder())
    with Session(built[0], hasten.DeltaDiT(interval=2), 4, graphs=graphs) as session:
        out = built[0](**built[1](0))[0]
    assert out.requires_grad and session.report.warnings[0] == "without a graph: gradients are recorded; call under torch.no_grad()"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Session(built[0], hasten.DeltaDiT(), 4, graphs=graphs) as session:
        built[0](**built[1](0))
    assert "autocast keeps copies of weights" in session.report.warnings[0]


def test_a_cpu_model_runs_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CudaCapture", CudaCapture)
    plain, fast, call = both(*CASES["pixart delta-dit"], graphs=True)
    assert torch.equal(run(plain, call), run(fast, call))
    assert fast.report.warnings == ["without a graph: the denoiser is given a tensor on cpu"]
    assert not graphs_in(fast).bytes


def test_off_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked at the model")

    monkeypatch.setattr(module, "Watch", never)
    monkeypatch.setattr(Graphs, "__init__", never)
    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe, hasten.DeltaDiT(interval=2))
    run(fast, call)
    assert fast.graphs == {}


def test_the_baseline_is_the_plain_pipeline() -> None:
    _, fast, call = both(*CASES["pixart delta-dit"])
    for _ in range(3):
        fast.baseline(**call)
    assert not graphs_in(fast).direct and not graphs_in(fast).replayed


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "yes", None])
def test_settings_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"graphs must be True, False or a count of at least 1, not"):
        hasten.accelerate(pixart_pipeline()[0], hasten.DeltaDiT(), graphs=wrong)
    with pytest.raises(ValueError, match=r"graphs must be"):
        hasten.attach(pixart()[0], hasten.DeltaDiT(), num_inference_steps=2, graphs=wrong)


# ----------------------------------------------------------------------------------------------------------------- parts


@dataclass
class Output:
    sample: Any
    other: Any = None


def nests() -> st.SearchStrategy[Any]:
    single = st.one_of(st.integers(0, 9).map(lambda n: torch.full((2,), float(n))), st.none(), st.booleans(), st.integers(), st.text())
    return st.recursive(
        single,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.builds(Output, inner, inner),
        ),
        max_leaves=6,
    )


def described(value: Any) -> Any:
    """A nest with its tensors as numbers: comparable."""
    if isinstance(value, Tensor):
        return "tensor", value.tolist()
    if isinstance(value, Output):
        return Output, described(value.sample), described(value.other)
    if isinstance(value, dict):
        return dict, [(key, described(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [described(entry) for entry in value]
    return type(value), value


@given(nests(), nests())
def test_a_nest_is_its_form_and_its_tensors(first: Any, second: Any) -> None:
    tensors: list[Tensor] = []
    form = flatten(first, tensors, "it")
    assert described(unflatten(form, iter(tensors))) == described(first)
    others: list[Tensor] = []
    alike = form == flatten(second, others, "it") and len(tensors) == len(others)
    assert alike == (described(unflatten(form, iter([torch.zeros(1)] * len(tensors)))) == blank(second))
    hash(form)


def blank(value: Any) -> Any:
    """As `described`, all tensors alike."""
    found: list[Tensor] = []
    form = flatten(value, found, "it")
    return described(unflatten(form, iter([torch.zeros(1)] * len(found))))


class Cuda:
    """Stands for torch.cuda: says what is current, and lets a capture fail."""

    def __init__(self) -> None:
        self.current = "the caller's"
        self.waited: list[tuple[str, str]] = []
        self.handles = 0
        self.pools: list[Any] = []
        self.fails = False

    def stream(self, name: str) -> Any:
        cuda = self

        class Stream(str):
            def wait_stream(self, other: str) -> None:
                cuda.waited.append((str(self), str(other)))

        return Stream(name)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def handle() -> int:
            self.handles += 1
            return self.handles

        @contextmanager
        def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            self.pools.append(pool)
            before, self.current = self.current, stream
            yield
            if self.fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before

        class Graph:
            def replay(self) -> None:
                return None

        names = {
            "device": lambda device: nullcontext(),
            "Stream": lambda: self.stream("side"),
            "current_stream": lambda device=None: self.stream(self.current),
            "set_stream": lambda stream: setattr(self, "current", str(stream)),
            "graph_pool_handle": handle,
            "CUDAGraph": Graph,
            "graph": graph,
        }
        for name, stand_in in names.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


def test_cuda_streams_and_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device = Cuda(), torch.device("cuda", 0)
    cuda.patch(monkeypatch)
    capture = CudaCapture()
    within = []
    _, outputs = capture.capture(lambda: within.append(cuda.current) or [], device)
    assert (within, outputs, cuda.current) == (["side"], [], "the caller's")
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture.capture(list, device)
    assert cuda.current == "the caller's", "torch leaves its own stream current where a capture fails"
    cuda.fails = False
    capture.forget()
    capture.capture(list, device)
    assert cuda.pools == [1, 1, 2], "one pool for all, and another once all are gone"
    capture.settle(device)
    assert not cuda.waited
    cuda.current = "another"
    capture.settle(device)
    capture.settle(device)
    assert cuda.waited == [("another", "the caller's")]
