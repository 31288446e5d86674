"""Published step LoRAs: in force within the block, without a trace after it, and refused where they do not belong."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from hasten.pipelines.presets import BASES, PUBLISHED, Preset, few_step
from hasten.pipelines.solver_schedulers import GammaScheduler
from tests import families
from tests.families import flux, flux_pipeline, pixart_pipeline, sd3_pipeline, sd_pipeline, sdxl_pipeline

UNET_LAYERS = ["to_q", "to_k", "conv1"]
DIT_LAYERS = ["to_q", "ff.net.2"]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def flux_dev_pipeline() -> Any:
    from diffusers import FluxTransformer2DModel

    pipe, call = flux_pipeline()
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel.from_config(flux()[0].config, guidance_embeds=True).eval()
    return pipe, call


MAKERS: dict[str, Callable[..., Any]] = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "flux": flux_dev_pipeline}


def run(pipe: Any, call: dict[str, Any], **few: Any) -> Tensor:
    """Latents; of two steps unless the call says otherwise."""
    return families.run(pipe, call, **{"num_inference_steps": 2, **few})


def save_lora(pipe: Any, folder: Path, name: str = "pytorch_lora_weights.safetensors", seed: int = 0, layers: Any = None) -> Path:
    """A random LoRA of a pipeline's denoiser, written by diffusers' own function; the pipeline is as it was."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, part)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=layers or (UNET_LAYERS if part == "unet" else DIT_LAYERS))
    generator = torch.Generator().manual_seed(seed)
    network.add_adapter(config, "made")
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    state = get_peft_model_state_dict(network, adapter_name="made")
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": state}, weight_name=name)
    network.unload_lora()
    network.requires_grad_(False)
    return folder / name


def facts(pipe: Any) -> Any:
    """All that is to be as before: modules, weights, flags, adapters, scheduler."""
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    layers = {
        path: (list(module.active_adapters), module.disable_adapters, dict(module.scaling), list(module.merged_adapters))
        for path, module in network.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "base_layer")
    }
    return {
        "modules": [(path, id(module)) for path, module in network.named_modules()],
        "parameters": [(key, id(p), p._version, p.requires_grad) for key, p in network.named_parameters()],
        "layers": layers,
        "loaded": sorted(getattr(network, "peft_config", {})),
        "flag": network._hf_peft_config_loaded,
        "scheduler": id(pipe.scheduler),
        "config": json.dumps(dict(pipe.config), default=str),
        "random": torch.get_rng_state().tolist(),
    }


class Interrupted(Exception):
    pass


# ------------------------------------------------------------------------------------------------------------- the table


def test_every_entry_makes_its_scheduler_and_its_call() -> None:
    pipes = {base: MAKERS[kind]()[0] for base, kind in zip(BASES, ("sd", "sd", "sdxl", "sdxl", "sd3", "flux"), strict=True)}
    for name, preset in PUBLISHED.items():
        pipe = pipes[preset.base]
        assert preset.name == name and preset.file.endswith(".safetensors") and re.fullmatch(r"[\w.-]+/[\w.-]+", preset.repository)
        preset.check(pipe)
        for steps in {min(preset.steps), preset.steps[0], max(preset.steps)}:
            call, scheduler = preset.call(pipe, steps), preset.make_scheduler(pipe)
            given = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
            if "timesteps" in call:
                scheduler.set_timesteps(timesteps=call["timesteps"])
            else:
                scheduler.set_timesteps(steps, **given)
            assert len(scheduler.timesteps) == steps and call["num_inference_steps"] == steps
            assert ("eta" in call) == (type(scheduler) is TCDScheduler)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("lcm-sdxl", LCMScheduler, {"guidance_scale": 1.0}),
        ("tcd-sd15", TCDScheduler, {"guidance_scale": 0.0, "eta": 0.3}),
        ("hyper-sdxl-unified", TCDScheduler, {"guidance_scale": 0.0, "eta": 1.0}),
        ("hyper-sd15-8-cfg", DDIMScheduler, {"guidance_scale": 5.0}),
        ("hyper-sd3-4", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 3.0}),
        ("hyper-flux-16", FlowMatchEulerDiscreteScheduler, {"guidance_scale": 3.5}),
        ("lightning-sdxl-4", EulerDiscreteScheduler, {"guidance_scale": 0.0}),
        ("dmd2-sdxl-4", LCMScheduler, {"guidance_scale": 0.0, "timesteps": [999, 749, 499, 249]}),
    ],
)
def test_what_the_authors_say(name: str, kind: type[Any], expected: dict[str, Any]) -> None:
    preset = PUBLISHED[name]
    pipe = MAKERS["sdxl"]()[0]
    assert preset.scheduler is kind and preset.scale == (0.125 if name in ("hyper-sd3-4", "hyper-flux-16") else 1.0)
    assert preset.call(pipe) == {"num_inference_steps": preset.steps[0], **expected}


