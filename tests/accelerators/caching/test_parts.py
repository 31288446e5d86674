"""Parts of blocks: FORA, BAC and the runtime that answers single modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.bac import BAC, anchored
from hasten.accelerators.caching.calibrate import SiteTable, Tables
from hasten.accelerators.caching.plan import Action, Plan, PlanError
from hasten.accelerators.caching.runtime import Session, attach, compute_all
from hasten.accelerators.caching.trace import trace_module
from tests.accelerators.caching.toys import randn
from tests.families import PIPELINES, run

WIDTH, STEPS = 8, 6


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Attention(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.to_q.weight, generator=torch.Generator().manual_seed(seed), std=0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.to_q(x)) + x.mean(1, keepdim=True)


class FeedForward(nn.Sequential):
    def __init__(self, seed: int) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Plain(nn.Module):
    """Attention and feed-forward, added as they are."""

    gate: float | None = None

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn, self.ff = Attention(seed), FeedForward(seed)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + (self.attn(x) if self.gate is None else self.attn(x) * self.gate)
        return x + self.ff(x)


class Gated(Plain):
    gate = 0.5


class Eager(Plain):
    """Gates what attention returned in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(x)
        out *= 0.5
        return x + out


class Net(nn.Module):
    def __init__(self, kind: type[Plain], count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([kind(i) for i in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def latents() -> Tensor:
    return torch.stack([randn(0, 2, 3, WIDTH) + 0.1 * k * randn(1, 2, 3, WIDTH) for k in range(STEPS)])


def sample(net: nn.Module, method: Any, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
    with attach(net, method, num_inference_steps=len(x), **options) as session:
        made = []
        for k in range(len(x)):
            with session.step(k):
                made.append(net(x[k]))
    return torch.stack(made), session.report


def by_hand(net: Net, x: Tensor, interval: int) -> Tensor:
    made = []
    for k in range(len(x)):
        h = x[k]
        for block in net.blocks:
            if k % interval == 0:
                block.kept_attn = block.attn(h)
            gate = 1.0 if block.gate is None else block.gate
            h = h + block.kept_attn * gate
            if k % interval == 0:
                block.kept_ff = block.ff(h)
            h = h + block.kept_ff
        made.append(h)
    return torch.stack(made)


@pytest.mark.parametrize("kind", [Plain, Gated])
def test_fora_is_what_the_paper_says(kind: type[Plain]) -> None:
    net, x = Net(kind), latents()
    made, report = sample(net, hasten.FORA(interval=3), x)
    torch.testing.assert_close(made, by_hand(net, x, 3), rtol=1e-5, atol=1e-5)
    assert report.plan.computed_fraction == pytest.approx(1 / 3) and not report.reasons


def test_blocks_without_gates_need_not_run_at_all() -> None:
    net, x = Net(Plain), latents()
    trace = trace_module(net, (x[0],), {})
    assert all(block.additive for block in trace.blocks)
    assert not any(block.additive for block in trace_module(Net(Gated), (x[0],), {}).blocks)
    sample(net, hasten.FORA(interval=3), x, trace=trace)
    for block in net.blocks:
        block.calls = 0
    sample(net, hasten.FORA(interval=3), x, trace=trace)
    assert [block.calls for block in net.blocks] == [2, 2, 2]


def test_a_part_that_the_block_changes_in_place_is_copied() -> None:
    net, x = Net(Eager), latents()
    trace = trace_module(net, (x[0],), {})
    sites = tuple(part.path for part in trace.parts)
    assert sites == tuple(f"blocks.{i}.attn" for i in range(3)) and all(part.in_place for part in trace.parts)
    actions = np.array([[0], [0], [1], [1], [0], [1]]).repeat(3, 1)
    made, report = sample(net, Plan(actions, sites), x, trace=trace)
    computed = [Net.forward(net, x[k]) for k in range(STEPS)]
    assert torch.equal(made[0], computed[0]) and torch.equal(made[1], computed[1])
    again, _ = sample(net, Plan(actions, sites), x, trace=trace)
    assert torch.equal(made, again)
    frozen = x[2]
    for block in net.blocks:
        h = x[1]
        for earlier in list(net.blocks)[: list(net.blocks).index(block)]:
            h = earlier(h)
        frozen = frozen + 0.5 * block.attn(h)
    torch.testing.assert_close(made[2], frozen)
    assert not report.reasons


@pytest.mark.parametrize("name", PIPELINES)
def test_a_plan_that_computes_all_parts_is_bit_identical(name: str) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)
    fast = hasten.accelerate(pipe, hasten.FORA(interval=1), force_store=True)
    assert torch.equal(run(fast, call), plain)
    assert fast.trace.kind_of(fast.report.plan.sites) == "parts"


def test_reuse_computes_less_and_differs_little() -> None:
    for name in PIPELINES:
        pipe, call = PIPELINES[name]()
        plain = run(pipe, call)
        made = run(fast := hasten.accelerate(pipe, hasten.FORA(interval=2)), call)
        assert 0 < (made - plain).norm() < 0.2 * plain.norm(), name
        assert fast.report.plan.speedup_bound(fast.trace) > 1


def test_a_value_that_is_not_finite_is_computed_again() -> None:
    net, x = Net(Gated), latents()
    trace = trace_module(net, (x[0],), {})
    with attach(net, hasten.FORA(interval=3), num_inference_steps=STEPS, trace=trace) as session:
        for k in range(STEPS):
            with session.step(k):
                out = net(x[k])
            if k == 0:
                state = session._branches["branch0"]
                state.values[1].fill_(float("nan"))
            assert out.isfinite().all()
    assert any("not finite" in reason for reason in session.report.reasons)


def test_rows_follow_a_reindexing() -> None:
    net, x, order = Net(Plain), latents(), [1, 0]
    expected, _ = sample(net, hasten.FORA(interval=6), x)
    with attach(net, hasten.FORA(interval=6), num_inference_steps=STEPS) as session:
        for k in range(3):
            with session.step(k):
                net(x[k])
        session.reindex(order)
        for k in range(3, STEPS):
            with session.step(k):
                torch.testing.assert_close(net(x[k][order]), expected[k][order])


def test_parts_cannot_be_forecast() -> None:
    net, x = Net(Plain), latents()
    with pytest.raises(PlanError, match="parts of blocks are computed or reused"):
        sample(net, Plan(np.array([[0], [2]]), ("blocks.0.attn",)), x[:2])


# ------------------------------------------------------------------------------------------------------------------ BAC


def tables(net: nn.Module, x: Tensor) -> tuple[Any, Tables]:
    from hasten.accelerators.caching.calibrate import SiteSketches

    trace = trace_module(net, (x[0],), {})
    sites = tuple(part.path for part in trace.parts)
    sketches = SiteSketches(len(x), sites, 2)
    with Session(net, compute_all(trace, len(x), sites), len(x), force_store=True, observe=sketches) as session:
        for k in range(len(x)):
            with session.step(k):
                net(x[k])
    return trace, Tables(np.zeros((1, len(x), len(x))), np.ones(len(x)), sites=sketches.tables())


def test_tables_hold_the_similarity_of_every_two_steps() -> None:
    net, x = Net(Plain, 1), latents()
    _, found = tables(net, x)
    values = torch.stack([net.blocks[0].attn(x[k]) for k in range(STEPS)]).flatten(2)
    cosine = torch.cosine_similarity(values[:, None], values[None], dim=-1).mean(-1)
    np.testing.assert_allclose(found.sites["blocks.0.attn"].cosine, cosine.numpy(), atol=1e-5)
    distance = (values[:, None] - values[None]).abs().mean((-1, -2))
    np.testing.assert_allclose(found.sites["blocks.0.attn"].distance, distance.numpy(), atol=1e-5)


def test_bac_gives_every_part_its_updates_and_unites_what_drifts() -> None:
    net, x = Net(Plain), latents()
    trace, found = tables(net, x)
    apart = BAC(updates=2, union=0).calibrated(trace, found)
    assert ((apart.actions == Action.COMPUTE).sum(0) == 2).all() and (apart.actions[0] == Action.COMPUTE).all()
    united = BAC(updates=2, union=3).calibrated(trace, found)
    assert ((united.actions == Action.COMPUTE) >= (apart.actions == Action.COMPUTE)).all()
    assert united.facts["effective_updates"] >= 2
    drift = sorted(found.sites, key=lambda site: -found.sites[site].drift)[:3]
    layer = {site: int(site.split(".")[1]) for site in found.sites}
    for u, site in enumerate(found.sites):
        downstream = [v for v, other in enumerate(found.sites) if other.endswith("ff") and layer[other] >= layer[site]]
        wanted = apart.actions[:, u] == Action.COMPUTE
        if site in drift:
            wanted = wanted | (apart.actions[:, downstream] == Action.COMPUTE).any(1)
        assert np.array_equal(united.actions[:, u] == Action.COMPUTE, wanted)


def test_an_anchored_segment_costs_what_its_first_value_misses() -> None:
    cosine = np.array([[1, 0.9, 0.5], [0.9, 1, 0.8], [0.5, 0.8, 1]])
    np.testing.assert_allclose(anchored(cosine)[0], [0, 0.1, 0.6])
    np.testing.assert_allclose(anchored(cosine)[1, 1:], [0, 0.2])


def test_bac_refuses_what_it_cannot_do() -> None:
    net, x = Net(Plain), latents()
    trace, found = tables(net, x)
    with pytest.raises(ValueError, match="updates must be at most the number of steps, 6, not 7"):
        BAC(updates=7).calibrated(trace, found)
    with pytest.raises(ValueError, match="no parts that can be told apart"):
        BAC(updates=2).calibrated(trace, Tables(found.gram, found.sensitivity))
    for options in ({"updates": 0}, {"union": -1}):
        with pytest.raises(ValueError, match="must be a whole number"):
            BAC(**options)
    assert isinstance(found.sites["blocks.0.ff"], SiteTable)


def test_a_network_of_ones_own_is_calibrated_on_its_loop() -> None:
    net, x = Net(Plain), latents()

    def loop(session: Session) -> None:
        for k in range(STEPS):
            with session.step(k):
                net(x[k])

    plan = hasten.calibrate(net, loop, BAC(updates=3, union=1), num_inference_steps=STEPS, progress=False)
    assert plan.sites == tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "ff"))
    _, report = sample(net, plan, x)
    assert not report.reasons and report.plan.computed_fraction < 0.7
    with pytest.raises(ValueError, match="must be that function"):
        hasten.calibrate(net, ["a cat"], BAC(updates=3), num_inference_steps=STEPS, progress=False)
