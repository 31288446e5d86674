"""Trains the `shapes-unet` model: `python recipes/shapes_unet.py`. See recipes/README.md for what was tried.

VAE, text encoder and tokenizer are those of `shapes` (recipes/shared.py); the denoiser is a UNet2DConditionModel of three levels in an
unmodified StableDiffusionPipeline, epsilon prediction. Checkpoints lie in runs/shapes-unet.
"""

from __future__ import annotations

from typing import Any, ClassVar

import denoising
import shared
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from shapes import epsilon_noised, new_scheduler
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import world


class ShapesUNet(denoising.Denoising):
    """UNet with cross-attention on its two upper levels, epsilon prediction."""

    name = "shapes-unet"
    port = 29_533
    widths = (64, 96, 80)
    align_width = widths[0]
    sampling: ClassVar[dict[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 3.0}
    call = "num_inference_steps=50, guidance_scale=3.0"
    summary = f"an unmodified `StableDiffusionPipeline` (epsilon prediction, levels of width {', '.join(map(str, widths))})"

    def network(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=world.RESOLUTION // 8,
            in_channels=shared.LATENT_CHANNELS,
            out_channels=shared.LATENT_CHANNELS,
            block_out_channels=self.widths,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=shared.TEXT_WIDTH,
            attention_head_dim=4,  # diffusers takes it for the number of heads
            norm_num_groups=16,
        )

    def watched(self, network: nn.Module) -> nn.Module:
        return network.up_blocks[-1].attentions[0]

    def tokens(self, out: tuple[Tensor]) -> Tensor:
        return out[0].flatten(2).transpose(1, 2)

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return epsilon_noised(latents, noise, u)

    def predict(self, network: nn.Module, noisy: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return network(noisy, times, encoder_hidden_states=text).sample  # the pipeline masks no padding

    def pipeline(self, tokenizer: T5Tokenizer, text: T5EncoderModel, vae: AutoencoderKL, network: Any) -> DiffusionPipeline:
        tokenizer.model_max_length = shared.TEXT_LENGTH
        text.config.use_attention_mask = True
        return StableDiffusionPipeline(vae, text, tokenizer, network, new_scheduler(), None, None, requires_safety_checker=False)


if __name__ == "__main__":
    denoising.main(ShapesUNet(), __doc__ or "")
