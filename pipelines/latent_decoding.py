"""From a pipeline's latents to images in 0 to 1, as the pipeline itself decodes them, but for rows of our choice and at any step.

Diffusers has no one way: latents may be packed, scaled, shifted, or normalised channel by channel, and of images or of videos.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.steering.controller import SteeringError

Decode = Callable[[Tensor], Tensor]


def decoder_of(pipe: Any, call: Mapping[str, Any]) -> Decode:
    """A function from latents [n, ...] to images [n, 3, H, W], or videos [n, F, 3, H, W], in 0 to 1.

    Args:
        pipe: The pipeline. Where it has no decoder its latents are taken to be pixels.
        call: The call's arguments, for the size of packed latents.

    Raises:
        SteeringError: How it decodes is not known; a function of one's own serves instead.
    """
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if vae is None:
        return pixels
    if bool(getattr(vae.config, "timestep_conditioning", False)):
        raise SteeringError(
            f"the decoder of {type(pipe).__name__} takes a timestep; give decode=, a function from latents to images in 0 to 1"
        )
    unpack = _unpacking(pipe, call)

    def decode(latents: Tensor) -> Tensor:
        raising = bool(getattr(vae.config, "force_upcast", False)) and vae.dtype == torch.float16
        if raising:
            vae.to(torch.float32)
        try:
            latents = _denormalised(vae, unpack(latents.to(vae.device, vae.dtype)))
            images = vae.decode(latents, return_dict=False)[0]
        finally:
            if raising:
                vae.to(torch.float16)
        return pixels(images)

    return decode


def pixels(images: Tensor) -> Tensor:
    """From -1 to 1 to 0 to 1, float32; videos [n, 3, F, H, W] to [n, F, 3, H, W], and one frame to an image."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    if images.ndim == 5:
        images = images.transpose(1, 2)
        return images[:, 0] if images.shape[1] == 1 else images
    return images


def _denormalised(vae: Any, latents: Tensor) -> Tensor:
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    if mean is not None and std is not None:
        shape = (1, -1, *(1,) * (latents.ndim - 2))
        around, by = (torch.tensor(values, dtype=latents.dtype, device=latents.device).view(shape) for values in (mean, std))
        # Video models keep no scaling factor beside them; Playground's and LTX's do.
        return latents * by / scale + around
    return latents / scale + float(getattr(config, "shift_factor", None) or 0.0)


def _unpacking(pipe: Any, call: Mapping[str, Any]) -> Decode:
    """What makes packed latents a grid again."""
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is None:
        return lambda latents: latents
    names = list(inspect.signature(unpack).parameters)
    if names[1:4] == ["height", "width", "vae_scale_factor"]:
        size = getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor
        height, width = (call.get(name) or size for name in ("height", "width"))
        return lambda latents: unpack(latents, height, width, pipe.vae_scale_factor) if latents.ndim == 3 else latents
    raise SteeringError(
        f"how {type(pipe).__name__} unpacks its latents ({', '.join(names)}) is not known; give decode=, a function from latents to images"
    )
