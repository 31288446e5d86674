"""The exact verifier of the `shapes` world as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.accelerators.steering.verifiers import VerifierError
from hasten.pipelines.zoo.shapes.verifier import BLURRED, EXACT, ShapesVerdict, Tolerance, verify


@dataclass(frozen=True)
class ShapesReward:
    """How much of what the caption says is in the picture, 0 to 1; 1 is a picture that is right in every respect.

    Attributes:
        tolerance: How exact a picture must be. The default lets pass the blur that estimates have in the middle of sampling.
        exact: Its share of the score belongs to what is right by the exact tolerance, so that of two pictures that both pass the
            cleaner wins.
    """

    tolerance: Tolerance = BLURRED
    exact: float = 0.5
    differentiable = False
    range_hint = (0.0, 1.0)
    spread = 0.1
    """One thing of eleven that is wrong."""

    @property
    def for_estimates(self) -> ShapesReward | None:
        """Estimates are judged by the tolerance alone: the rest of their score would only say how blurred they still are."""
        return replace(self, exact=0.0) if self.exact else None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] in float64 of images [N, 3, 64, 64] in 0 to 1.

        Raises:
            VerifierError: A prompt is no caption of this world, or the pictures are no pictures of it.
        """
        loose = self.verdict(images, prompts, self.tolerance).share.double()
        if not self.exact:
            return loose
        return (1 - self.exact) * loose + self.exact * self.verdict(images, prompts, EXACT).share.double()

    @staticmethod
    def verdict(images: Tensor, prompts: Sequence[str], tolerance: Tolerance = EXACT) -> ShapesVerdict:
        """All that is found."""
        try:
            # Rounded as a file would be, so that a picture and its PNG are judged alike.
            pictures = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
            return verify(pictures, prompts, tolerance=tolerance)
        except ValueError as error:
            raise VerifierError(f"the shapes reward cannot judge this: {error}") from None
