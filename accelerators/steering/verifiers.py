"""What judges images: a protocol, a check of what it returns, and verifiers that need no weights.

A verifier is any callable from images (and prompts) to one score per image, higher is better; with the attributes of `Verifier` it also
tells whether gradients pass and within what range its scores lie. Two more may be there: `spread`, the standard deviation of its scores
over plain samples of a prompt, and `for_estimates`, the verifier that judges estimates in its place while a sample is steered.
"""

from __future__ import annotations

import inspect
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


class VerifierError(ValueError):
    """A verifier returned something that is not one score per image; the message says what to change."""


@runtime_checkable
class Verifier(Protocol):
    """Scores images."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients of the scores reach the images."""
        ...

    @property
    def range_hint(self) -> tuple[float, float] | None:
        """The lowest and the highest score to expect, None if unknown."""
        ...

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] (videos: [N, F, 3, H, W]) in 0 to 1, one prompt for each; higher is better."""
        ...


class RewardWarning(UserWarning):
    """A verifier returned NaN or infinity for some image."""


@dataclass(frozen=True, eq=False)
class Callback:
    """A plain function as a verifier; see `as_verifier`."""

    function: Callable[..., Tensor]
    takes_prompts: bool
    differentiable: bool = True
    range_hint: tuple[float, float] | None = None
    name: str = ""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the function returns."""
        return self.function(images, prompts) if self.takes_prompts else self.function(images)

    def __str__(self) -> str:
        return self.name or getattr(self.function, "__name__", type(self.function).__name__)


def as_verifier(verifier: Verifier | Callable[..., Tensor]) -> Verifier:
    """The verifier itself, or the callable `f(images, prompts)` or `f(images)` made one; such a one is taken to be differentiable.

    Raises:
        VerifierError: It is neither.
    """
    if isinstance(verifier, Verifier):
        return verifier
    scorer = getattr(verifier, "score", None)
    if callable(scorer):  # only the other attributes are missing
        return Callback(scorer, takes_prompts=True, name=type(verifier).__name__)
    if not callable(verifier):
        raise VerifierError(f"a verifier must be callable or have score(images, prompts), not {type(verifier).__name__}")
    try:
        parameters = inspect.signature(verifier).parameters.values()
    except ValueError:  # some built-in functions have none
        return Callback(verifier, takes_prompts=True)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return Callback(verifier, takes_prompts=several or len(required) > 1 or any(p.name == "prompts" for p in positional))


def name_of(verifier: Verifier) -> str:
    """For messages and reports."""
    return str(verifier) if isinstance(verifier, Callback) else type(verifier).__name__