def test_phased_consistency_on_a_flow_is_sampled_as_its_authors_sample_it() -> None:
    """Their grid: 50 evenly spaced timesteps of 1,000, shifted, of which every run takes evenly spaced ones, and then the clean sample."""
    for name, shift, gamma in (("pcm-sd3-4-shift3", 3.0, 0.0), ("pcm-sd3-2-shift1", 1.0, 0.0), ("pcm-sd3-lcm", 3.0, 1.0)):
        preset = PUBLISHED[name]
        scheduler = preset.make_scheduler(sd3_pipeline()[0])
        assert isinstance(scheduler, GammaScheduler) and scheduler.config.gamma == gamma
        scheduler.set_timesteps(preset.steps[0])
        all_levels = np.arange(1, 51) / 50
        taken = all_levels[::-1][np.floor(np.linspace(0, 50, preset.steps[0], endpoint=False)).astype(int)]
        levels = shift * taken / (1 + (shift - 1) * taken)
        np.testing.assert_allclose(scheduler.sigmas, [*levels, 0.0], rtol=1e-6)


def test_settings_of_long_runs_are_not_taken_over_and_the_noise_schedule_is() -> None:
    long = UniPCMultistepScheduler(**SCHEDULE, use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1)
    made = PUBLISHED["lightning-sdxl-4"].make_scheduler(sdxl_pipeline(long)[0])
    made.set_timesteps(4)
    assert made.timesteps.tolist() == [999, 749, 499, 249] and not made.config.use_karras_sigmas
    torch.testing.assert_close(made.alphas_cumprod, long.alphas_cumprod)
    ddim = PUBLISHED["hyper-sdxl-2"].make_scheduler(sdxl_pipeline(long)[0])
    ddim.set_timesteps(2)
    assert ddim.timesteps.tolist() == [999, 499] and not ddim.config.clip_sample
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert PUBLISHED["hyper-sd3-8"].make_scheduler(sd3_pipeline(flow)[0]).config.shift == 3.0


