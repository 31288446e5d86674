"""Skipped guidance branches: by hand, in both layouts of guidance, and together with other methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.compose import CONFLICTS, Composed, aligned
from hasten.accelerators.caching.guidance import Guidance, combined, rows_of, separable
from hasten.accelerators.caching.plan import GUIDANCE, Action, Plan, PlanError
from hasten.pipelines.accelerated import trace
from tests.accelerators.caching.toys import Affine, randn
from tests.families import pixart, pixart_pipeline, run, wan_pipeline

STEPS = 8
EVERY_SECOND = hasten.SkipGuidance(interval=2, start=1, order=0)


class Net(nn.Module):
    """Blocks in a row, and the conditioning added to what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Affine(1), Affine(2), Affine(3)])
        self.rows: list[int] = []

    def forward(self, x: Tensor, text: Tensor, t: float = 0.0) -> Tensor:
        self.rows.append(len(x))
        for block in self.blocks:
            x = block(x)
        return x + text.mean(1) * (1 + t)


def batched(net: Net, method: Any, steps: int, text: Tensor, strength: float = 0.0) -> tuple[list[Tensor], hasten.RunReport]:
    """Both branches in one call of four rows."""
    outs = []
    net.rows.clear()
    with torch.no_grad(), hasten.attach(net, method, num_inference_steps=steps) as session:
        for i in range(steps):
            x = randn(i, 2, 4)
            with session.step(i):
                outs.append(net(torch.cat([x, x]), text, t=strength * i))
    return outs, session.report


def test_the_column_of_the_plan() -> None:
    made = trace(Net(), randn(0, 4, 4), randn(1, 4, 3, 4))
    plan = hasten.SkipGuidance(interval=3, start=0.25).plan(made, 12)
    assert plan.sites[-1] == GUIDANCE and np.flatnonzero(plan.skips).tolist() == [3, 4, 6, 7, 9, 10]
    assert plan.computed_fraction == pytest.approx(1 - 6 / 12 / 2)
    assert plan.speedup_bound(([1.0, 1.0, 1.0], 0.0)) == pytest.approx(12 / 9)
    assert "- one guidance branch skipped" in str(plan) and "###-" in str(plan)
    plan.plot()
    two = Plan(np.stack([plan.actions[:, :, 0] * 0, plan.actions[:, :, 0]], -1), plan.sites, ("cond", "uncond"))
    assert two.computed_fraction == pytest.approx(0.75) and two.skips.sum() == 6


def test_malformed_guidance_columns() -> None:
    skip = int(Action.SKIP_BRANCH)
    with pytest.raises(PlanError, match="SKIP_BRANCH is said of the site 'guidance' alone"):
        Plan(np.array([[0, 0], [skip, 0]]), ("a", "b"))
    with pytest.raises(PlanError, match="stands last"):
        Plan(np.array([[0, 0], [skip, 0]]), (GUIDANCE, "b"))
    with pytest.raises(PlanError, match="computed or skipped"):
        Plan(np.array([[0, 0], [0, 1]]), ("a", GUIDANCE))


def test_a_batch_is_halved_and_put_back_together() -> None:
    net, text = Net(), randn(50, 4, 3, 4)
    method = hasten.SkipGuidance(interval=2, start=1, order=0, conditional="second")
    made, report = batched(net, method, STEPS, text)
    plain, _ = batched(net, Plan(np.zeros((STEPS, 3), np.uint8), ("blocks.0", "blocks.1", "blocks.2")), STEPS, text)
    # The difference of the branches does not change from step to step here, so nothing is lost.
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert report.plan is not None and report.plan.skips.tolist() == [False, True, False, True, False, True, False, True]
    assert not report.reasons
    batched(net, method, STEPS, text)
    assert net.rows[-STEPS - 1 :] == [4, 2, 2, *[4, 2] * (STEPS // 2 - 1)], "the second call tries whether half can be run alone"
    again, _ = batched(net, report.plan, STEPS, text)
    assert all(torch.equal(a, b) for a, b in zip(again, made, strict=True)), "what was executed replays to the same bits"


def test_a_difference_that_grows_is_extrapolated() -> None:
    net, text = Net(), randn(50, 4, 3, 4)
    plain, _ = batched(net, Plan(np.zeros((STEPS, 3), np.uint8), ("blocks.0", "blocks.1", "blocks.2")), STEPS, text, 0.5)
    errors = []
    for order in (0, 1):
        method = hasten.SkipGuidance(interval=2, start=3, order=order, conditional="first")
        made, _ = batched(net, method, STEPS, text, 0.5)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(made, plain, strict=True)))
    assert errors[0] > 0.05 and errors[1] < 1e-5


