"""Methods that are calibrated, from end to end on a tiny pipeline and a tiny UNet."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators.caching.plan import Action, PlanError
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.trace import weight_facts
from hasten.pipelines.calibration import estimate
from tests.accelerators.caching.test_deep import inputs, unet
from tests.accelerators.caching.toys import randn
from tests.families import PIPELINES, run

STEPS = 8
CALL = {"num_inference_steps": STEPS, "progress": False}


def loop_over(net: Any, steps: int = STEPS) -> Any:
    def loop(session: Any) -> list[Tensor]:
        made = []
        with torch.no_grad():
            for k in range(steps):
                with session.step(k):
                    args, kwargs = inputs(3 * k)
                    made.append(net(*args, **kwargs).sample)
        return made

    return loop


def guided_loop_over(net: Any) -> Any:
    """Two calls a step, and samples [rows, steps, ...] of both together."""

    def loop(session: Any) -> Tensor:
        made = []
        with torch.no_grad():
            for k in range(STEPS):
                with session.step(k):
                    args, _ = inputs(3 * k)
                    told, untold = (net(*args, encoder_hidden_states=randn(seed, 2, 5, 8)).sample for seed in (2, 3))
                    made.append(untold + 2 * (told - untold))
        return torch.stack(made, 1)

    return loop


def outputs(net: Any, method: Any) -> tuple[Tensor, Any]:
    with attach(net, method, num_inference_steps=STEPS) as session:
        made = torch.stack(loop_over(net)(session))
    return made, session.report


def plain(net: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([net(*inputs(3 * k)[0], **inputs(3 * k)[1]).sample for k in range(STEPS)])


def calibrated(net: Any, method: Any) -> Any:
    return hasten.calibrate(net, loop_over(net), method, **CALL)


def error(made: Tensor, reference: Tensor) -> float:
    return float((made - reference).norm() / reference.norm())


def test_cachequants_correction_lowers_the_error() -> None:
    net = unet()
    reference = plain(net)
    settings = {"interval": 4, "weights": None}
    naive = hasten.CacheQuant(schedule="uniform", cache_correction=False, **settings)
    corrected = hasten.CacheQuant(schedule="uniform", ridge=0.0, **settings)
    errors = [error(outputs(net, calibrated(net, method))[0], reference) for method in (naive, corrected)]
    assert errors[1] < errors[0]  # by how much on a trained model: `hasten bench caching`
    quantised = [
        error(outputs(net, calibrated(net, hasten.CacheQuant(interval=1, cache_correction=False, output_correction=on)))[0], reference)
        for on in (False, True)
    ]
    assert max(quantised) < 0.1 and quantised[0] != quantised[1]


def test_the_dynamic_schedule_costs_least_and_keeps_to_its_lengths() -> None:
    distance = np.abs(np.subtract.outer(np.arange(20.0) ** 2, np.arange(20.0) ** 2))
    starts = hasten.CacheQuant(interval=5).computed(distance)
    lengths = np.diff([*starts, 20])
    assert len(starts) == 4 and starts[0] == 0 and (lengths[:-1] >= 3).all() and (lengths <= 10).all()

    def cost(cuts: list[int]) -> float:
        return sum(distance[a, a:b].sum() for a, b in zip(cuts, [*cuts[1:], 20], strict=True))

    assert cost(starts) < cost([0, 5, 10, 15])


def test_a_planned_schedule_forecasts_and_corrects_what_it_forecasts(tmp_path: Path) -> None:
    net = unet()
    loop = guided_loop_over(net)
    plan = hasten.calibrate(net, loop, hasten.CacheQuant(interval=2, schedule="planned", ridge=0.0), **CALL)
    computed = np.flatnonzero(plan.actions[:, 0, 0] == Action.COMPUTE)
    assert len(computed) == 4 and computed[0] == 0
    assert len(plan.branches) == 2 and (plan.actions[:, 0, 0] == plan.actions[:, 0, 1]).all()
    assert (np.delete(plan.actions, computed, 0) == Action.FORECAST).all(), "nothing is reused as it was"

    values: list[Tensor] = []
    hook = net.get_submodule(plan.sites[0]).register_forward_hook(lambda _, __, out: values.append(out[0]))
    reference = loop(SimpleNamespace(step=lambda k: nullcontext()))
    hook.remove()
    assert len(values) == 2 * STEPS and plan.weights is not None
    (table,) = plan.corrections.values()
    for branch in range(2):
        of = [value.movedim(1, -1).reshape(-1, 8).double().numpy() for value in values[branch::2]]
        for k in range(STEPS):
            scale, shift = table[:, k, branch]
            if k in computed:
                assert (scale == 1).all() and not shift.any()
                continue
            sources = computed[computed < k][::-1]
            forecast = sum(weight * of[source] for weight, source in zip(plan.weights[k, 0, branch], sources, strict=False))
            for c in range(8):
                design = np.stack([forecast[:, c], np.ones(len(forecast))], 1)
                best = np.linalg.lstsq(design, of[k][:, c], rcond=None)[0]
                np.testing.assert_allclose([scale[c], shift[c]], best, rtol=1e-3, atol=1e-3)

    plan.save(tmp_path / "plan.safetensors")
    loaded = hasten.Plan.load(tmp_path / "plan.safetensors")
    assert loaded == plan and loaded.branches == plan.branches
    made = []
    for each in (plan, loaded):
        with attach(net, each, num_inference_steps=STEPS) as session:
            made.append(loop(session))
        assert session.report.computed_fraction == 0.5 and not session.report.reasons
    assert torch.equal(*made) and 0 < error(made[0], reference) < 0.2
    with pytest.raises(ValueError, match="the sampling loop must return its samples"):
        calibrated(net, hasten.CacheQuant(interval=2, schedule="planned"))


def test_a_quantised_plan_travels_in_one_file_and_leaves_the_network_alone(tmp_path: Path) -> None:
    net = unet()
    before, reference = {name: value.clone() for name, value in net.state_dict().items()}, plain(net)
    plan = calibrated(net, hasten.CacheQuant(interval=2))
    assert plan.facts["quantised"]["bytes_of_fp32"] < 0.5  # tiny layers: the scales weigh
    plan.save(tmp_path / "plan.safetensors")
    loaded = hasten.Plan.load(tmp_path / "plan.safetensors")
    assert loaded == plan
    made, report = outputs(net, loaded)
    assert torch.equal(made, outputs(net, plan)[0]) and 0 < error(made, reference) < 0.2
    assert torch.equal(plain(net), reference)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert report.plan.tables.keys() == plan.tables.keys()


def test_four_bit_weights_keep_the_first_and_last_layer_at_eight() -> None:
    net = unet()
    plan = calibrated(net, hasten.CacheQuant(interval=2, weights="int4"))
    assert plan.facts["quantised"]["keep_8bit"] == ["conv_in", "conv_out"]
    assert error(outputs(net, plan)[0], plain(net)) < 0.6


def test_halves_of_a_guided_batch_have_corrections_of_their_own() -> None:
    pipe, call = PIPELINES["sd3"]()
    del call["latents"]
    prompts = {name: call.pop(name) for name in [name for name in call if "prompt" in name]}
    assert prompts
    net = pipe.transformer
    calls: list[tuple[Any, Any]] = []
    hook = net.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run(pipe, {**call, **prompts})
    hook.remove()

    def loop(session: Any) -> None:
        session.facts["guidance"] = "batched x2"
        with torch.no_grad():
            for k, (args, kwargs) in enumerate(calls):
                with session.step(k):
                    net(*args, **kwargs)

    method = hasten.CacheQuant(interval=2, schedule="uniform", weights=None)
    plan = hasten.calibrate(net, loop, method, num_inference_steps=len(calls), progress=False)
    (table,) = plan.corrections.values()
    channels = table.shape[-1] // 2
    assert not np.allclose(table[..., :channels], table[..., channels:])
    with attach(net, plan, num_inference_steps=len(calls)) as session:
        loop(session)
    assert not session.report.reasons and session.report.computed_fraction < 0.7


def test_teacache_is_fitted_to_the_model() -> None:
    pipe, call = PIPELINES["pixart"]()
    calls: list[tuple[Any, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run(pipe, call)
    hook.remove()

    def loop(session: Any) -> None:
        with torch.no_grad():
            for k, (args, kwargs) in enumerate(calls):
                with session.step(k):
                    pipe.transformer(*args, **kwargs)

    fitted = hasten.calibrate(pipe.transformer, loop, hasten.TeaCache(threshold=0.1), num_inference_steps=len(calls), progress=False)
    assert len(fitted.knots) >= 2 and fitted.threshold == 0.1
    fast = hasten.accelerate(pipe, fitted)
    run(fast, call)
    assert fast.report.plan is not None


# ---------------------------------------------------------------------------------------------------------------- binding


def test_a_calibrated_plan_is_refused_on_other_weights() -> None:
    net = unet()
    plan = calibrated(net, hasten.CacheQuant(interval=2, weights=None))
    with torch.no_grad():
        net.conv_in.weight.mul_(1.5)
    with pytest.raises(PlanError, match=r"calibrated with weights .* calibrate again, or pass allow_mismatch=True"):
        outputs(net, plan)
    with attach(net, plan, num_inference_steps=STEPS, allow_mismatch=True) as session:
        loop_over(net)(session)


def test_an_adapter_loaded_after_calibration_is_noticed() -> None:
    from peft import LoraConfig

    net = unet()
    facts = weight_facts(net)
    net.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    with_adapter = weight_facts(net)
    assert with_adapter["weights"] == facts["weights"] and with_adapter["adapters"] == {"style": 2.0} and facts["adapters"] == {}
    net.disable_adapters()


def test_the_same_checkpoint_in_another_dtype_is_the_same() -> None:
    assert weight_facts(unet()) == weight_facts(unet().to(torch.bfloat16))


# --------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named() -> None:
    net = unet()
    for options, said in (
        ({"interval": 0}, "interval must be"),
        ({"branch": -1}, "branch must be"),
        ({"schedule": "odd"}, "schedule must be"),
        ({"weights": "int3"}, "weights must be one of int8, int4 or None"),
        ({"activations": "fp8"}, "activations must be"),
        ({"ridge": -1.0}, "ridge must be"),
    ):
        with pytest.raises(ValueError, match=said):
            hasten.CacheQuant(**options)
    with pytest.raises(ValueError, match="branch must be from 0 to 4"):
        calibrated(net, hasten.CacheQuant(branch=9, weights=None))
    with pytest.raises(ValueError, match="needs no calibration"):
        calibrated(net, hasten.DeepCache())


def test_an_estimate_before_anything_runs() -> None:
    from hasten.pipelines.zoo.loading import load

    pipe = load("shapes")
    call = {"clean_caption": False, "use_resolution_binning": False, "num_inference_steps": 10}
    told = estimate(pipe, ["a red circle"] * 3, batch=2, passes=2, budget="5MB", **call)
    assert told.calls == 40 and told.bytes == 5_000_000 and told.seconds > 0
    assert "denoiser calls" in str(told)
    with pytest.raises(ValueError, match="samples must be from 1 to the number of prompts, 1, not 2"):
        hasten.calibrate(pipe, ["a red circle"], hasten.MagCache(), samples=2, progress=False, **call)
