"""Several verifiers as one: weighted sums, mean ranks, and weights by the prompt's category.

One verifier alone is gamed by a long search. The mean of ranks within the candidate set is the ensemble of noise search
(arXiv 2501.09732) and needs no scales; the weights by category are those published with CARINOX (arXiv 2509.17458).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from hasten.accelerators.steering.verifiers import Verifier, VerifierError, as_verifier, checked_score, ranks

CARINOX_REWARDS: Mapping[str, float] = MappingProxyType({"hps": 5.0, "image_reward": 5.0, "da": 5.0, "vqa": 1.0})
"""Weights of CARINOX's rewards in its code: HPSv2.1, ImageReward, DA-score and VQAScore."""

CARINOX_CATEGORIES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        category: MappingProxyType(dict(zip(("hps", "image_reward", "da", "vqa"), row, strict=True)))
        for category, row in {
            "color": (0.40, 1.06, 1.41, 1.14),
            "shape": (0.95, 1.12, 1.00, 0.92),
            "texture": (0.90, 1.10, 1.07, 0.93),
            "2d-spatial": (1.06, 1.02, 0.82, 1.10),
            "non-spatial": (1.01, 0.96, 0.85, 1.17),
            "complex": (0.67, 1.05, 1.21, 1.06),
            "3d-spatial": (0.96, 0.92, 0.68, 1.43),
            "numeracy": (1.02, 1.05, 1.00, 0.93),
            "overall": (0.59, 0.94, 1.12, 1.34),
        }.items()
    }
)
"""Factors by prompt category of the file that comes with CARINOX's code. The code itself does not read it: that they multiply
`CARINOX_REWARDS` is inferred from their mean of about 1."""

RENO_REWARDS: Mapping[str, float] = MappingProxyType({"hps": 5.0, "image_reward": 1.0, "clip": 0.01, "pickscore": 0.05})
"""Weights of ReNO's rewards in its code (arXiv 2406.04312): HPSv2.1 as a cosine, ImageReward, CLIP ViT-H as 100 cosines, PickScore."""


