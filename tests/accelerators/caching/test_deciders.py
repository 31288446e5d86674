"""Deciders: every row for itself, every decision recorded, and the record replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators.caching.ahead import Ahead
from hasten.accelerators.caching.plan import PlanError
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.teacache import PRESETS, isotonic
from tests.accelerators.caching.toys import WIDTH, chain, randn
from tests.families import PIPELINES, run

STEPS = 8
DECIDERS = {
    "first-block": hasten.FirstBlock(threshold=0.02, warmup=1),
    "first-block with back": hasten.FirstBlock(threshold=0.02, warmup=1, front=2, back=1),
    "teacache": hasten.TeaCache(threshold=0.05),
    "first-block ahead": hasten.FirstBlock(threshold=0.02, warmup=1, ahead=True),
    "teacache ahead": hasten.TeaCache(threshold=0.05, ahead=True),
}
AHEAD = [name for name in DECIDERS if name.endswith("ahead")]


@pytest.fixture(params=DECIDERS)
def decider(request: pytest.FixtureRequest) -> Any:
    return DECIDERS[request.param]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs() -> Tensor:
    """[steps, rows, tokens, width]: rows that move fast, slowly, in between and by jerks."""
    start, drift = randn(1, 4, 3, WIDTH), randn(2, 4, 3, WIDTH)
    pace = torch.tensor([0.5, 0.002, 0.02, 0.0]).view(4, 1, 1)
    x = torch.stack([start + pace * k * drift for k in range(STEPS)])
    x[5:, 3] += 2.0
    return x


def sample(net: Any, method: Any, x: Tensor) -> tuple[Tensor, Any]:
    with attach(net, method, num_inference_steps=len(x)) as session:
        out = []
        for k in range(len(x)):
            with session.step(k):
                out.append(net(x[k]))
    return torch.stack(out), session.report


def test_a_row_is_decided_and_made_as_if_it_were_alone(decider: Any) -> None:
    net, x = chain(5), inputs()
    together, report = sample(net, decider, x)
    plan = report.plan
    assert plan.branches == tuple(f"branch0#{i}" for i in range(4)), "the rows are made to disagree"
    for row in range(4):
        alone, own = sample(net, decider, x[:, row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-5, atol=1e-6)
        assert np.array_equal(own.plan.actions[:, :, 0], plan.actions[:, :, row])
    fractions = [(plan.actions[:, :, row] == 0).mean() for row in range(4)]
    assert fractions[0] == 1.0 and fractions[1] < 0.7


def test_only_the_rows_that_compute_are_computed(decider: Any) -> None:
    net, x = chain(5), inputs()
    sample(net, decider, x)
    seen: list[int] = []
    hook = net.blocks[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    _, report = sample(net, decider, x)
    hook.remove()
    computed = (report.plan.actions[:, 3] == 0).sum(1)
    # Tracing aside, the trial of one block on single rows costs one call more, and only once.
    assert sum(seen) <= computed.sum() + 3 * 4 + 4 + computed.max()


def test_the_recorded_plan_replays_to_the_same(decider: Any, tmp_path: Path) -> None:
    net, x = chain(5), inputs()
    made, report = sample(net, decider, x)
    report.plan.save(tmp_path / "plan.safetensors")
    again, replay = sample(net, hasten.Plan.load(tmp_path / "plan.safetensors"), x)
    assert torch.equal(again, made)
    assert np.array_equal(replay.plan.actions, report.plan.actions)
    with pytest.raises(PlanError, match="recorded for a batch of 4 rows, this run has 2"):
        sample(net, report.plan, x[:, :2])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_recorded_plan_replays_to_the_same_image(name: str, decider: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, decider)
    made = run(fast, call)
    assert torch.equal(run(hasten.accelerate(pipe, fast.report.plan), call), made)


def test_a_threshold_of_nothing_computes_everything() -> None:
    for name in ("pixart", "flux"):
        pipe, call = PIPELINES[name]()
        plain = run(pipe, call)
        for method in (hasten.FirstBlock(threshold=0.0, warmup=0), hasten.TeaCache(threshold=0.0)):
            fast = hasten.accelerate(pipe, method)
            assert torch.equal(run(fast, call), plain) and fast.report.computed_fraction == 1


def test_a_decision_is_one_synchronisation() -> None:
    """Booleans of the rows, once a step; the pipeline's own synchronisations are the sampler's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Probe(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                Probe.count += 1
            return func(*args, **(kwargs or {}))

    net, x = chain(4), torch.stack([randn(3, 2, 3, WIDTH)] * STEPS)
    with attach(net, hasten.FirstBlock(threshold=0.1, warmup=1), num_inference_steps=STEPS, nan_check="off") as session:
        with session.step(0):
            net(x[0])
        with Probe():
            for k in range(1, STEPS):
                with session.step(k):
                    net(x[k])
    assert session.report.plan.computed_fraction < 0.5
    assert Probe.count == 0  # `tolist` reads the whole mask at once


def test_rows_follow_a_reindexing() -> None:
    net, x, order = chain(5), inputs(), [2, 0, 3, 1]
    method = hasten.FirstBlock(threshold=0.02, warmup=1)
    expected, _ = sample(net, method, x)
    with attach(net, method, num_inference_steps=STEPS) as session:
        for k in range(4):
            with session.step(k):
                net(x[k])
        session.reindex(order)
        for k in range(4, STEPS):
            with session.step(k):
                made = net(x[k][order])
            torch.testing.assert_close(made, expected[k][order])


@pytest.mark.parametrize("name", AHEAD)
def test_a_verdict_that_came_ahead_knows_nothing_of_its_own_step(name: str) -> None:
    """Where rows jump, the step at which they do still reuses, and the next one computes."""
    net, x = chain(5), inputs()
    _, report = sample(net, DECIDERS[name], x)
    steady = x.clone()
    steady[5:, 3] -= 2.0  # the same rows without the jump
    _, without = sample(net, DECIDERS[name], steady)
    jerked, smooth = report.plan.actions[:, :, 3], without.plan.actions[:, 2]
    jerked = jerked[:, 2]
    if smooth.ndim == 2:
        smooth = smooth[:, 3]
    assert np.array_equal(jerked[:6], smooth[:6]) and smooth[5] == 1 and jerked[6] == 0


@pytest.mark.parametrize("name", AHEAD)
def test_a_verdict_is_on_its_way_before_the_blocks_that_follow_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a device would have nothing left to do when the host asks for it."""
    net, x = chain(5), inputs()
    order: list[str] = []
    foretell = Ahead.foretell

    def noted(*args: Any) -> None:
        order.append("foretold")
        foretell(*args)

    _, report = sample(net, DECIDERS[name], x)
    monkeypatch.setattr(Ahead, "foretell", noted)
    net.blocks[4].register_forward_pre_hook(lambda _, args: order.append("tail"))
    with attach(net, DECIDERS[name], num_inference_steps=STEPS, trace=report.trace) as session, session.step(0):
        net(x[0])
    assert order == ["foretold", "tail"]


@pytest.mark.parametrize("name", AHEAD)
def test_on_a_steady_course_what_comes_ahead_is_what_is_decided_at_once(name: str) -> None:
    net, x = chain(5), inputs()[:, :3]
    method = DECIDERS[name]
    _, ahead = sample(net, method, x)
    _, at_once = sample(net, replace(method, ahead=False), x)
    assert (ahead.plan.actions[1, 2] == 0).all(), "two steps are needed to know where it goes"
    computed, at_once_computed = ((report.plan.actions[:, 2] == 0).sum(0) for report in (ahead, at_once))
    assert (abs(computed - at_once_computed) <= 1).all() and computed.min() < STEPS - 2


def test_teacaches_increments_are_never_negative() -> None:
    changes = torch.linspace(0, 1, 101)
    for name in PRESETS:
        assert (hasten.TeaCache(curve=name).estimate(changes) >= 0).all(), name


def test_the_fitted_curve_ascends_and_stays_within_its_range() -> None:
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 1, 200)
    y = x**2 + generator.normal(0, 0.1, 200)
    fitted = hasten.TeaCache().fitted(list(zip(x.tolist(), y.tolist(), strict=True)))
    grid = fitted.estimate(torch.linspace(-1, 2, 301))
    assert (grid.diff() >= -1e-6).all()
    assert grid.min() >= min(k[1] for k in fitted.knots) - 1e-6 and grid.max() <= max(k[1] for k in fitted.knots) + 1e-6
    assert abs(float(fitted.estimate(torch.tensor([0.5]))) - 0.25) < 0.1


def test_isotonic_regression_pools_what_descends() -> None:
    assert isotonic([(0, 0.0), (1, 2.0), (2, 1.0), (3, 3.0)]) == ((0, 0), (1.5, 1.5), (3, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: hasten.FirstBlock(threshold=-1), "threshold must be at least 0"),
        (lambda: hasten.FirstBlock(front=0), "front must be a whole number of at least 1"),
        (lambda: hasten.FirstBlock(back=-1), "back must be"),
        (lambda: hasten.FirstBlock(warmup=1.5), "warmup must be"),
        (lambda: hasten.FirstBlock(max_continuous=0), "max_continuous must be"),
        (lambda: hasten.TeaCache(curve="flux-dex"), "curve must be a polynomial or one of flux-dev"),
        (lambda: hasten.TeaCache(knots=((0, 1), (1, 0))), "knots must ascend"),
        (lambda: hasten.TeaCache().fitted([(0, 0)]), "at least 2 measured pairs"),
    ],
)
def test_bad_settings_are_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
