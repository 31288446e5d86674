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