class Mix(ABC):
    """Verifiers that are scored one by one, row by row, and then combined: what is combined may be the whole candidate set.

    Attributes:
        verifiers: The verifiers; a mean of ranks cannot be one of them, because ranks depend on the candidate set.
    """

    verifiers: tuple[Verifier, ...]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N, V] of every verifier; batches of them may be concatenated."""
        return torch.stack([checked_score(verifier, images, prompts) for verifier in self.verifiers], 1)

    @abstractmethod
    def contributions(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """What every verifier adds to the score, [N, V]."""

    def combine(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N]; -inf where any verifier's is."""
        lost = torch.isneginf(parts).any(1)
        return torch.where(lost, -torch.inf, self.contributions(torch.where(lost[:, None], 0.0, parts), prompts).sum(1))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images, taken as one candidate set."""
        return self.combine(self.parts(images, prompts), prompts)

    @property
    def differentiable(self) -> bool:
        """Whether all of them are."""
        return all(verifier.differentiable for verifier in self.verifiers)

    def _take(self, verifiers: Sequence[Verifier | Callable[..., Tensor]]) -> None:
        taken = tuple(as_verifier(verifier) for verifier in verifiers)
        if not taken:
            raise VerifierError("verifiers must hold at least one verifier")
        if any(isinstance(verifier, MeanRank) for verifier in taken):
            raise VerifierError(
                "a MeanRank cannot be mixed with other verifiers, since ranks depend on the candidate set; mix its verifiers"
            )
        object.__setattr__(self, "verifiers", taken)


@dataclass(frozen=True)
class WeightedSum(Mix):
    """The weighted sum of scores.

    Attributes:
        verifiers: Any callables.
        weights: One for each; 1 by default.
        normalise: Whether every score is first mapped by its verifier's `range_hint` to 0 to 1.

    Raises:
        VerifierError: There are not as many weights as verifiers, or a range hint is missing.
    """

    verifiers: tuple[Verifier, ...]
    weights: tuple[float, ...] = ()
    normalise: bool = False

    def __post_init__(self) -> None:
        self._take(self.verifiers)
        object.__setattr__(self, "weights", tuple(self.weights) or (1.0,) * len(self.verifiers))
        if len(self.weights) != len(self.verifiers):
            raise VerifierError(f"weights must hold one number for each of {len(self.verifiers)} verifiers, not {len(self.weights)}")
        for verifier in self.verifiers:
            if self.normalise and verifier.range_hint is None:
                raise VerifierError(f"normalise needs the range_hint of every verifier; {type(verifier).__name__} has none")

    @property
    def range_hint(self) -> tuple[float, float] | None:
        """From the verifiers' hints; None where one is missing."""
        ends = [(0.0, 1.0) if self.normalise else verifier.range_hint for verifier in self.verifiers]
        if any(pair is None for pair in ends):
            return None
        pairs = [sorted(weight * end for end in pair) for weight, pair in zip(self.weights, ends, strict=True) if pair is not None]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def contributions(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """Weight times score, [N, V]."""
        if self.normalise:
            hints = [verifier.range_hint or (0.0, 1.0) for verifier in self.verifiers]
            parts = (parts - parts.new_tensor([low for low, _ in hints])) / parts.new_tensor([high - low for low, high in hints])
        return parts * parts.new_tensor(self.weights)


@dataclass(frozen=True)
class MeanRank(Mix):
    """The unweighted mean of the ranks that the verifiers give within the candidate set, over its size: at most 1, ties share a rank.

    Attributes:
        verifiers: Any callables.
    """

    verifiers: tuple[Verifier, ...]
    range_hint = (0.0, 1.0)

    def __post_init__(self) -> None:
        self._take(self.verifiers)

    @property
    def differentiable(self) -> bool:
        """Ranks have no gradient."""
        return False

    def contributions(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """Every verifier's share of the mean rank, [N, V]."""
        return torch.stack([ranks(column) for column in parts.unbind(1)], 1) / parts.numel()

    def combine(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N]; -inf where any verifier's is, and those do not count as candidates."""
        kept = ~torch.isneginf(parts).any(1)
        scores = torch.full((len(parts),), -torch.inf, dtype=torch.float64)
        if kept.any():
            scores[kept] = self.contributions(parts[kept].cpu(), prompts).sum(1)
        return scores.to(parts.device)


def always_overall(prompt: str) -> str:
    """The category of every prompt when none is told."""
    return "overall"


@dataclass(frozen=True)
class CategoryMix(Mix):
    """A weighted sum whose weights depend on the category of the prompt.

    Attributes:
        named: Verifiers by name. For the published table: "hps", "image_reward", "da" and "vqa", or some of them.
        category: From a prompt to the name of its category.
        table: By category, the factor of every verifier.
        base: By name, the weight that the factor multiplies; 1 for a name that it lacks.

    Raises:
        VerifierError: The table lacks a verifier, or is asked for a category that it lacks.
    """

    named: Mapping[str, Verifier]
    category: Callable[[str], str] = always_overall
    table: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: CARINOX_CATEGORIES)
    base: Mapping[str, float] = field(default_factory=lambda: CARINOX_REWARDS)
    range_hint = None

    def __post_init__(self) -> None:
        self._take(tuple(self.named.values()))
        for category, factors in self.table.items():
            missing = [name for name in self.named if name not in factors]
            if missing:
                raise VerifierError(
                    f"the table has no factor for {', '.join(missing)} in the category {category!r}; it has {sorted(factors)}"
                )

    def weights_of(self, prompt: str) -> list[float]:
        """The weight of every verifier for a prompt."""
        category = self.category(prompt)
        if category not in self.table:
            raise VerifierError(f"category must be one of {', '.join(self.table)}, not {category!r}")
        return [self.base.get(name, 1.0) * self.table[category][name] for name in self.named]

    def contributions(self, parts: Tensor, prompts: Sequence[str]) -> Tensor:
        """Weight times score, [N, V]."""
        return parts * parts.new_tensor([self.weights_of(prompt) for prompt in prompts])


@dataclass(frozen=True)
class Panel:
    """A verifier as a search uses it: raw scores of rows first, in batches of any size, then values of whole candidate sets.

    Attributes:
        verifier: One verifier or a mix.
    """

    verifier: Verifier

    @property
    def size(self) -> int:
        """Columns of the raw scores."""
        return len(self.verifier.verifiers) if isinstance(self.verifier, Mix) else 1

    @property
    def calls(self) -> int:
        """Single verifiers that see each image."""
        if not isinstance(self.verifier, Mix):
            return 1
        return sum(Panel(verifier).calls for verifier in self.verifier.verifiers)

    @property
    def reward_std(self) -> float:
        """Standard deviation of the value over samples of a prompt: what a single verifier says of itself in `spread`; else 1."""
        return float(getattr(self.verifier, "spread", 1.0))

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores [N, size]."""
        if isinstance(self.verifier, Mix):
            return self.verifier.parts(images, prompts)
        return checked_score(self.verifier, images, prompts)[:, None]

    def contributions(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """What every column adds to the value, [N, size]."""
        return self.verifier.contributions(scores, prompts) if isinstance(self.verifier, Mix) else scores

    def values(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [N] of one prompt's candidate set from its raw scores [N, size]."""
        return self.verifier.combine(scores, prompts) if isinstance(self.verifier, Mix) else scores[:, 0]
