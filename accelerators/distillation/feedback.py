"""Reward feedback (ReFL, arXiv 2304.05977) as Hyper-SD (arXiv 2404.13686) uses it on a few-step student: gradients of a verifier.

The student's clean sample is decoded and judged, and the judgement's gradient flows back through the decoder. It sharpens what the verifier
sees and drifts where it is blind, so that it is for a short stage at the end, with a ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accelerators.distillation.dmd import rollout
from hasten.accelerators.distillation.method import TuningTask
from hasten.accelerators.steering.verifiers import Verifier


@dataclass(frozen=True)
class RewardFeedback:
    """A loss beside another.

    Attributes:
        ceiling: Score above which a sample is good enough and has no gradient; None pulls for ever.
        weight: Of the loss.

    Raises:
        ValueError: The weight is not above 0.
    """

    ceiling: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, not {self.weight!r}")

    @property
    def from_pairs(self) -> bool:
        return False

    def tuning_loss(self, task: TuningTask) -> Tensor:
        """See `TuningMethod`: the student's estimates of the clean sample at one of its steps, drawn evenly, are judged."""
        assert task.reward is not None
        last = int(torch.randint(len(task.nodes), (), generator=task.generator, device=task.generator.device))
        made = rollout(task.student, task.noise, task.told, task.grid, task.nodes[: last + 1], task.generator)
        return self.loss(made.x0, task.decode, task.reward, task.prompts)

    def loss(self, x0: Tensor, decode: Callable[[Tensor], Tensor], verifier: Verifier, prompts: Sequence[str]) -> Tensor:
        """The mean loss of the batch.

        Args:
            x0: [B, ...] the student's clean samples, with gradients.
            decode: From latents to images [B, 3, H, W] in 0 to 1, differentiable.
            verifier: A differentiable one.
            prompts: One for each row.

        Raises:
            ValueError: The verifier has no gradients.
        """
        if not verifier.differentiable:
            raise ValueError(f"verifier must be differentiable, which {type(verifier).__name__} is not")
        scores = verifier.score(decode(x0), list(prompts))
        short = -scores if self.ceiling is None else F.relu(self.ceiling - scores)
        return self.weight * short.mean()