def test_without_a_pipeline_the_conditional_half_must_be_named() -> None:
    _, report = batched(Net(), EVERY_SECOND, STEPS, randn(50, 4, 3, 4))
    assert any("which half of the batch is the conditional one" in reason for reason in report.reasons)
    assert report.computed_fraction == 1


@pytest.mark.parametrize("scale", [3.0, 7.5, 0.2])
@pytest.mark.parametrize("order", ["uncond first", "cond first"])
def test_the_conditional_half_is_learned_from_the_guided_output(order: str, scale: float) -> None:
    a, b = randn(1, 2, 8, 3, 3), randn(2, 2, 8, 3, 3)
    uncond, cond = (a, b) if order == "uncond first" else (b, a)
    guided = (uncond + scale * (cond - uncond))[:, :4]  # the other channels are a learned variance
    state = Guidance(np.array([False, True]), None, 0, None)
    state.batched = True
    state.both("branch0", 0, (torch.cat([a, b]),))
    assert state.why_not("branch0") is not None
    state.learn(guided)
    # What weighs more is computed: the conditional half, unless guidance is so weak that it counts for less.
    heavier = (order == "uncond first") == (scale > 0.5)
    assert state.conditional == int(heavier) and state.why_not("branch0") is None


def test_an_output_that_is_no_guidance_is_refused() -> None:
    state = Guidance(np.array([False, True]), None, 0, None)
    state.batched = True
    state.both("branch0", 0, torch.cat([randn(1, 2, 4, 3), randn(2, 2, 4, 3)]))
    state.learn(randn(3, 2, 4, 3))
    assert "no combination of two halves" in (state.reason or "")


def test_rows_that_cannot_run_alone_are_found_out() -> None:
    def by_batch(x: Tensor) -> Tensor:
        return x * len(x)

    def fixed(x: Tensor, table: Tensor) -> Tensor:
        return x + table

    x = randn(0, 4, 3)
    assert "another result" in separable(by_batch, (x,), {}, 4, by_batch(x))
    assert "cannot be run alone" in separable(lambda x: x + torch.ones(4, 3), (x,), {}, 4, x)
    assert separable(fixed, (x, randn(1, 4, 3)), {}, 4, fixed(x, randn(1, 4, 3))) == ""


def test_arguments_and_outputs_keep_their_form() -> None:
    nested = {"a": torch.arange(4), "b": [torch.zeros(4, 2), torch.zeros(3)], "c": 5, "d": torch.tensor(1.0)}
    half = rows_of(nested, 4, slice(2, 4))
    assert half["a"].tolist() == [2, 3] and half["b"][0].shape == (2, 2) and half["b"][1].shape == (3,) and half["c"] == 5
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    out = combined(lambda a, b: a + b, Transformer2DModelOutput(sample=torch.ones(2)), Transformer2DModelOutput(sample=torch.ones(2)))
    assert isinstance(out, Transformer2DModelOutput) and out.sample.tolist() == [2, 2]


# ---------------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("make", [pixart_pipeline, wan_pipeline], ids=["one batch", "two calls"])
def test_pipelines_in_both_layouts(make: Any) -> None:
    pipe, call = make()
    call = {**call, "num_inference_steps": STEPS}
    plain = run(pipe, call)
    rows: list[int] = []
    name = "hidden_states"
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: rows.append(len(k[name] if name in k else a[0])), with_kwargs=True)
    run(pipe, call)
    full = sum(rows)
    fast = hasten.accelerate(pipe, hasten.SkipGuidance(interval=2, start=2))
    first = run(fast, call)
    assert fast.report.plan is not None and fast.report.plan.skips.sum() == 3 and not fast.report.reasons
    rows.clear()
    made = run(fast, call)
    handle.remove()
    assert torch.equal(first, made)
    assert sum(rows) == full - 3 * full // STEPS // 2, "of the skipped steps one branch alone is run"
    assert 0 < float((made - plain).norm() / plain.norm()) < 0.2
    assert torch.equal(run(hasten.accelerate(pipe, fast.report.plan), call), made)


def test_without_guidance_nothing_is_skipped() -> None:
    pipe, call = pixart_pipeline()
    call = {**call, "guidance_scale": 1.0}
    plain = run(pipe, call)
    assert torch.equal(run(hasten.accelerate(pipe, EVERY_SECOND), call), plain)


