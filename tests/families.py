"""Tiny random denoisers of many families, with inputs for one call: what the caching tests run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Callable[[int], dict[str, Any]]]
"""A denoiser, and the keyword arguments of its call for a seed (the latents and the timestep follow the seed, the text does not)."""


def _randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ready(model: nn.Module) -> nn.Module:
    """Weights from one seed, large enough that every block matters; gates and modulations start at zero in some families."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and float(p.abs().max()) == 0.0:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            elif p.ndim == 1 and "bias" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.eval()


def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=6, cross_attention_dim=32,
        caption_channels=24, sample_size=8, patch_size=1, use_additional_conditions=False,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 2, 4, 8, 8),
            "encoder_hidden_states": _randn(100, 2, 5, 24),
            "timestep": torch.tensor([900 - seed, 900 - seed]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    return _ready(model), inputs


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 2, 4, 8, 8),
            "encoder_hidden_states": _randn(100, 2, 5, 24),
            "pooled_projections": _randn(101, 2, 12),
            "timestep": torch.tensor([900.0 - seed] * 2),
            "return_dict": False,
        }

    return _ready(model), inputs


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        ids = torch.zeros(16, 3)
        ids[:, 1] = torch.arange(16) // 4
        ids[:, 2] = torch.arange(16) % 4
        return {
            "hidden_states": _randn(seed, 2, 16, 4),
            "encoder_hidden_states": _randn(100, 2, 5, 24),
            "pooled_projections": _randn(101, 2, 12),
            "timestep": torch.tensor([0.9 - 0.01 * seed] * 2),
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
            "return_dict": False,
        }

    return _ready(model), inputs


def wan() -> Built:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=5, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 1, 4, 2, 8, 8),
            "encoder_hidden_states": _randn(100, 1, 5, 16),
            "timestep": torch.tensor([900 - seed]),
            "return_dict": False,
        }

    return _ready(model), inputs


def latte() -> Built:
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, cross_attention_dim=32,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24, video_length=3,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 1, 4, 3, 8, 8),
            "encoder_hidden_states": _randn(100, 1, 5, 24),
            "timestep": torch.tensor([900 - seed]),
            "enable_temporal_attentions": True,
            "return_dict": False,
        }

    return _ready(model), inputs


def hunyuan_dit() -> Built:
    from diffusers import HunyuanDiT2DModel

    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        sample_size=8, num_layers=6, patch_size=2, attention_head_dim=16, num_attention_heads=2, mlp_ratio=2.0,
        cross_attention_dim=24, cross_attention_dim_t5=24, pooled_projection_dim=8, hidden_size=32, text_len=4, text_len_t5=4,
        activation_fn="gelu-approximate", in_channels=4,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        rotary = get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
        return {
            "hidden_states": _randn(seed, 2, 4, 8, 8),
            "timestep": torch.tensor([900.0 - seed] * 2),
            "encoder_hidden_states": _randn(100, 2, 4, 24),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": _randn(101, 2, 4, 24),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": rotary,
            "return_dict": False,
        }

    return _ready(model), inputs


def lumina2() -> Built:
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64), cap_feat_dim=16,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 2, 4, 8, 8),
            "encoder_hidden_states": _randn(100, 2, 5, 16),
            "timestep": torch.tensor([0.1 + 0.01 * seed] * 2),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "return_dict": False,
        }

    return _ready(model), inputs


def auraflow() -> Built:
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": _randn(seed, 2, 4, 8, 8),
            "encoder_hidden_states": _randn(100, 2, 5, 24),
            "timestep": torch.tensor([0.9 - 0.01 * seed] * 2),
            "return_dict": False,
        }

    return _ready(model), inputs


