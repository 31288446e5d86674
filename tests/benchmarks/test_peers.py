"""Other projects' caches: they do something where they run, fail with their own error where not, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from hasten.benchmarks import peers
from hasten.benchmarks.peers import DBCache, DeepCache, FirstBlock, MagCache, Peer, PeerMissing, attempt, families_for, grid, installed
from tests.families import Ready, auraflow, flux_pipeline, pixart_pipeline, run

STEPS = 10

FAMILIES = ("cache-dit", "cache-dit-taylorseer", "diffusers-first-block", "diffusers-magcache", "diffusers-taylorseer", "deepcache")


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def auraflow_pipeline() -> Ready:
    """Dual- and single-stream blocks, guidance in one batch."""
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    pipe = AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=auraflow()[0], scheduler=FlowMatchEulerDiscreteScheduler()
    )
    call = {
        "prompt_embeds": _randn(100, 1, 5, 24),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": _randn(101, 1, 5, 24),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
        "num_inference_steps": 6,
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe, call


def unet_pipeline() -> Ready:
    """Stable Diffusion's layout of blocks, two layers each."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4,) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64, mid_block_add_attention=False,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 24),
        "negative_prompt_embeds": _randn(101, 1, 5, 24),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
        "num_inference_steps": 6,
        "output_type": "latent",
        "return_dict": False,
    }
    return pipe, call


PIPELINES = {"pixart": pixart_pipeline, "flux": flux_pipeline, "auraflow": auraflow_pipeline, "unet": unet_pipeline}

FAILS = {
    ("diffusers-first-block", "pixart"): "No cache context is set",
    ("diffusers-taylorseer", "pixart"): "No cache context is set",
    ("diffusers-first-block", "auraflow"): "not registered",
    ("diffusers-magcache", "auraflow"): "not registered",
    ("diffusers-taylorseer", "auraflow"): "No cache context is set",
}
"""Where a peer does not serve a pipeline, and words of its error."""

CASES = [(name, pipeline) for pipeline in PIPELINES for name in FAMILIES if (name == "deepcache") == (pipeline == "unet")]


def _ready(pipeline: str) -> Ready:
    pipe, call = PIPELINES[pipeline]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS}


def _need(name: str) -> None:
    if name.startswith("cache-dit"):
        pytest.importorskip("cache_dit")
    if name == "deepcache":
        pytest.importorskip("DeepCache")


def _bold(name: str) -> Peer:
    """A setting that reuses even among the few steps of a test, on random weights."""
    if name.startswith("cache-dit"):
        return next(type(peer)(10.0, 2, 2) for peer in grid(name) if isinstance(peer, DBCache))
    return {
        "diffusers-first-block": FirstBlock(10.0),
        "diffusers-magcache": MagCache(10.0, 3, 0.2),
        "diffusers-taylorseer": grid("diffusers-taylorseer")[1],
        "deepcache": DeepCache(3),
    }[name]


