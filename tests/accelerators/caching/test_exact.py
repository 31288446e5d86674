"""What must hold to the last bit, and what must hold to rounding: the arithmetic of computing, storing and adding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.forecast import forecast_plan
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import Session, attach, compute_all
from hasten.accelerators.caching.trace import Trace
from hasten.pipelines.accelerated import ComputeAll
from tests.accelerators.caching.toys import WIDTH, Affine, Dual, InPlace, Scratch, Toy, Two, chain, randn
from tests.families import FAMILIES, PIPELINES, run


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def plan_of(rows: list[str], trace: Trace) -> Plan:
    """A plan from rows of '#' (compute) and '.' (reuse)."""
    return Plan(np.array([[int(cell == ".") for cell in row] for row in rows]), trace.sites)


def steps(
    denoiser: nn.Module, method: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], **options: Any
) -> tuple[list[Tensor], Session]:
    """The outputs of one call a step."""
    outputs = []
    with attach(denoiser, method, num_inference_steps=len(calls), **options) as session:
        for i, (args, kwargs) in enumerate(calls):
            with session.step(i):
                out = denoiser(*args, **kwargs)
            outputs.append(out if isinstance(out, Tensor) else out[0])
    return outputs, session


# ------------------------------------------------------------------------------------------------------- bit-identical


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("force_store", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_computing_everything_is_bit_identical(name: str, force_store: bool, inference: bool) -> None:
    model, inputs = FAMILIES[name]()
    with torch.inference_mode(inference):
        plain = [model(**inputs(seed))[0] for seed in range(3)]
        made, session = steps(model, ComputeAll(), [((), inputs(seed)) for seed in range(3)], force_store=force_store)
    assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    assert not session.report.reasons and not session.report.warnings
    assert (session.report.state_bytes_peak > 0) is force_store


@pytest.mark.parametrize("force_store", [False, True])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_bit_identical_when_everything_is_computed(name: str, force_store: bool) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)
    fast = hasten.accelerate(pipe, ComputeAll(), force_store=force_store)
    assert torch.equal(run(fast, call), plain)
    assert torch.equal(run(fast, call), plain)
    assert torch.equal(run(pipe, call), plain)
    assert not fast.report.reasons and not fast.report.warnings
    assert fast.report.computed_fraction == 1.0


# ---------------------------------------------------------------------------------------------------- identical inputs

SETTINGS = [
    hasten.DeltaDiT(interval=2, cached=1.0),
    hasten.DeltaDiT(interval=3, cached=0.5, boundary=0.5),
    hasten.DeltaDiT(interval=2, cached=1, placement=1),
    hasten.DeltaDiT(interval=6, cached=0.75, boundary=2),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("method", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_input_at_every_step_gives_the_same_output(name: str, method: hasten.DeltaDiT, inference: bool) -> None:
    model, inputs = FAMILIES[name]()
    with torch.inference_mode(inference):
        plain = model(**inputs(1))[0]
        made, session = steps(model, method, [((), inputs(1))] * 6)
    for out in made:
        torch.testing.assert_close(out, plain, rtol=0, atol=2e-5)
    assert not session.report.reasons
    assert session.report.plan is not None and session.report.planned is not None
    assert np.array_equal(session.report.plan.actions, session.report.planned.actions)
    assert session.report.computed_fraction < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_reused_steps_really_skip_the_blocks(name: str) -> None:
    model, inputs = FAMILIES[name]()
    _, session = steps(model, hasten.DeltaDiT(interval=2, cached=1.0), [((), inputs(1))] * 2)
    assert session.trace is not None
    counts = dict.fromkeys(session.trace.sites, 0)
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: counts.__setitem__(path, counts[path] + 1)) for path in counts
    ]
    steps(model, hasten.DeltaDiT(interval=2, cached=1.0), [((), inputs(s)) for s in range(4)], trace=session.trace)
    for hook in hooks:
        hook.remove()
    assert set(counts.values()) == {2}


# --------------------------------------------------------------------------------------------------- followed by hand


def by_hand(toy: Toy, x: Tensor, t: float, kept: dict[int, Tensor], reused: set[int]) -> Tensor:
    """A forward of `Toy`, with the blocks in `reused` standing for the sum of their own kept offsets."""
    x = x * (1.0 + 0.1 * t)
    for i, block in enumerate(toy.blocks):
        assert isinstance(block, Affine)
        if i and toy.between is not None:
            x = toy.between(i, x, t)
        if i in reused:
            x = x + kept[i]
        else:
            kept[i] = block.offset(x)
            x = x + kept[i]
    return x * 2.0


PATTERNS = [
    ["#####", "##...", "##...", "#####", "..###", "#####", "....."],
    ["#####", ".....", ".....", "....."],
    ["#####", "#.#.#", ".#.#.", "##...", "..##.", "....."],
    ["#####", "##...", "#####", "...##", "...##"],
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [Affine, InPlace, Scratch])
@pytest.mark.parametrize("rows", PATTERNS, ids="/".join)
def test_delta_dit_by_hand(rows: list[str], kind: type[Affine], inference: bool) -> None:
    toy = chain(5, kind)
    with torch.inference_mode(inference):
        calls = [((randn(k, 2, 3, WIDTH), float(k)), {}) for k in range(len(rows))]
        trace = hasten.trace(toy, *calls[0][0])
        made, session = steps(toy, plan_of(rows, trace), calls, trace=trace)
        kept: dict[int, Tensor] = {}
        for row, out, (args, _) in zip(rows, made, calls, strict=True):
            expected = by_hand(toy, *args, kept, {i for i, cell in enumerate(row) if cell == "."})
            torch.testing.assert_close(out, expected, rtol=0, atol=4e-6)
    assert not session.report.reasons


def test_one_span_is_exactly_output_minus_input() -> None:
    """x += D, with D the difference of the very tensors: not one rounding more."""
    toy = chain(4)
    x0, x1 = randn(0, 2, 3, WIDTH), randn(1, 2, 3, WIDTH)
    trace = hasten.trace(toy, x0)
    made, _ = steps(toy, plan_of(["####", "#..#"], trace), [((x0,), {}), ((x1,), {})])
    first = toy.blocks[0](x0 * 1.0)
    offset = toy.blocks[2](toy.blocks[1](first)) - first
    assert torch.equal(made[1], toy.blocks[3](toy.blocks[0](x1 * 1.0) + offset) * 2.0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [Affine, InPlace, Scratch])
def test_what_the_model_adds_between_blocks_is_neither_frozen_nor_doubled(kind: type[Affine], inference: bool) -> None:
    hints = randn(60, 5, 2, 3, WIDTH)
    toy = Toy([kind(s) for s in range(5)], between=lambda i, x, t: x + hints[i] * (1 + t))
    rows = ["#####", ".....", "##...", "#####", "...##", "....."]
    with torch.inference_mode(inference):
        calls = [((randn(k, 2, 3, WIDTH), float(k)), {}) for k in range(len(rows))]
        trace = hasten.trace(toy, *calls[0][0])
        assert len(trace.chains) == 1
        made, session = steps(toy, plan_of(rows, trace), calls, trace=trace)
        kept: dict[int, Tensor] = {}
        for row, out, (args, _) in zip(rows, made, calls, strict=True):
            expected = by_hand(toy, *args, kept, {i for i, cell in enumerate(row) if cell == "."})
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert not session.report.reasons


@pytest.mark.parametrize("late", [False, True], ids=["seen by the trace", "only later"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [Affine, InPlace])
def test_additions_in_place_between_blocks(kind: type[Affine], inference: bool, late: bool) -> None:
    """`x += hint` keeps the tensor's identity. Offsets that cannot be told are not stored; nothing is ever wrong."""
    hints = randn(60, 5, 2, 3, WIDTH)
    adding = not late
    toy = Toy([kind(s) for s in range(5)], between=lambda i, x, t: x.add_(hints[i] * (1 + t)) if adding else x)
    rows = ["#####", ".....", "##...", "....."]
    with torch.inference_mode(inference):
        calls = [((randn(k, 2, 3, WIDTH), float(k)), {}) for k in range(len(rows))]
        trace = hasten.trace(toy, *calls[0][0])
        assert len(trace.chains) == (1 if late else 5)
        adding = True
        made, session = steps(toy, plan_of(rows, trace), calls, trace=trace)
        kept: dict[int, Tensor] = {}
        executed = session.report.plan
        assert executed is not None
        for k, (out, (args, _)) in enumerate(zip(made, calls, strict=True)):
            # Held against what was really carried out: in doubt blocks are computed, and the report says so.
            expected = by_hand(toy, *args, kept, set(np.flatnonzero(executed.actions[k, :, 0])))
            torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    if not late:
        assert not session.report.reasons
    elif not inference:
        assert any("changes the stream in place" in reason for reason in session.report.reasons)
        assert executed.computed_fraction == 1.0