def checked_score(verifier: Verifier, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The verifier's scores [N] in float32 (float64 stays), NaN and +inf replaced by -inf with a warning: such an image loses.

    Raises:
        VerifierError: There is not exactly one score per image.
    """
    if len(prompts) != len(images):
        raise VerifierError(f"there are {len(images)} images but {len(prompts)} prompts; give one prompt per image")
    scores: Any = verifier.score(images, prompts)
    if not isinstance(scores, Tensor):
        raise VerifierError(f"{name_of(verifier)} must return a tensor with one score per image, not {type(scores).__name__}")
    if scores.shape != (len(images),):
        if scores.numel() == len(images):
            hint = "; flatten it"
        elif scores.ndim == 0:
            hint = "; average over each image, not over the batch"
        else:
            hint = ""
        raise VerifierError(f"{name_of(verifier)} must return one score per image, shape [{len(images)}], not {list(scores.shape)}{hint}")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    broken = scores.isnan() | scores.isposinf()
    if broken.any():
        warnings.warn(
            f"{name_of(verifier)} returned NaN or infinity for {int(broken.sum())} of {len(images)} images; they lose (-inf)",
            RewardWarning,
            stacklevel=2,
        )
        scores = torch.where(broken, -torch.inf, scores)
    return scores


# ----------------------------------------------------------------------------------------------------------- weight-free


@dataclass(frozen=True)
class Brightness:
    """Mean luma, 0 (black) to 1 (white)."""

    differentiable = True
    range_hint = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] or videos [N, F, 3, H, W] in 0 to 1."""
        return _luma(images).flatten(1).mean(1)


@dataclass(frozen=True)
class ColourTarget:
    """Minus the root mean square distance of the pixels from a colour: 0 is an image of that colour alone.

    Attributes:
        colour: Red, green and blue, each in 0 to 1.

    Raises:
        ValueError: It is no such colour.
    """

    colour: tuple[float, float, float] = (1.0, 0.0, 0.0)
    differentiable = True
    range_hint = (-1.0, 0.0)

    def __post_init__(self) -> None:
        if len(self.colour) != 3 or not all(0 <= channel <= 1 for channel in self.colour):
            raise ValueError(f"colour must be red, green and blue from 0 to 1, not {self.colour!r}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] or videos [N, F, 3, H, W] in 0 to 1."""
        images = _checked(images)
        off = images - images.new_tensor(self.colour)[:, None, None]
        return -(off.square().flatten(1).mean(1) + 1e-12).sqrt()  # the root has no gradient at 0


@dataclass(frozen=True)
class Sharpness:
    """Mean square of the luma's Laplacian: what blur takes away. Noise scores high too."""

    differentiable = True
    range_hint = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] or videos [N, F, 3, H, W] in 0 to 1; at least 3 pixels a side."""
        luma = _luma(images)
        middle = luma[..., 1:-1, 1:-1]
        around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
        return (around - 4 * middle).square().flatten(1).mean(1)


@dataclass(frozen=True)
class JPEGSize:
    """Size in kB as a JPEG file, or minus it: the compressibility rewards of DDPO (arXiv 2305.13301).

    Attributes:
        larger: Whether larger files score higher.
        quality: Of the JPEG encoder, 1 to 95; 95 in DDPO (recalled, not looked up).

    Raises:
        ValueError: `quality` is out of range.
    """

    larger: bool = False
    quality: int = 95
    differentiable = False
    range_hint = None

    def __post_init__(self) -> None:
        if type(self.quality) is not int or not 1 <= self.quality <= 95:
            raise ValueError(f"quality must be a whole number from 1 to 95, not {self.quality!r}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in 0 to 1; of videos [N, F, 3, H, W] the mean over frames."""
        from PIL import Image

        images = _checked(images).detach()
        frames = images.reshape(len(images), -1, *images.shape[-3:]).nan_to_num().clamp(0, 1).mul(255).round().byte().cpu()
        sizes = []
        for picture in frames.permute(0, 1, 3, 4, 2).flatten(0, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        means = torch.tensor(sizes).view(len(images), -1).mean(1).to(images.device)
        return means if self.larger else -means


def _checked(images: Tensor) -> Tensor:
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise VerifierError(f"images must have shape [N, 3, H, W], videos [N, F, 3, H, W], not {list(images.shape)}")
    return images


def _luma(images: Tensor) -> Tensor:
    """[N, H, W] or [N, F, H, W]."""
    return (_checked(images) * images.new_tensor(_LUMA)[:, None, None]).sum(-3)


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two rows of scores [N]; ties share their mean rank. 0 where one of them is constant.

    Raises:
        ValueError: The shapes differ, or there are fewer than two scores.
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"both must be rows of the same number of scores, at least 2, not {list(first.shape)} and {list(second.shape)}")
    a, b = (ranks(scores) - (len(scores) + 1) / 2 for scores in (first, second))
    scale = math.sqrt(float(a.square().sum() * b.square().sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def ranks(scores: Tensor) -> Tensor:
    """Ranks [N] in float64 from 1 (lowest) to N; ties share their mean rank."""
    below = (scores[None] < scores[:, None]).sum(1)
    level = (scores[None] == scores[:, None]).sum(1)
    return below + (level.double() + 1) / 2
