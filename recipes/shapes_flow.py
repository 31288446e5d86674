"""Trains the `shapes-flow` model: `python recipes/shapes_flow.py`. See recipes/README.md for what was tried.

VAE, text encoder and tokenizer are those of `shapes` (recipes/shared.py); the denoiser is an AuraFlowTransformer2DModel with dual- and
single-stream blocks that predicts the velocity of a rectified flow. Checkpoints lie in runs/shapes-flow.
"""

from __future__ import annotations

from typing import Any, ClassVar

import denoising
import shared
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import world


class ShapesFlow(denoising.Denoising):
    """MM-DiT with two dual-stream and four single-stream blocks, rectified flow."""

    name = "shapes-flow"
    port = 29_532
    steps = 3_000
    width, heads, dual, single = 144, 4, 2, 4
    align_width = width
    sampling: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 50,
        "guidance_scale": 2.5,
        "max_sequence_length": shared.TEXT_LENGTH,
        "height": world.RESOLUTION,  # the class draws 1024 x 1024 unless told
        "width": world.RESOLUTION,
    }
    call = f"height=64, width=64, num_inference_steps=50, guidance_scale=2.5, max_sequence_length={shared.TEXT_LENGTH}"
    summary = f"an unmodified `AuraFlowPipeline` (rectified flow, {dual} dual-stream and {single} single-stream blocks of width {width})"

    def network(self) -> AuraFlowTransformer2DModel:
        side = world.RESOLUTION // 8
        return AuraFlowTransformer2DModel(
            sample_size=side,
            patch_size=1,
            in_channels=shared.LATENT_CHANNELS,
            out_channels=shared.LATENT_CHANNELS,
            num_mmdit_layers=self.dual,
            num_single_dit_layers=self.single,
            attention_head_dim=self.width // self.heads,
            num_attention_heads=self.heads,
            joint_attention_dim=shared.TEXT_WIDTH,
            caption_projection_dim=self.width,
            pos_embed_max_size=side * side,
        )

    def watched(self, network: nn.Module) -> nn.Module:
        return network.single_transformer_blocks[0]

    def tokens(self, out: Tensor) -> Tensor:
        return out[:, -64:]  # the text comes first

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        # The same noise-to-signal ratios as in `shapes` crowd higher on a rectified flow's axis.
        crowded = torch.sigmoid(1.2 * torch.randn(n, generator=generator) + 1.0)
        even = torch.rand(n, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < 0.2, even, crowded)

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = u.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, u, noise - latents, torch.ones_like(u)

    def predict(self, network: nn.Module, noisy: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        # The pipeline sets padding to zero and masks nothing.
        return network(noisy, encoder_hidden_states=text * mask[..., None], timestep=times).sample

    def pipeline(self, tokenizer: T5Tokenizer, text: T5EncoderModel, vae: AutoencoderKL, network: Any) -> DiffusionPipeline:
        return AuraFlowPipeline(tokenizer, text, vae, network, FlowMatchEulerDiscreteScheduler(shift=3.0))


if __name__ == "__main__":
    denoising.main(ShapesFlow(), __doc__ or "")
