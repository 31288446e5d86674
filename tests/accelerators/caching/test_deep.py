"""A UNet's deep branch: what is skipped, what stays live, and DeepCache on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

import hasten
from hasten.accelerators.caching.auto import Auto
from hasten.accelerators.caching.deep import deep_program, tensors_in
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.trace import trace_module
from tests.accelerators.caching.toys import chain, randn

STEPS = 6


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(**{**settings, **options}).eval()


def inputs(k: int, batch: int = 2, side: int = 8) -> tuple[tuple[Tensor, int], dict[str, Tensor]]:
    x = randn(0, batch, 4, side, side) + 0.05 * k * randn(1, batch, 4, side, side)
    return (x, 900 - 20 * k), {"encoder_hidden_states": randn(2, batch, 5, 8)}


def sample(net: Any, method: Any, steps: int = STEPS, **options: Any) -> tuple[Tensor, Any]:
    with attach(net, method, num_inference_steps=steps, **options) as session:
        made = []
        for k in range(steps):
            with session.step(k):
                args, kwargs = inputs(k)
                made.append(net(*args, **kwargs).sample)
    return torch.stack(made), session.report


def traced(net: Any) -> Any:
    args, kwargs = inputs(0)
    return trace_module(net, args, kwargs)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_deep_branch_for_every_skip_connection(layers: int) -> None:
    trace = traced(unet(layers_per_block=layers))
    assert trace.deep is not None and len(trace.deep.sites) == 3 * layers + 2
    times = [trace.deep.seconds(branch) for branch in range(len(trace.deep.sites))]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert "deep branch 0: up_blocks.2." in str(trace)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("middle", ["UNetMidBlock2DCrossAttn", None])
def test_the_deep_value_of_the_same_input_gives_the_same_output(layers: int, middle: str | None) -> None:
    net = unet(layers_per_block=layers, mid_block_type=middle)
    trace = traced(net)
    args, kwargs = inputs(0)
    expected = net(*args, **kwargs).sample
    for branch, site in enumerate(trace.deep.sites):
        with attach(net, Plan(np.array([[0], [1]]), (site,)), num_inference_steps=2, trace=trace) as session:
            for k in range(2):
                with session.step(k):
                    out = net(*args, **kwargs).sample
            assert torch.equal(out, expected), branch
        assert session.report.plan.actions[:, 0, 0].tolist() == [0, 1] and not session.report.reasons


def test_what_is_below_does_not_run_and_what_is_above_is_live() -> None:
    net = unet()
    trace = traced(net)
    ran: list[str] = []
    for name in ("down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0", "mid_block.resnets.0", "up_blocks.2.resnets.1"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    with attach(net, Plan(np.array([[0], [1]]), (trace.deep.sites[1],)), num_inference_steps=2, trace=trace) as session:
        with session.step(0):
            args, kwargs = inputs(0)
            first = net(*args, **kwargs).sample
        ran.clear()
        with session.step(1):
            args, kwargs = inputs(5)
            second = net(*args, **kwargs).sample
    assert ran == ["down_blocks.0.resnets.0", "up_blocks.2.resnets.1"]
    assert not torch.equal(first, second)


def test_control_residuals_on_kept_skips_act_live() -> None:
    net = unet()
    trace = traced(net)
    control = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(4, 8))
    args, kwargs = inputs(0)
    down, mid = control(*args, **kwargs, controlnet_cond=randn(4, 2, 3, 16, 16), return_dict=False)
    down = [d + 0.3 * torch.ones_like(d) for d in down]

    def made(*residuals: Tensor) -> Tensor:
        return net(*args, **kwargs, down_block_additional_residuals=residuals, mid_block_additional_residual=mid).sample

    expected = made(*down)
    with attach(net, Plan(np.array([[0], [1], [1], [1]]), (trace.deep.sites[0],)), num_inference_steps=4, trace=trace) as session:
        outputs = []
        for k, residuals in enumerate((down, down, [down[0] + 1, *down[1:]], [down[0], down[1] + 1, *down[2:]])):
            with session.step(k):
                outputs.append(made(*residuals))
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)
    assert not torch.equal(outputs[2], expected), "a residual on a kept skip acts live"
    assert torch.equal(outputs[3], expected), "one on a skip below is frozen"


@pytest.mark.parametrize("schedule", ["uniform", "power"])
def test_deepcache(schedule: str) -> None:
    net = unet()
    plain = torch.stack([net(*inputs(k)[0], **inputs(k)[1]).sample for k in range(12)])
    made, report = sample(net, hasten.DeepCache(interval=3, schedule=schedule), 12)
    assert (report.plan.actions == Action.COMPUTE).sum() == 4 and report.plan.actions[0, 0, 0] == Action.COMPUTE
    assert 0 < (made - plain).norm() < 0.2 * plain.norm()
    assert report.bound > 1.1 and report.state_bytes_peak > 0 and not report.reasons
    identical, _ = sample(net, hasten.DeepCache(interval=1), 12, force_store=True)
    assert torch.equal(identical, plain)


def test_the_power_schedule_is_denser_around_its_center() -> None:
    steps = hasten.DeepCache(interval=5, schedule="power", center=0.3).computed(50)
    gaps = np.diff(steps)
    assert 8 <= len(steps) <= 10 and steps[0] == 0
    middle = int(np.argmin(np.abs(np.array(steps[:-1]) - 15)))
    assert gaps[middle] <= gaps[-1]


def test_a_corrected_value() -> None:
    net = unet()
    trace = traced(net)
    site = trace.deep.sites[0]
    args, kwargs = inputs(0)
    channels = 8
    table = np.zeros((2, 2, 1, channels), np.float32)
    table[0] = 1.0
    same = Plan(np.array([[0], [1]]), (site,), corrections={site: table})
    table = table.copy()
    table[1, 1] = 0.5
    shifted = Plan(np.array([[0], [1]]), (site,), corrections={site: table})
    made = []
    for plan in (same, shifted):
        with attach(net, plan, num_inference_steps=2, trace=trace) as session:
            for k in range(2):
                with session.step(k):
                    out = net(*args, **kwargs).sample
        made.append(out)
    assert torch.equal(made[0], net(*args, **kwargs).sample) and not torch.equal(*made)


def test_another_batch_or_reindexed_rows() -> None:
    net = unet()
    trace = traced(net)
    plan = Plan(np.array([[0], [1], [1]]), (trace.deep.sites[0],))
    args, kwargs = inputs(0)
    expected = net(*args, **kwargs).sample
    with attach(net, plan, num_inference_steps=3, trace=trace) as session:
        with session.step(0):
            net(*args, **kwargs)
        session.reindex([1, 0, 1])
        with session.step(1):
            out = net(args[0][[1, 0, 1]], args[1], encoder_hidden_states=kwargs["encoder_hidden_states"][[1, 0, 1]]).sample
        torch.testing.assert_close(out, expected[[1, 0, 1]])
        with session.step(2):
            x = {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]}
            alone = net(args[0][:1], args[1], **x).sample
        assert torch.equal(alone, net(args[0][:1], args[1], **x).sample)
    assert any("batch" in reason for reason in session.report.reasons)


def test_a_forecast_is_the_weighed_sum_of_stored_values() -> None:
    net = unet()
    trace = traced(net)
    site = trace.deep.sites[0]
    values: list[Tensor] = []
    handle = net.get_submodule(site).register_forward_hook(lambda module, args, out: values.append(tensors_in(out)[0].clone()))
    seen: list[Tensor] = []
    consumer = net.get_submodule(trace.deep.up[trace.deep.consumer(0)].modules[0])
    reads = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    weights = np.zeros((4, 1, 1, 3))
    weights[2, 0, 0] = (1.5, -0.25, 0)
    plan = Plan(np.array([[0], [0], [2], [1]]), (site,), weights=weights)
    with attach(net, plan, num_inference_steps=4, trace=trace) as session:
        for k in range(4):
            with session.step(k):
                args, kwargs = inputs(k)
                net(*args, **kwargs)
    handle.remove()
    reads.remove()
    assert len(values) == 2 and not session.report.reasons
    channels = values[0].shape[1]
    torch.testing.assert_close(seen[2][:, :channels], 1.5 * values[1] - 0.25 * values[0])
    assert torch.equal(seen[3][:, :channels], values[1]), "after a forecast the newest value is still reused as it is"
    assert (session.report.plan.actions == plan.actions).all()


def test_a_polynomial_forecast_follows_a_straight_line_exactly() -> None:
    assert deep_program(np.array([0, 0, 2, 2])) == [(), (), ((1, 2.0), (0, -1.0)), ((1, 3.0), (0, -2.0))]
    assert deep_program(np.array([2, 2, 1])) == [(), ((0, 1.0),), ((0, 1.0),)], "what was never computed is; one value is held"
    given = np.array([[0, 0], [0, 0], [0.5, 0.25]])
    assert deep_program(np.array([0, 0, 2]), weights=given)[2] == ((1, 0.5), (0, 0.25))


def test_a_value_that_does_not_fit_makes_the_next_one_the_only_source() -> None:
    net = unet()
    trace = traced(net)
    weights = np.zeros((5, 1, 1, 2))
    weights[2:4, 0, 0] = (2.0, -1.0)
    plan = Plan(np.array([[0], [0], [2], [2], [1]]), (trace.deep.sites[0],), weights=weights)
    calls = []
    for k in range(5):
        args, kwargs = inputs(k)
        calls.append(((args[0] + (torch.nan if k == 1 else 0), args[1]), kwargs))
    plain = [net(*args, **kwargs).sample for args, kwargs in calls]
    with attach(net, plan, num_inference_steps=5, trace=trace) as session:
        for k, (args, kwargs) in enumerate(calls):
            with session.step(k):
                out = net(*args, **kwargs).sample
            assert k == 1 or torch.equal(out, plain[k]) == (k < 4)
    assert session.report.plan.actions[:, 0, 0].tolist() == [0, 0, 0, 0, 1]
    assert sorted(reason.rpartition(": ")[2] for reason in session.report.reasons) == [
        "its stored value is not finite", "nothing is stored for it yet",
    ]  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    net = unet()
    with pytest.raises(ValueError, match="branch must be from 0 to 4 for this model, not 9"):
        sample(net, hasten.DeepCache(branch=9))
    with pytest.raises(ValueError, match="DeepCache needs a UNet"):
        hasten.DeepCache().plan(trace_module(chain(3), (randn(0, 1, 3, 4),), {}), 2)
    for options in ({"interval": 0}, {"branch": -1}, {"schedule": "odd"}, {"center": 2}, {"power": 0.5}):
        with pytest.raises(ValueError, match="must be"):
            hasten.DeepCache(**options)


def test_the_default_on_a_unet_is_its_deep_branch_and_not_the_blocks_in_its_middle() -> None:
    found = traced(unet(layers_per_block=2))
    plan = Auto().plan(found, 20)
    assert plan.sites == (found.deep.sites[1],) and (plan.actions == Action.REUSE).sum() == 10
    assert found.whole == found.deep.sites[:1]