def test_a_block_called_for_its_effect_alone() -> None:
    """The model ignores what the block returns and goes on with the tensor that the block changed."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([InPlace(s) for s in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            for block in self.blocks:
                block(x)
            return x

    net = Net()
    x = randn(1, 2, 3, WIDTH)
    plain = net(x)
    made, session = steps(net, hasten.DeltaDiT(interval=2, cached=0.75), [((x,), {})] * 4)
    assert session.report.computed_fraction < 1 and not session.report.reasons
    for out in made:
        torch.testing.assert_close(out, plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize("form", [tuple, list])
def test_two_streams_by_hand(form: Callable[[list[Tensor]], Any]) -> None:
    net = Dual([Two(s, form) for s in range(4)])
    calls = [((randn(k, 2, 3, WIDTH), randn(9, 2, 5, WIDTH)), {}) for k in range(2)]
    trace = hasten.trace(net, *calls[0][0])
    made, session = steps(net, plan_of(["####", "#..#"], trace), calls, trace=trace)

    def forward(x: Tensor, text: Tensor, offsets: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = x * 1.5
        text, x = net.blocks[0](x, text)
        before = text, x
        if offsets is None:
            for block in (net.blocks[1], net.blocks[2]):
                text, x = block(x, text)
        else:
            text, x = text + offsets[0], x + offsets[1]
        offsets = text - before[0], x - before[1]
        text, x = net.blocks[3](x, text)
        return x, offsets

    first, offsets = forward(*calls[0][0], None)
    assert torch.equal(made[0], first)
    assert torch.equal(made[1], forward(*calls[1][0], offsets)[0])
    assert not session.report.reasons


@pytest.mark.parametrize("form", ["tuple", "list"])
def test_tuples_and_lists_come_back_as_they_were(form: str) -> None:
    toy = chain(3, form=form)
    kinds: list[type] = []

    class Watching(Toy):
        def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
            for block in self.blocks:
                out = block(x)
                kinds.append(type(out))
                x = out[0]
            return x

    net = Watching(list(toy.blocks))
    steps(net, hasten.DeltaDiT(interval=2, cached=1.0), [((randn(1, 2, 3, WIDTH),), {})] * 2)
    assert {kind.__name__ for kind in kinds} == {form}


def test_kept_outputs_are_right_on_reused_steps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Affine(s) for s in range(5)])

        def forward(self, x: Tensor) -> Tensor:
            x, features = x * 2, []
            for block in self.blocks:
                x = block(x)
                features.append(x)
            return x + features[1] + features[3]

    net, x = Net(), randn(1, 2, 3, WIDTH)
    made, _ = steps(net, hasten.DeltaDiT(interval=2, cached=1.0), [((x,), {})] * 2)
    torch.testing.assert_close(made[1], net(x), rtol=0, atol=4e-6)


# ----------------------------------------------------------------------------------------------------------- ControlNet


def residuals(seed: int, blocks: int) -> list[Tensor]:
    return [randn(seed + i, 2, 16, 32) for i in range(blocks)]


SPANS = {"all": "." * 7, "dual only": "...####", "single only": "###....", "inside": "#.....#"}


@pytest.mark.parametrize("control", ["none", "dual", "dual and single"])
@pytest.mark.parametrize("span", SPANS)
def test_control_residuals_act_live(span: str, control: str) -> None:
    model, inputs = FAMILIES["flux"]()

    def call(seed: int, x: int = 1) -> dict[str, Any]:
        given = inputs(x)
        if control != "none":
            given["controlnet_block_samples"] = residuals(seed, 3)
        if control == "dual and single":
            given["controlnet_single_block_samples"] = residuals(seed + 50, 2)
        return given

    trace = hasten.trace(model, **inputs(1))
    plan = plan_of(["#" * 7, SPANS[span]], trace)
    plain = model(**call(200))[0]
    made, session = steps(model, plan, [((), call(200)), ((), call(200))], trace=trace)
    assert torch.equal(made[0], plain)
    torch.testing.assert_close(made[1], plain, rtol=0, atol=2e-6)
    assert not session.report.reasons
    # Other residuals at the second step act, as far as a block that is computed can be asked: where everything is reused, the
    # residuals are still added at their places.
    if control != "none":
        made, _ = steps(model, plan, [((), call(200)), ((), call(300))], trace=trace)
        assert (made[1] - plain).abs().max() > 0.05


@pytest.mark.parametrize(
    "method",
    [hasten.FORA(interval=2), hasten.FirstBlock(threshold=1e9, warmup=1), hasten.TeaCache(threshold=1e9), hasten.Forecast(order=1)],
)
def test_control_residuals_are_neither_frozen_nor_doubled_by_other_methods(method: Any) -> None:
    """The same input at every step: what is reused or forecast is what would be computed."""
    model, inputs = FAMILIES["flux"]()
    call = {**inputs(1), "controlnet_block_samples": residuals(200, 3), "controlnet_single_block_samples": residuals(250, 2)}
    plain = model(**call)[0]
    made, session = steps(model, method, [((), call)] * 6)
    assert session.report.computed_fraction < 0.9
    for out in made:
        torch.testing.assert_close(out, plain, rtol=0, atol=4e-6)


def test_changed_control_residuals_by_hand() -> None:
    """Everything reused: the stream before the last layer is the embedded latents, plus offsets of step 0, plus residuals of step 1."""
    model, inputs = FAMILIES["flux"]()
    seen: list[Tensor] = []
    hook = model.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trace = hasten.trace(model, **inputs(1))
    seen.clear()
    old, new = residuals(200, 3), residuals(300, 3)
    steps(
        model,
        plan_of(["#" * 7, "." * 7], trace),
        [((), {**inputs(1), "controlnet_block_samples": old}), ((), {**inputs(1), "controlnet_block_samples": new})],
        trace=trace,
    )
    hook.remove()
    torch.testing.assert_close(seen[1], seen[0] + sum(new) - sum(old), rtol=0, atol=1e-5)


def test_a_trace_with_control_residuals_serves_runs_without_them() -> None:
    model, inputs = FAMILIES["flux"]()
    trace = hasten.trace(model, **inputs(1), controlnet_block_samples=residuals(200, 3))
    assert {b.gap for b in trace.blocks[1:]} == {"added", "linked"}
    plan = plan_of(["#" * 7, "#.....#"], trace)
    made, _ = steps(model, plan, [((), inputs(1))] * 2, trace=trace)
    torch.testing.assert_close(made[1], model(**inputs(1))[0], rtol=0, atol=2e-6)


# -------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("name", PIPELINES)
def test_an_executed_plan_replays_to_the_same_bits(name: str, tmp_path: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, hasten.DeltaDiT(interval=2, cached=0.6))
    made = run(fast, call)
    assert not torch.equal(made, run(pipe, call))
    executed = fast.report.plan
    executed.save(tmp_path / "plan.safetensors")
    replay = hasten.accelerate(pipe, Plan.load(tmp_path / "plan.safetensors"))
    assert torch.equal(run(replay, call), made)
    assert replay.report.plan == executed
    assert not replay.report.reasons and not replay.report.warnings


def test_delta_dit_makes_the_plan_of_the_paper() -> None:
    trace = hasten.trace(chain(8), randn(1, 2, 3, WIDTH))
    plan = hasten.DeltaDiT(interval=2, cached=6, boundary=3).plan(trace, 7)
    rows = str(plan).splitlines()[2:9]
    assert [row.split()[1] for row in rows] == ["#" * 8, "##......", "#" * 8, "##......", "#" * 8, "......##", "#" * 8]
    assert compute_all(trace, 3).computed_fraction == 1.0


# -------------------------------------------------------------------------------------------------------------- forecast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_follows_offsets_that_move_as_its_polynomial(order: int, dtype: torch.dtype) -> None:
    """Each block adds a polynomial of the time: forecasts of at least its degree are exact, of a lower one are not."""

    class Adds(nn.Module):
        def __init__(self, degree: int) -> None:
            super().__init__()
            self.degree = degree

        def forward(self, x: Tensor, t: float) -> Tensor:
            return x + 0.25 * t**self.degree

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Adds(0), Adds(1), Adds(order)])

        def forward(self, x: Tensor, t: float) -> Tensor:
            for block in self.blocks:
                x = block(x, t)
            return x

    net, times = Net(), [8.0, 6.0, 5.0, 4.0, 2.0, 1.0]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((torch.zeros(1, 3, WIDTH, dtype=dtype), t), {}) for t in times]
    trace = hasten.trace(net, *calls[0][0])
    computed = [True, True, True, False, True, False]
    outputs = []
    with attach(net, forecast_plan(trace, computed, order=max(order, 1), method="test"), num_inference_steps=6, trace=trace) as session:
        session.facts["sigmas"] = [t / 8 for t in times]
        for k, (args, _) in enumerate(calls):
            with session.step(k):
                outputs.append(net(*args))
    for k, ((x, t), _) in enumerate(calls):
        torch.testing.assert_close(outputs[k], net(x, t), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert session.report.plan is not None
    assert [Action(a).name for a in session.report.plan.actions[:, 0, 0]] == [
        "COMPUTE" if c else "FORECAST" for c in computed
    ]  # fmt: skip
    assert session.report.state_bytes_peak == (max(order, 1) + 1) * calls[0][0][0].nbytes, "one summed offset for each node"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forecast_of_unchanged_inputs_changes_nothing(name: str) -> None:
    """The polynomial through equal values is that value: the same call again gives the same output."""
    model, inputs = FAMILIES[name]()
    trace = hasten.trace(model, **inputs(0))
    plan = forecast_plan(trace, [True, True, True, False], order=2, method="test")
    outputs, session = steps(model, plan, [((), inputs(0)) for _ in range(4)], trace=trace)
    torch.testing.assert_close(outputs[3], outputs[0], rtol=1e-4, atol=1e-5)
    assert not session.report.reasons
    replayed, _ = steps(model, session.report.plan, [((), inputs(0)) for _ in range(4)], trace=trace)
    assert torch.equal(replayed[3], outputs[3])
