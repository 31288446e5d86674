"""What image processors do to pictures, done to tensors: resize, crop or pad, normalise, with gradients throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""By Pillow's number."""


def wide(values: Tensor) -> Tensor:
    """In float32 at least; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class Preprocess:
    """From images in 0 to 1 of any size to the pixel values of a model.

    Resizing is antialiased, in float32 at least, and clamped to 0 to 1 as 8-bit resizing is: bicubic weights overshoot at hard edges.

    Attributes:
        height: Of the pixel values.
        width: Of the pixel values.
        fit: "crop" resizes the shorter side to `edge` and cuts out the centre, "stretch" ignores the aspect ratio, "pad" resizes the
            longer side to `height` and centres the image on black.
        edge: Of the shorter side before the crop; `height` if None.
        mean: Subtracted, by channel.
        std: Divided by, by channel.
        mode: "bicubic" or "bilinear".

    Raises:
        ValueError: A value is none of these, the crop does not fit into the resized image, or padding is to a shape that is not square.
    """

    height: int = 224
    width: int = 224
    fit: str = "crop"
    edge: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "stretch", "pad"):
            raise ValueError(f"fit must be 'crop', 'stretch' or 'pad', not {self.fit!r}")
        if self.mode not in _RESAMPLING.values():
            raise ValueError(f"mode must be 'bicubic' or 'bilinear', not {self.mode!r}")
        if self.fit == "crop" and (self.edge or self.height) < max(self.height, self.width):
            raise ValueError(f"edge must be at least the crop of {self.height}x{self.width}, not {self.edge or self.height}")
        if self.fit == "pad" and self.height != self.width:
            raise ValueError(f"height and width must be equal when fit is 'pad', not {self.height} and {self.width}")

    @classmethod
    def of(cls, processor: Any) -> Preprocess:
        """What one of transformers' image processors does, if it only resizes, crops and normalises.

        Raises:
            ValueError: It does something else, or leaves the size open.
        """
        size: Any = processor.size or {}
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize) or processor.resample not in _RESAMPLING:
            raise ValueError("its image processor must resize (bilinear or bicubic), rescale and normalise")
        rest: dict[str, Any] = {
            "mean": tuple(processor.image_mean),
            "std": tuple(processor.image_std),
            "mode": _RESAMPLING[processor.resample],
        }
        if getattr(processor, "do_center_crop", None):
            if not size.get("shortest_edge") or size.get("longest_edge"):
                raise ValueError(f"its image processor must resize the shortest edge before it crops, not to {dict(size)}")
            return cls(processor.crop_size["height"], processor.crop_size["width"], "crop", size["shortest_edge"], **rest)
        if not (size.get("height") and size.get("width")):
            raise ValueError(f"its image processor must resize to one height and width, not to {dict(size)}")
        return cls(size["height"], size["width"], "stretch", **rest)

    def __call__(self, images: Tensor) -> Tensor:
        """Pixel values [N, 3, height, width] in float32 (float64 stays) of images [N, 3, H, W] in 0 to 1."""
        pixels = self._framed(wide(images)).clamp(0, 1)
        return (pixels - pixels.new_tensor(self.mean)[:, None, None]) / pixels.new_tensor(self.std)[:, None, None]

    def _framed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.fit == "stretch":
            return self._resized(images, self.height, self.width)
        if self.fit == "pad":
            scale = self.height / max(height, width)
            images = self._resized(images, max(1, round(height * scale)), max(1, round(width * scale)))
            below, right = self.height - images.shape[-2], self.width - images.shape[-1]
            return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))
        edge, shorter = self.edge or self.height, min(height, width)
        images = self._resized(images, int(edge * height / shorter), int(edge * width / shorter))
        top, left = (images.shape[-2] - self.height) // 2, (images.shape[-1] - self.width) // 2
        return images[..., top : top + self.height, left : left + self.width]

    def _resized(self, images: Tensor, height: int, width: int) -> Tensor:
        if images.shape[-2:] == (height, width):
            return images
        return F.interpolate(images, (height, width), mode=self.mode, antialias=True, align_corners=False)