def test_two_evaluations_a_step() -> None:
    pipe, call = pixart_pipeline(HeunDiscreteScheduler())
    plain = run(pipe, call)
    fast = hasten.accelerate(pipe, hasten.SkipGuidance(interval=2, start=2))
    made = run(fast, call)
    assert fast.report.plan is not None and fast.report.plan.skips.any()
    assert float((made - plain).norm() / plain.norm()) < 0.3


# -------------------------------------------------------------------------------------------------------------- composition


def test_spans_and_skipped_branches_together() -> None:
    pipe, call = pixart_pipeline()
    call = {**call, "num_inference_steps": 12}
    plain = run(pipe, call)
    spans, skips = hasten.Forecast(interval=2, start=2), hasten.SkipGuidance(interval=4, start=2)
    both = hasten.accelerate(pipe, [spans, skips], state="int8")
    made = run(both, call)
    plan = both.report.plan
    assert plan is not None and both.trace is not None
    assert plan.skips.any() and (plan.blocks.actions == Action.FORECAST).any()
    assert plan.computed_fraction < spans.plan(both.trace, 12).computed_fraction
    alone = [float((run(hasten.accelerate(pipe, m), call) - plain).norm()) for m in (spans, skips)]
    assert 0 < float((made - plain).norm()) < 2 * sum(alone)
    assert torch.equal(run(both, call), made)


def test_steps_with_both_branches_wait_for_computed_blocks() -> None:
    skips = np.array([0, 0, 1, 1, 0, 1, 1, 0, 1, 1], bool)
    every_third = np.array([1, 1, 0, 0, 0, 1, 0, 0, 1, 0], bool)
    assert np.flatnonzero(~aligned(skips, every_third)).tolist() == [0, 1, 5, 8]
    assert np.array_equal(aligned(skips, np.ones(10, bool)), skips)
    never = aligned(skips, np.zeros(10, bool))
    assert np.flatnonzero(~never).tolist() == [0, 1, 7], "put off by three steps at most"
    assert not aligned(np.zeros(4, bool), np.zeros(4, bool)).any()
    pipe, call = pixart_pipeline()
    both = hasten.accelerate(pipe, [hasten.Forecast(interval=3, start=2), hasten.SkipGuidance(interval=4, start=3)])
    run(both, {**call, "num_inference_steps": 16})
    assert not both.report.reasons, "nothing has to be computed that the plan wanted reused"


def test_corrections_of_halves_follow_the_half_that_is_run() -> None:
    from hasten.accelerators.caching.affine import Affine as Fix

    fix = Fix(np.array([1.0, 2.0, 10.0, 20.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    whole = fix.apply(torch.ones(4, 2), -1)
    assert whole.tolist() == [[1, 2], [1, 2], [11, 21], [11, 21]]
    fix.group = 1
    assert fix.apply(torch.ones(2, 2), -1).tolist() == [[11, 21], [11, 21]]


def test_what_does_not_go_together_is_refused_with_the_reason() -> None:
    made = trace(pixart()[0], **pixart()[1](0))
    for methods, why in (
        ((hasten.DeltaDiT(interval=2), hasten.Forecast()), "both decide the blocks"),
        ((hasten.FORA(interval=2), hasten.Forecast()), CONFLICTS["blocks", "parts"]),
        ((hasten.FirstBlock(warmup=1), EVERY_SECOND), CONFLICTS["decisions", "guidance"]),
        ((hasten.FirstBlock(warmup=1), hasten.Forecast()), CONFLICTS["blocks", "decisions"]),
    ):
        with pytest.raises(PlanError) as caught:
            Composed(methods).plan(made, 12)
        assert why in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="steps"):
        Composed((hasten.Forecast().plan(made, 12), EVERY_SECOND.plan(made, 10))).plan(made, 12)
    with pytest.raises(ValueError, match="methods"):
        Composed(())
    merged = Composed((hasten.Forecast(), EVERY_SECOND)).plan(made, 12)
    assert merged.facts["method"].startswith("forecast") and " + skip-guidance" in merged.facts["method"]


@pytest.mark.parametrize("value", [{"interval": 0}, {"start": 1.5}, {"start": True}, {"order": 2}, {"conditional": "third"}])
def test_values_are_checked(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(value))):
        hasten.SkipGuidance(**value)