def _calls(pipe: Any) -> list[int]:
    """Counts the calls of the attention modules of the pipeline's present denoiser."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    counted = [0]

    def count(*_: Any) -> None:
        counted[0] += 1

    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    for module in denoiser.modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            module.to_q.register_forward_hook(count)
    return counted


@pytest.mark.parametrize(("name", "pipeline"), CASES)
def test_a_peer_reuses_or_fails_with_its_own_error_and_leaves_nothing_behind(name: str, pipeline: str) -> None:
    _need(name)
    pipe, call = _ready(pipeline)
    before = run(pipe, call)
    kind, attributes, method = type(pipe), dict(vars(pipe)), type(pipe).__call__
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    modules = {path: (module, dict(vars(module))) for path, module in denoiser.named_modules()}

    def counted(target: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        calls = _calls(target)
        return run(target, call), run(target, call), calls[0]

    def calibrate(target: Any) -> None:
        run(target, call)

    found, error = attempt(_bold(name), pipe, counted, steps=STEPS, calibration=calibrate)
    reused = 0
    if (name, pipeline) in FAILS:
        assert found is None
        assert error is not None and FAILS[name, pipeline] in error
    else:
        assert error is None, error
        assert found is not None
        first, second, reused = found
        assert torch.isfinite(first).all()
        assert not torch.equal(first, before)  # it did reuse something
        assert torch.equal(first, second)  # and nothing of the call before
        with pytest.raises(RuntimeError, match="stop"), _bold(name).on(pipe, steps=STEPS, calibration=calibrate):
            raise RuntimeError("stop")
    assert type(pipe) is kind and kind.__call__ is method and not hasattr(kind, "_is_cached")
    assert vars(pipe) == attributes
    assert dict(denoiser.named_modules()) == {path: module for path, (module, _) in modules.items()}
    assert all(vars(module) == state for module, state in modules.values())
    assert torch.equal(run(pipe, call), before)
    plain = _calls(pipe)
    run(pipe, call)
    assert reused < 2 * plain[0]


def test_the_double_shares_weights_and_nothing_else() -> None:
    pipe, call = _ready("flux")
    before = run(pipe, call)
    kind, own, denoiser = type(pipe), dict(vars(pipe)), pipe.transformer
    with peers._isolated(pipe):
        assert type(pipe) is not kind and type(pipe).__name__ == kind.__name__ and isinstance(pipe, kind)
        assert pipe.transformer is not denoiser
        assert all(a is b for a, b in zip(pipe.transformer.parameters(), denoiser.parameters(), strict=True))
        assert torch.equal(run(pipe, call), before)
        type(pipe).__call__ = None
        type(pipe).marked = True
        pipe.marked = True
        pipe.transformer.transformer_blocks[0].forward = None
    assert type(pipe) is kind and not hasattr(pipe, "marked")
    assert pipe.transformer is denoiser and "forward" not in vars(denoiser.transformer_blocks[0])
    assert vars(pipe).keys() == own.keys()
    assert torch.equal(run(pipe, call), before)


def test_importing_cache_dit_leaves_the_process_as_it_was() -> None:
    pytest.importorskip("cache_dit")
    script = """
import logging, os, sys, transformers
from hasten.benchmarks import peers
before = dict(os.environ)
assert "cache_dit" not in sys.modules
peers._cache_dit()
assert "cache_dit" in sys.modules and dict(os.environ) == before
assert not any(getattr(method, "__module__", "").startswith("cache_dit") for method in vars(logging.Logger).values())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_one_grid_measures_a_model_for_magcache_once() -> None:
    pipe, call = _ready("flux")
    calls = []

    def calibrate(target: Any) -> None:
        calls.append(run(target, call))

    for peer in grid("diffusers-magcache"):
        _, error = attempt(peer, pipe, lambda target: run(target, call), steps=STEPS, calibration=calibrate)
        assert error is None
    assert len(calls) == 1
    with pytest.raises(ValueError, match="calibration="), MagCache(0.1, 3, 0.2).on(pipe, steps=STEPS):
        pass
    _, error = attempt(grid("diffusers-magcache")[0], pipe, lambda target: None, steps=STEPS)
    assert error is not None and "found no ratios" in error


def test_grids_have_settings_enough_for_a_front_and_names_of_their_own() -> None:
    assert set(installed()) == set(FAMILIES)
    for name in FAMILIES:
        settings = grid(name)
        assert len(settings) >= 6
        assert len({str(peer) for peer in settings}) == len(set(settings)) == len(settings)
        assert all(peer.name == name and peer.version == installed()[name] for peer in settings)
    assert grid("deepcache")[0].settings == {"interval": 2, "branch": 0}
    assert "ratios" not in grid("diffusers-magcache")[0].settings
    with pytest.raises(ValueError, match="no peer is called 'xdit'; there are cache-dit"):
        grid("xdit")


def test_families_follow_what_the_pipeline_denoises_with() -> None:
    assert families_for(pixart_pipeline()[0]) == [name for name in FAMILIES if name != "deepcache"]
    assert families_for(unet_pipeline()[0]) == ["deepcache"]
    assert families_for(object()) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise peers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", missing)
    assert set(installed().values()) == {None}
    with pytest.raises(PeerMissing, match="pip install DeepCache"):
        attempt(DeepCache(2), unet_pipeline()[0], lambda pipe: None)