FAMILIES: dict[str, Callable[[], Built]] = {
    "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "latte": latte, "hunyuan_dit": hunyuan_dit, "lumina2": lumina2,
    "auraflow": auraflow,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ pipelines

Ready = tuple[Any, dict[str, Any]]
"""An unmodified pipeline without text encoders, and the keyword arguments of its call: embeddings, seedless latents, few steps."""


def pixart_pipeline(scheduler: Any = None) -> Ready:
    """Guidance in one batch."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=pixart()[0], scheduler=scheduler or DDIMScheduler(clip_sample=False)
    )
    call = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": _randn(100, 1, 5, 24),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": _randn(101, 1, 5, 24),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "guidance_scale": 3.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


def sd3_pipeline(scheduler: Any = None) -> Ready:
    """Guidance in one batch, and a third call with layers left out where `skip_guidance_layers` says so."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=sd3()[0], scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 24),
        "negative_prompt_embeds": _randn(101, 1, 5, 24),
        "pooled_prompt_embeds": _randn(102, 1, 12),
        "negative_pooled_prompt_embeds": _randn(103, 1, 12),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


def flux_pipeline(scheduler: Any = None) -> Ready:
    """Guidance-distilled: one call a step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=flux()[0],
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 24),
        "pooled_prompt_embeds": _randn(102, 1, 12),
        "latents": _randn(1, 1, 16, 4),
        "height": 64,
        "width": 64,
    }
    return _quiet(pipe), {**call, **_SHORT}


def flux_control_pipeline(scheduler: Any = None) -> Ready:
    """A ControlNet adds residuals between the blocks."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxControlNetPipeline

    transformer = flux()[0]
    torch.manual_seed(5)
    controlnet = _ready(FluxControlNetModel.from_config({**transformer.config, "num_layers": 2, "num_single_layers": 2}))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4,) * 4,
        layers_per_block=1, latent_channels=1, norm_num_groups=2, sample_size=64, mid_block_add_attention=False,
        shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    pipe = FluxControlNetPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer, controlnet=controlnet,
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 24),
        "pooled_prompt_embeds": _randn(102, 1, 12),
        "latents": _randn(1, 1, 16, 4),
        "control_image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)),
        "controlnet_conditioning_scale": 0.8,
        "height": 64,
        "width": 64,
    }
    return _quiet(pipe), {**call, **_SHORT}


def wan_pipeline(scheduler: Any = None) -> Ready:
    """Guidance in two calls, each in a `cache_context`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), transformer=wan()[0]
    )
    call = {
        "prompt_embeds": _randn(100, 1, 5, 16),
        "negative_prompt_embeds": _randn(101, 1, 5, 16),
        "latents": _randn(1, 1, 4, 2, 8, 8),
        "num_frames": 5,
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


def lumina2_pipeline(scheduler: Any = None) -> Ready:
    """Guidance in two calls that name no context; `cfg_trunc_ratio` leaves the second one out towards the end."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    pipe = Lumina2Pipeline(
        transformer=lumina2()[0], scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None
    )
    call = {
        "prompt_embeds": _randn(100, 1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "negative_prompt_embeds": _randn(101, 1, 5, 16),
        "negative_prompt_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


def _unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return _ready(UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, norm_num_groups=2, **options,
    ))  # fmt: skip


def sd_pipeline(scheduler: Any = None) -> Ready:
    """Stable Diffusion 1: a UNet, guidance in one batch."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=_unet(), scheduler=scheduler or DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 16),
        "negative_prompt_embeds": _randn(101, 1, 5, 16),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


def sdxl_pipeline(scheduler: Any = None) -> Ready:
    """Stable Diffusion XL: sizes and pooled text beside the timestep."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12)
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=scheduler or EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    call = {
        "prompt_embeds": _randn(100, 1, 5, 16),
        "negative_prompt_embeds": _randn(101, 1, 5, 16),
        "pooled_prompt_embeds": _randn(102, 1, 12),
        "negative_pooled_prompt_embeds": _randn(103, 1, 12),
        "latents": _randn(1, 1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
    }
    return _quiet(pipe), {**call, **_SHORT}


_SHORT = {"num_inference_steps": 6, "output_type": "latent", "return_dict": False}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Callable[..., Ready]] = {
    "pixart": pixart_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline, "flux_control": flux_control_pipeline,
    "wan": wan_pipeline, "lumina2": lumina2_pipeline,
}  # fmt: skip


UNETS: dict[str, Callable[..., Ready]] = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}


def run(target: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """The latents that a pipeline, plain or accelerated, makes of a call. What it draws itself (a VAE's sample) is the same each time."""
    torch.manual_seed(0)
    return target(**{**call, **changes})[0]