# ----------------------------------------------------------------------------------------------------------- in the block


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd", "hyper-sd15-4"), ("sdxl", "tcd-sdxl"), ("sdxl", "dmd2-sdxl-4"), ("sd3", "hyper-sd3-8"), ("flux", "hyper-flux-8")],
)
def test_within_the_block_it_is_in_force_and_after_it_there_is_no_trace(family: str, name: str, tmp_path: Path) -> None:
    pipe, given = MAKERS[family]()
    preset = PUBLISHED[name]
    file = save_lora(pipe, tmp_path)
    plain, before = run(pipe, given), facts(pipe)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(5)
    with few_step(pipe, name, weights=tmp_path) as call:
        assert type(pipe.scheduler) is preset.scheduler and call["num_inference_steps"] == preset.steps[0]
        assert pipe.get_active_adapters() == [name]
        assert {module.scaling[name] for module in network.modules() if hasattr(module, "scaling")} == {preset.scale}
        few = run(pipe, given, **call)
        assert len(pipe.scheduler.timesteps) == preset.steps[0]
    torch.manual_seed(5)
    assert {**facts(pipe), "random": 0} == {**before, "random": 0}
    assert torch.equal(run(pipe, given), plain)
    # Diffusers' own steps, by hand, make the same picture.
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="by_hand")
    pipe.set_adapters(["by_hand"], [preset.scale])
    known = {key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"}  # the new class's differ
    pipe.scheduler = preset.scheduler.from_config(known, **preset.settings)
    assert torch.equal(run(pipe, given, **call), few)
    pipe.set_adapters(["by_hand"], [0.0])
    assert not torch.allclose(run(pipe, given, **call), few)


def test_files_in_the_names_of_other_trainers_are_read_with_their_own_scale(tmp_path: Path) -> None:
    """Half of the published files are in kohya's format, where a layer's alpha over its rank scales it beside the preset's scale."""
    from safetensors.torch import load_file, save_file

    pipe, given = sd_pipeline()
    stored = load_file(save_lora(pipe, tmp_path))
    renamed = {}
    for key, value in stored.items():
        path, factor = key.removeprefix("unet.").rsplit(".lora_", 1)
        stem = f"lora_unet_{path.replace('.', '_')}"
        renamed[f"{stem}.lora_{'down' if factor == 'A.weight' else 'up'}.weight"] = value
        renamed[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(renamed, tmp_path / "kohya.safetensors")
    half = dataclasses.replace(PUBLISHED["lcm-sd15"], scale=0.5)
    with few_step(pipe, half, weights=tmp_path) as call:
        expected = run(pipe, given, **call)
    with few_step(pipe, "lcm-sd15", weights=tmp_path / "kohya.safetensors") as call:
        torch.testing.assert_close(run(pipe, given, **call), expected)
    missing = {key: value for key, value in renamed.items() if not key.endswith("to_k.alpha")}
    missing["lora_unet_down_blocks_7_resnets_0_conv1.lora_down.weight"] = torch.zeros(2, 8, 3, 3)
    missing["lora_unet_down_blocks_7_resnets_0_conv1.lora_up.weight"] = torch.zeros(8, 2, 1, 1)
    save_file(missing, tmp_path / "more.safetensors")
    refused(pipe, "for another base: it adapts", "lcm-sd15", weights=tmp_path / "more.safetensors")


def test_nothing_is_drawn_from_the_global_generator(tmp_path: Path) -> None:
    pipe, _ = sd_pipeline()
    save_lora(pipe, tmp_path)
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    with few_step(pipe, "lcm-sd15", weights=tmp_path):
        assert torch.equal(torch.randn(3), expected)


def test_an_exception_leaves_no_trace_either(tmp_path: Path) -> None:
    pipe, given = sdxl_pipeline()
    save_lora(pipe, tmp_path)
    plain, before = run(pipe, given), facts(pipe)
    with pytest.raises(Interrupted), few_step(pipe, "lcm-sdxl", weights=tmp_path):
        raise Interrupted
    assert torch.equal(run(pipe, given), plain)
    torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
    assert facts(pipe) == before


def with_style(pipe: Any, folder: Path) -> None:
    """Two adapters, on other layers than the step LoRA's in part: one is active at 0.7 and the other is not."""
    for seed, name in ((1, "style"), (2, "other")):
        file = save_lora_of(pipe, folder / name, seed)
        pipe.load_lora_weights(folder / name, weight_name=file, adapter_name=name)
    pipe.set_adapters(["style"], [0.7])


def save_lora_of(pipe: Any, folder: Path, seed: int) -> str:
    fresh, _ = sd_pipeline()
    return save_lora(fresh, folder, seed=seed, layers=["to_q", "to_v", "conv2"]).name


def test_adapters_that_were_loaded_stay_as_they_were(tmp_path: Path) -> None:
    pipe, given = sd_pipeline()
    save_lora(sd_pipeline()[0], tmp_path)
    with_style(pipe, tmp_path)
    plain, before = run(pipe, given), facts(pipe)
    assert before["loaded"] == ["other", "style"]
    with (
        pytest.warns(UserWarning, match="style stays active beside hyper-sd15-4"),
        few_step(pipe, "hyper-sd15-4", weights=tmp_path) as call,
    ):
        assert pipe.get_active_adapters() == ["style", "hyper-sd15-4"]
        both = run(pipe, given, **call)
        layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
        assert layer.scaling == {"style": 0.7, "other": 1.0, "hyper-sd15-4": 1.0}
        pipe.set_adapters(["hyper-sd15-4"], [1.0])  # what a user does there is undone as well
        assert not torch.allclose(run(pipe, given, **call), both)
        pipe.set_adapters(["other", "style"], [0.2, 0.3])
    assert torch.equal(run(pipe, given), plain)
    torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
    assert facts(pipe) == before


def test_adapters_that_were_off_stay_off_and_do_not_act_within(tmp_path: Path) -> None:
    pipe, given = sd_pipeline()
    save_lora(pipe, tmp_path)
    with few_step(pipe, "hyper-sd15-4", weights=tmp_path) as call:
        alone = run(pipe, given, **call)
    with_style(pipe, tmp_path)
    pipe.disable_lora()
    plain, before = run(pipe, given), facts(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with few_step(pipe, "hyper-sd15-4", weights=tmp_path) as call:
            assert torch.equal(run(pipe, given, **call), alone)
    assert torch.equal(run(pipe, given), plain)
    torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
    assert facts(pipe) == before
    pipe.enable_lora()
    assert not torch.allclose(run(pipe, given), plain)


def test_what_is_fused_or_unloaded_within_the_block_is_put_right(tmp_path: Path) -> None:
    pipe, given = sd_pipeline()
    save_lora(pipe, tmp_path)
    plain = run(pipe, given)
    with few_step(pipe, "lcm-sd15", weights=tmp_path):
        pipe.unload_lora_weights()
    assert torch.equal(run(pipe, given), plain)
    with few_step(pipe, "lcm-sd15", weights=tmp_path):
        pipe.fuse_lora()
    torch.testing.assert_close(run(pipe, given), plain, rtol=1e-3, atol=1e-4)
    assert not any(hasattr(module, "base_layer") for module in pipe.unet.modules())


# ---------------------------------------------------------------------------------------------------------------- errors


def refused(pipe: Any, message: str, preset: str | Preset, *args: Any, **kwargs: Any) -> None:
    """An error of one line, that leaves no trace."""
    before = facts(pipe)
    with pytest.raises(ValueError, match=message) as caught, few_step(pipe, preset, *args, **kwargs):
        pass
    assert "\n" not in str(caught.value)
    torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
    assert facts(pipe) == before


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    pipe, _ = sd_pipeline()
    save_lora(pipe, tmp_path)
    refused(pipe, "preset must be one of PUBLISHED, not 'hyper-sd15-5'; did you mean hyper-sd15-", "hyper-sd15-5")
    refused(
        pipe, "hyper-sdxl-4 is for SDXL, a Stable Diffusion XL UNet, and this StableDiffusionPipeline has a Stable Diffusion 1 or 2 UNet",
        "hyper-sdxl-4",
    )  # fmt: skip
    refused(pipe, "steps must be 4, which hyper-sd15-4 was made for, not 8", "hyper-sd15-4", 8)
    refused(pipe, "steps must be from 2 to 8, which lcm-sd15 was made for, not 1", "lcm-sd15", 1)
    refused(pipe, "guidance_scale must be from 0 to 2, which lcm-sd15 was made for, not 7.5", "lcm-sd15", guidance_scale=7.5)
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    refused(pipe, "with prediction_type 'epsilon', and the scheduler's is 'v_prediction'", "lcm-sd15", weights=tmp_path)
    refused(flux_pipeline()[0], "has a FLUX without embedded guidance", "hyper-flux-8")
    with (
        pytest.raises(ValueError, match="PixArtAlphaPipeline cannot load LoRAs"),
        few_step(pixart_pipeline()[0], "lcm-sd15", weights=tmp_path),
    ):
        pass


def test_a_lora_of_the_name_or_a_fused_one_is_refused(tmp_path: Path) -> None:
    pipe, given = sd_pipeline()
    file = save_lora(pipe, tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="lcm-sd15")
    refused(pipe, "an adapter called lcm-sd15 is loaded already", "lcm-sd15", weights=tmp_path)
    pipe.fuse_lora()
    fused = run(pipe, given)
    refused(pipe, "lcm-sd15 is fused, so that hyper-sd15-4 would have no effect", "hyper-sd15-4", weights=tmp_path)
    assert torch.equal(run(pipe, given), fused)


def test_weights_of_another_base_are_refused_and_leave_no_trace(tmp_path: Path) -> None:
    """Of other widths, and of a base with layers that this one lacks: diffusers would load the rest, and only say so in its log."""
    pipe, given = sd_pipeline()
    plain = run(pipe, given)
    wide, _ = sd_pipeline()
    wide.unet = type(wide.unet).from_config(wide.unet.config, cross_attention_dim=24)
    save_lora(wide, tmp_path / "wide")
    refused(pipe, "does not fit this StableDiffusionPipeline: .*size mismatch", "lcm-sd15", weights=tmp_path / "wide")
    deep, _ = sd_pipeline()
    deep.unet = type(deep.unet).from_config(deep.unet.config, transformer_layers_per_block=2)
    save_lora(deep, tmp_path / "deep")
    refused(pipe, r"is for another base: it adapts \d+ layers, of which this UNet2DConditionModel has \d+", "lcm-sd15",
            weights=tmp_path / "deep")  # fmt: skip
    foreign = save_lora(sd3_pipeline()[0], tmp_path / "sd3")
    refused(pipe, "is for another base: it adapts", "lcm-sd15", weights=foreign)
    assert torch.equal(run(pipe, given), plain)


def test_a_lora_of_another_base_does_not_spoil_adapters_that_were_loaded(tmp_path: Path) -> None:
    pipe, given = sd_pipeline()
    with_style(pipe, tmp_path)
    plain = run(pipe, given)
    wide, _ = sd_pipeline()
    wide.unet = type(wide.unet).from_config(wide.unet.config, cross_attention_dim=24)
    save_lora(wide, tmp_path / "wide")
    with pytest.warns(UserWarning, match="style"):
        refused(pipe, "size mismatch", "lcm-sd15", weights=tmp_path / "wide")
    assert torch.equal(run(pipe, given), plain)


def test_weights_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = sd_pipeline()
    with pytest.raises(FileNotFoundError, match="no weights of lcm-sd15 at"), few_step(pipe, "lcm-sd15", weights=tmp_path):
        pass
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    refused(pipe, "is no safetensors file", "lcm-sd15", weights=tmp_path / "broken.safetensors")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, str]] = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(FileNotFoundError, match=r"weights= takes a file"), few_step(pipe, "pcm-sd15-4"):
        pass
    assert asked == [("wangfuyun/PCM_Weights", "sd15/pcm_sd15_smallcfg_4step_converted.safetensors")]


def test_the_file_of_a_preset_is_found_in_a_folder_that_holds_several(tmp_path: Path) -> None:
    pipe, _ = sd_pipeline()
    save_lora(pipe, tmp_path, "pytorch_lora_weights.safetensors", seed=1)
    wanted = save_lora(pipe, tmp_path, "Hyper-SD15-4steps-lora.safetensors", seed=2)
    from safetensors.torch import load_file

    with few_step(pipe, "hyper-sd15-4", weights=tmp_path):
        layer: nn.Module = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
        loaded: Tensor = layer.lora_A["hyper-sd15-4"].weight  # type: ignore[index, union-attr]
        stored = load_file(wanted)["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"]
        assert torch.equal(loaded, stored)


def test_a_preset_of_one_s_own(tmp_path: Path) -> None:
    pipe, _ = sd_pipeline()
    save_lora(pipe, tmp_path)
    mine = dataclasses.replace(PUBLISHED["lcm-sd15"], name="mine", steps=(3,), scale=0.5)
    with few_step(pipe, mine, weights=tmp_path) as call:
        assert call["num_inference_steps"] == 3 and pipe.get_active_adapters() == ["mine"]
    for wrong, message in (
        ({"base": "SD 4"}, "base must be one of SD 1.5"),
        ({"steps": ()}, "steps must be whole numbers"),
        ({"guidance": (2.0, 3.0)}, "guidance must be"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"timesteps": (999, 499)}, "steps must be the number of timesteps, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(mine, **wrong)
