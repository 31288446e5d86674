"""What a run says about itself, and what the wrapper promises to the user."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.plan import Plan, PlanError
from hasten.accelerators.caching.runtime import Session, attach
from hasten.accelerators.caching.segments import program, state_bytes
from hasten.accelerators.caching.trace import TraceError
from hasten.pipelines.accelerated import ComputeAll, parse_bytes
from tests.accelerators.caching.toys import WIDTH, Guided, InPlace, Loop, chain, guided, randn
from tests.families import FAMILIES, PIPELINES, flux_pipeline, pixart_pipeline, run, sd3_pipeline, wan_pipeline

DELTA = hasten.DeltaDiT(interval=2, cached=0.6)
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------- report


@every_pipeline
def test_the_executed_plan_carries_the_facts_of_the_run(name: str) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, DELTA)
    run(fast, call)
    facts = fast.report.plan.facts
    assert facts["model"] == type(pipe.transformer).__name__
    assert facts["config"] == fast.trace.config_hash
    assert facts["scheduler"] == type(pipe.scheduler).__name__
    assert facts["order"] == 1 and facts["steps"] == 6
    assert facts["dtype"] == "float32"
    assert facts["resolution"] == list(call["latents"].shape[1:])
    assert facts["method"] == str(DELTA)
    assert len(facts["sigmas"]) == 6 and sorted(facts["sigmas"], reverse=True) == facts["sigmas"]
    assert facts["guidance"] in ("single", "batched x2", "2 calls")


@every_pipeline
def test_the_report(name: str) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, DELTA)
    assert str(fast.report) == "nothing was run" and fast.trace is None
    run(fast, call)
    report = fast.report
    assert len(report.step_seconds) == 6 and min(report.step_seconds) > 0
    assert sum(report.step_seconds) <= report.seconds <= report.call_seconds
    assert report.computed_fraction == report.plan.computed_fraction == pytest.approx(report.planned.computed_fraction)
    assert 1 < report.bound == report.plan.speedup_bound(report.trace)
    assert report.speedup is None and report.baseline_seconds is None
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{DELTA}: 6 steps, {len(report.plan.sites)} sites")
    for k, line in enumerate(lines[3:9]):
        cells = ["".join("#."[a] for a in report.plan.actions[k, :, b]) for b in range(len(report.plan.branches))]
        assert line.startswith(f"{k:4d} ") and line.endswith("  ".join(cells))
    data = json.loads(json.dumps(report.to_json()))
    assert data["plan_hash"] == report.plan.hash and data["steps"] == 6 and data["reasons"] == {}


@every_pipeline
def test_state_is_freed_and_its_size_is_known_before(name: str) -> None:
    pipe, call = PIPELINES[name]()
    method = hasten.DeltaDiT(interval=3, cached=0.5)
    explained = hasten.explain(pipe, method, **call)
    fast = hasten.accelerate(pipe, method)
    run(fast, call)
    branches = len(fast.report.plan.branches)
    assert explained.state_bytes > 0
    assert fast.report.state_bytes_peak == explained.state_bytes * branches
    rows, _ = program(fast.trace, fast.report.planned.branch("*"))
    assert state_bytes(fast.trace, rows) == explained.state_bytes


def test_nothing_is_held_after_a_run() -> None:
    net, cond = guided(), randn(2, 2, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=4, cached=1.0), num_inference_steps=3) as session:
        for k in range(3):
            with session.step(k):
                net(randn(k, 2, 3, WIDTH), float(k), cond)
        assert [branch.bytes for branch in session._branches.values()] == [2 * 3 * WIDTH * 4]
    assert session._branches == {} and session.branches == ()
    assert session.report.state_bytes_peak == 2 * 3 * WIDTH * 4
    assert all("_compiled_call_impl" not in module.__dict__ for module in net.modules())


def test_values_are_released_after_their_last_use() -> None:
    net, cond = guided(), randn(2, 2, 3, WIDTH)
    trace = hasten.trace(net, randn(1, 2, 3, WIDTH), 0.0, cond)
    actions = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    held = []
    with attach(net, Plan(actions, trace.sites), num_inference_steps=4, trace=trace) as session:
        for k in range(4):
            with session.step(k):
                held.append([sorted(branch.values) for branch in session._branches.values()])
                net(randn(k, 2, 3, WIDTH), float(k), cond)
    assert held == [[], [[(0, 2, 0)]], [[]], [[(2, 4, 2)]]]


def test_reasons_name_the_blocks_and_are_counted() -> None:
    net, cond = guided(), randn(2, 2, 3, WIDTH)
    trace = hasten.trace(net, randn(1, 2, 3, WIDTH), 0.0, cond)
    actions = np.array([[1, 0, 0, 0], [1, 1, 1, 0]])
    with attach(net, Plan(actions, trace.sites), num_inference_steps=2, trace=trace) as session, session.step(1):
        net(randn(1, 2, 3, WIDTH), 1.0, cond)
    reasons = dict(session.report.reasons)
    assert reasons == {
        "step 0, blocks.0: computed, since it was never computed before": 1,
        "blocks.0 to blocks.2: nothing is stored for it yet": 1,
    }
    text = str(session.report)
    assert "not reused: blocks.0 to blocks.2: nothing is stored for it yet" in text


def test_a_measured_speedup_needs_a_baseline_of_the_same_run() -> None:
    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    plain = run(pipe, call)
    torch.manual_seed(0)
    assert torch.equal(fast.baseline(**call)[0], plain)
    assert fast.report.computed_fraction == 1.0
    run(fast, call)
    assert fast.report.speedup == fast.report.baseline_seconds / fast.report.seconds
    assert "x measured" in str(fast.report)
    for other in (
        {"num_inference_steps": 5},
        {"guidance_scale": 1.0},
        {"latents": call["latents"][..., :4, :4], "height": 32, "width": 32},
    ):
        run(fast, call, **other)
        assert fast.report.speedup is None
    run(fast, call)
    assert fast.report.speedup is not None


def test_a_denoiser_that_is_never_called() -> None:
    from diffusers import DDIMScheduler

    loop = Loop(guided(), DDIMScheduler(), guided(seed=9))
    fast = hasten.accelerate(loop, DELTA)
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)]}
    fast(**call)
    assert list(fast.reports) == ["transformer"]
    fast(**call, handover=3)
    assert list(fast.reports) == ["transformer", "transformer_2"]
    fast(**call)
    assert list(fast.reports) == ["transformer"]
    with pytest.raises(TraceError, match="finished without calling transformer"):
        hasten.trace(loop, **{**call, "begin": 6})
    fast(**call, begin=6)
    assert fast.reports == {} and fast.report.plan is None and fast.report.computed_fraction == 1.0
    assert str(fast.report) == "nothing was run" and fast.report.to_json()["steps"] == 0


# --------------------------------------------------------------------------------------------------------------- budget


def test_a_budget_refuses_before_anything_is_stored() -> None:
    pipe, call = sd3_pipeline()
    needed = hasten.explain(pipe, DELTA, **call).state_bytes
    assert torch.equal(run(hasten.accelerate(pipe, DELTA, state_budget=needed), call), run(hasten.accelerate(pipe, DELTA), call))
    refusing = hasten.accelerate(pipe, DELTA, state_budget=needed - 1)
    with pytest.raises(PlanError, match="more than state_budget="):
        run(refusing, call)
    assert refusing.report.state_bytes_peak == 0 and refusing.report.step_seconds == []
    assert "_compiled_call_impl" not in pipe.transformer.__dict__
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll(), state_budget=0), call), run(pipe, call))
    with pytest.raises(PlanError, match="state_budget"):
        run(hasten.accelerate(pipe, ComputeAll(), state_budget=needed, force_store=True), call)


def test_a_budget_counts_every_guidance_branch() -> None:
    pipe, call = wan_pipeline()
    method = hasten.DeltaDiT(interval=2, cached=1.0)
    needed = hasten.explain(pipe, method, **call).state_bytes
    run(hasten.accelerate(pipe, method, state_budget=2 * needed), call)
    refusing = hasten.accelerate(pipe, method, state_budget=2 * needed - 1)
    with pytest.raises(PlanError, match="state_budget"):
        run(refusing, call)
    # In the first step, when the second branch appears, and before that one stores anything.
    assert len(refusing.report.step_seconds) == 1 and refusing.report.state_bytes_peak == needed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (None, None),
        (5, 5),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        ("7", 7),
        ("3 b", 3),
        ("1k", 1000),
        ("2 tib", 2 << 40),
    ],
)
def test_budgets_as_text(text: Any, value: int | None) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "two", "2 GiBs", "-1", "1.2.3"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="state_budget must be"):
        hasten.accelerate(pixart_pipeline()[0], DELTA, state_budget=text)


# -------------------------------------------------------------------------------------------------------------- reindex


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("index", [[2, 2, 0, 1], [3, 2, 1, 0], [1, 3], [0, 1, 2, 3, 0, 0]])
def test_reindex(index: list[int], inference: bool) -> None:
    """Rows of the cached state follow the particles: as if the new batch had been run from the start."""
    net = guided()
    conds = [randn(70 + b, 4, 3, WIDTH) for b in range(2)]
    x = randn(1, 4, 4, 3, WIDTH)
    method = hasten.DeltaDiT(interval=4, cached=0.75)
    with torch.inference_mode(inference):
        trace = hasten.trace(net, x[0], 0.0, conds[0])
        outputs: list[list[Tensor]] = [[], []]
        for which, rows in enumerate(([0, 1, 2, 3], index)):
            with attach(net, method, num_inference_steps=4, trace=trace) as session:
                for k in range(4):
                    given = list(range(4)) if k < 2 else rows
                    if k == 2:
                        session.reindex(torch.tensor(rows) if which else rows)
                    with session.step(k):
                        for cond in conds:
                            outputs[which].append(net(x[k][given], float(k), cond[given]))
            assert not session.report.reasons
            assert session.report.computed_fraction < 1
    for k in range(8):
        expected = outputs[0][k] if k < 4 else outputs[0][k][index]
        assert torch.equal(outputs[1][k], expected)


def test_reindex_where_the_conditioning_stays() -> None:
    """A pipeline that does not permute its prompts (they are all the same) is recognised as well."""
    net, cond, x = guided(), randn(2, 1, 3, WIDTH).expand(4, -1, -1), randn(1, 4, 4, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=4, cached=1.0), num_inference_steps=4) as session:
        for k in range(4):
            if k == 2:
                session.reindex([3, 2, 1, 0])
            with session.step(k):
                net(x[k], float(k), cond)
    assert not session.report.reasons
    assert session.report.computed_fraction == 0.25


# ------------------------------------------------------------------------------------------------------------- the wrapper


@every_pipeline
def test_on_and_off(name: str) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)
    fast = hasten.accelerate(pipe, DELTA)
    made = run(fast, call)
    assert not torch.equal(made, plain)
    with fast.paused() as same:
        assert same is fast
        assert torch.equal(run(fast, call), plain)
        with fast.paused():
            pass
        assert torch.equal(run(fast, call), plain)
    assert torch.equal(run(fast, call), made)
    assert fast.enabled(False) is fast
    assert torch.equal(run(fast, call), plain)
    with fast.paused():
        pass
    assert torch.equal(run(fast, call), plain)
    assert torch.equal(run(fast.enabled(), call), made)


def test_everything_else_is_the_pipelines() -> None:
    from diffusers import EulerDiscreteScheduler

    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    assert fast.pipe is pipe and fast.transformer is pipe.transformer and fast.components.keys() == pipe.components.keys()
    scheduler = EulerDiscreteScheduler()
    fast.scheduler = scheduler
    assert pipe.scheduler is scheduler
    run(fast, call)
    assert fast.report.plan.facts["scheduler"] == "EulerDiscreteScheduler"
    assert type(scheduler) is EulerDiscreteScheduler
    assert fast.to("cpu") is fast
    assert inspect.signature(fast) == inspect.signature(pipe.__call__)
    assert "PixArtAlphaPipeline" in repr(fast) and "delta-dit" in repr(fast)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing
    fast.method = ComputeAll()
    assert torch.equal(run(fast, call), run(pipe, call))
    assert "method" not in pipe.__dict__


def test_the_output_type_is_the_pipelines() -> None:
    pipe, call = sd3_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    assert type(fast(**{**call, "return_dict": True})) is type(pipe(**{**call, "return_dict": True}))


def test_what_accelerate_refuses() -> None:
    pipe, _ = pixart_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    with pytest.raises(ValueError, match="accelerated already"):
        hasten.accelerate(fast, DELTA)
    with pytest.raises(ValueError, match="method must be a caching method"):
        hasten.accelerate(pipe, 3)
    with pytest.raises(ValueError, match="nan_check must be 'auto', 'sync' or 'off', not 'never'"):
        hasten.accelerate(pipe, DELTA, nan_check="never")
    with pytest.raises(ValueError, match=r"no denoiser 'unet'.*transformer"):
        hasten.accelerate(pipe, DELTA, denoiser="unet")
    with pytest.raises(ValueError, match="none of transformer, unet"):
        hasten.accelerate(object(), DELTA)
    pipe.scheduler = None
    with pytest.raises(ValueError, match="no scheduler"):
        hasten.accelerate(pipe, DELTA)


def test_saving_the_pipeline_saves_the_plain_one(tmp_path: Any) -> None:
    from diffusers import FluxTransformer2DModel

    pipe, call = flux_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    expected = run(fast, call)
    fast.transformer.save_pretrained(tmp_path / "transformer")
    fast.scheduler.save_pretrained(tmp_path / "scheduler")
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    fast.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert torch.equal(run(fast, call), expected)


# ---------------------------------------------------------------------------------------------------------- the default


def test_the_default_says_what_it_expects_once(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe)
    torch.manual_seed(0)
    fast.baseline(**call)
    assert capsys.readouterr().err == ""
    run(fast, call, num_inference_steps=12)
    message = capsys.readouterr().err
    fraction = 100 * fast.report.computed_fraction
    assert fraction < 100
    assert message == f"hasten: {fast.report.plan.facts['method']}; {fraction:.0f}% computed, at most {fast.report.bound:.2f}x faster\n"
    assert not fast.report.plan.actions[:3].any()
    run(fast, call, num_inference_steps=12)
    assert capsys.readouterr().err == ""
    run(hasten.accelerate(pipe, DELTA), call)
    assert capsys.readouterr().err == ""


def test_the_default_leaves_few_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe)
    assert torch.equal(run(fast, call, num_inference_steps=4), run(pipe, call, num_inference_steps=4))
    assert "4 steps are too few" in capsys.readouterr().err


def test_the_default_on_a_model_without_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import DDIMScheduler

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
            return self.only(x + cond)

    loop = Loop(Single(), DDIMScheduler())
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)], "num_inference_steps": 10}
    fast = hasten.accelerate(loop)
    assert torch.equal(fast(**call), loop(**call))
    assert "no block of this model can be cached" in capsys.readouterr().err
    assert fast.report.computed_fraction == 1.0
    assert "0 sites" in str(fast.report)


# --------------------------------------------------------------------------------------------------------------- explain


@every_pipeline
def test_explain(name: str) -> None:
    pipe, call = PIPELINES[name]()
    before = run(pipe, call)
    explained = hasten.explain(pipe, DELTA, **call)
    assert "_compiled_call_impl" not in pipe.transformer.__dict__ and "_hasten_hook" not in type(pipe.scheduler).__dict__
    assert torch.equal(run(pipe, call), before)
    fast = hasten.accelerate(pipe, DELTA)
    run(fast, call)
    assert np.array_equal(explained.plan.actions, fast.report.planned.actions)
    text = str(explained)
    assert str(explained.plan) in text and explained.trace.model in text
    assert "speed-up of the denoiser loop at most" in text and "per guidance branch" in text
    data = json.loads(json.dumps(explained.to_json()))
    assert data["steps"] == 6 and data["method"] == str(DELTA) and data["computed_fraction"] == explained.plan.computed_fraction
    if name == "lumina2":
        assert "not cached: context_refiner.0: does not depend on the latents" in text


def test_explain_says_why_nothing_is_cached() -> None:
    pipe, call = pixart_pipeline()
    explained = hasten.explain(pipe, None, **{**call, "num_inference_steps": 4})
    assert explained.reasons == ("nothing is reused in 4 steps (none: 4 steps are too few to reuse anything (at least 8))",)
    assert explained.state_bytes == 0
    fast = hasten.accelerate(pipe, DELTA)
    assert np.array_equal(hasten.explain(fast, **call).plan.actions, DELTA.plan(explained.trace, 6).actions)
    run(fast, call)
    with pytest.raises(PlanError, match="the plan has 6 steps, this run has 5"):
        hasten.explain(pipe, fast.report.plan, **{**call, "num_inference_steps": 5})


def test_trace_of_a_pipeline_is_the_trace_of_its_run() -> None:
    pipe, call = wan_pipeline()
    fast = hasten.accelerate(pipe, DELTA)
    run(fast, call)
    for target in (pipe, fast):
        trace = hasten.trace(target, **call)
        assert trace.sites == fast.trace.sites and trace.resolution == fast.trace.resolution


# ---------------------------------------------------------------------------------------------------------------- attach


def test_a_loop_of_ones_own() -> None:
    model, inputs = FAMILIES["pixart"]()
    given = [inputs(seed) for seed in range(6)]
    with attach(model, hasten.DeltaDiT(interval=3, cached=0.5, boundary=0.0), num_inference_steps=6) as session:
        for k in range(6):
            with session.step(k):
                model(**given[k])
    report = session.report
    assert report.plan.steps == 6 and report.plan.facts["model"] == "PixArtTransformer2DModel"
    rows = ["".join("#."[a] for a in row) for row in report.plan.actions[:, :, 0]]
    assert rows == ["######", "###...", "###..."] * 2
    with pytest.raises(ValueError, match="step must be from 0 to 5, not 6"), session.step(6):
        pass
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, not 0"):
        attach(model, DELTA, num_inference_steps=0)
    with pytest.raises(ValueError, match="nan_check"):
        attach(model, DELTA, num_inference_steps=1, nan_check="maybe")


def test_calls_of_other_shapes_are_traced_anew() -> None:
    net = guided()
    for shape in ((2, 3, WIDTH), (1, 5, WIDTH)):
        trace = hasten.trace(net, randn(1, 2, 3, WIDTH), 0.0, randn(2, 2, 3, WIDTH))
        with attach(net, hasten.DeltaDiT(interval=2, cached=1.0), num_inference_steps=2, trace=trace) as session:
            for k in range(2):
                with session.step(k):
                    net(randn(k, *shape), float(k), randn(2, *shape))
        assert session.trace.resolution == shape
        assert (session.trace is trace) is (shape == (2, 3, WIDTH))
        assert session.report.state_bytes_peak == 4 * shape[0] * shape[1] * shape[2]
        assert not session.report.reasons


def test_a_loop_that_fails_leaves_nothing_behind() -> None:
    net = chain(3, InPlace)
    with pytest.raises(ZeroDivisionError), attach(net, DELTA, num_inference_steps=3) as session, session.step(0):
        net(randn(1, 2, 3, WIDTH))
        _ = 1 / 0
    assert all("_compiled_call_impl" not in module.__dict__ for module in net.modules())
    assert isinstance(session, Session) and session._branches == {}
    with session:  # the same session serves another run
        for k in range(3):
            with session.step(k):
                net(randn(1, 2, 3, WIDTH))
    assert session.report.computed_fraction < 1 and not session.report.warnings


def test_a_denoiser_that_calls_itself_is_one_call() -> None:
    class Refining(Guided):
        depth = 0

        def forward(self, x: Tensor, timestep: Any, cond: Tensor, scale: float = 1.0) -> Tensor:
            if self.depth == 0:
                self.depth = 1
                try:
                    return self(x, timestep, cond) + x
                finally:
                    self.depth = 0
            return super().forward(x, timestep, cond, scale)

    net = Refining(list(guided().blocks))
    x, cond = randn(1, 2, 3, WIDTH), randn(2, 2, 3, WIDTH)
    plain = net(x, 0.0, cond)
    with attach(net, hasten.DeltaDiT(interval=2, cached=1.0), num_inference_steps=2) as session:
        for k in range(2):
            with session.step(k):
                torch.testing.assert_close(net(x, float(k), cond), plain, rtol=0, atol=4e-6)
    assert session.report.plan.branches == ("branch0",) and not session.report.reasons
