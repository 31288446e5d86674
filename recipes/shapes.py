"""Trains the `shapes` model from nothing: `python recipes/shapes.py`. See recipes/README.md for what was tried.

Five stages, each resumable (run the same command again): vae, text and decoder (recipes/shared.py), denoiser (a
PixArtTransformer2DModel, epsilon prediction), and export (an unmodified PixArtAlphaPipeline in bf16, scored on unseen captions, and
its card). Checkpoints lie in runs/shapes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import denoising
import shared
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import world


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", prediction_type="epsilon"
    )


ALPHAS = new_scheduler().alphas_cumprod


class Shapes(denoising.Denoising):
    """Cross-attention DiT, epsilon prediction."""

    name = "shapes"
    width, heads, layers, align_at = 192, 4, 7, 3
    align_width = width
    sampling: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 50,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "max_sequence_length": shared.TEXT_LENGTH,
        "clean_caption": False,
    }  # fmt: skip
    call = "num_inference_steps=50, guidance_scale=3.0, use_resolution_binning=False"
    summary = f"an unmodified `PixArtAlphaPipeline` (epsilon prediction, {layers} blocks of width {width})"

    def network(self) -> PixArtTransformer2DModel:
        return PixArtTransformer2DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.width // self.heads,
            in_channels=shared.LATENT_CHANNELS,
            out_channels=shared.LATENT_CHANNELS,
            num_layers=self.layers,
            cross_attention_dim=self.width,
            caption_channels=shared.TEXT_WIDTH,
            sample_size=world.RESOLUTION // 8,
            patch_size=1,
            interpolation_scale=1,
            use_additional_conditions=False,
        )

    def watched(self, network: nn.Module) -> nn.Module:
        return network.transformer_blocks[self.align_at]

    def tokens(self, out: Tensor) -> Tensor:
        return out

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return epsilon_noised(latents, noise, u)

    def predict(self, network: nn.Module, noisy: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return network(
            noisy,
            encoder_hidden_states=text,
            timestep=times,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample

    def pipeline(self, tokenizer: T5Tokenizer, text: T5EncoderModel, vae: AutoencoderKL, network: Any) -> DiffusionPipeline:
        return PixArtAlphaPipeline(tokenizer, text, vae, network, new_scheduler())


def epsilon_noised(latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variance-preserving noise, epsilon as the target, weighted by min(SNR, 5) / SNR."""
    times = (1000 * u).long().clamp(0, 999)
    alpha = ALPHAS[times]
    noisy = alpha.sqrt().view(-1, 1, 1, 1) * latents + (1 - alpha).sqrt().view(-1, 1, 1, 1) * noise
    snr = alpha / (1 - alpha)
    return noisy, times, noise, snr.clamp(max=5.0) / snr


if __name__ == "__main__":
    denoising.main(Shapes(), __doc__ or "")
