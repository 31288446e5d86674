"""DITTO-2 (arXiv 2405.20289): the noise is optimised through a one-step student and decoded with more steps.

The ascent back-propagates through one denoiser call only; the image comes from several steps of the student, or from the teacher. That
works where both map a noise to nearly the same image, which `rank_agreement` measures. The paper's settings could not be looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.search.ascent import AscentMethod, Generate, optimise
from hasten.accelerators.search.task import Found
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.loop import Scorer
from hasten.accelerators.steering.mixes import Panel
from hasten.accelerators.steering.verifiers import Verifier, as_verifier, checked_score, spearman


@dataclass(frozen=True)
class Decoded:
    """The outcome.

    Attributes:
        image: [...] made by the final model from the best noise.
        reward: Of that image.
        found: The search: its noise, the student's image, and the report, whose cost includes the final run.
    """

    image: Tensor
    reward: float
    found: Found


def optimise_then_decode(
    method: AscentMethod,
    student: Generate,
    final: Generate,
    shape: Sequence[int],
    verifier: Verifier | Callable[..., Tensor],
    *,
    final_steps: int,
    prompt: str = "",
    steps: int = 1,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
) -> Decoded:
    """Optimises the noise through `student` and decodes it with `final`.

    Args:
        method: Such as `ReNO()`.
        student: From noises to images, differentiable.
        final: From noises to images; sampling without noise of its own.
        shape: Of one noise.
        verifier: What is maximised; differentiable.
        final_steps: Denoiser calls of `final`; kept in reserve.
        steps: Those of `student`.
        prompt, budget, seed, micro_batch, rows_per_step: As for `optimise`.

    Raises:
        BudgetError: The budget does not suffice for one image of the student and one of the final model.
        VerifierError: The verifier or `student` passes no gradient.
    """
    meter = budget if isinstance(budget, Meter) else Meter(budget or Budget())
    judge = as_verifier(verifier)
    calls = Panel(judge).calls
    cost = Cost(final_steps, final_steps * rows_per_step, 1, calls)
    found = optimise(
        method,
        student,
        shape,
        judge,
        prompt=prompt,
        steps=steps,
        budget=meter,
        seed=seed,
        micro_batch=micro_batch,
        rows_per_step=rows_per_step,
        reserve=cost,
    )
    meter.charge(Cost(final_steps, final_steps * rows_per_step))
    with meter.timing("denoise"), torch.no_grad():
        image = final(found.noise[None])
    reward = Scorer(judge, [prompt], meter).rewards(image, torch.zeros(1, dtype=torch.int64))
    return Decoded(image[0], float(reward[0]), found)


@torch.no_grad()
def rank_agreement(draft: Generate, final: Generate, noises: Tensor, verifier: Verifier | Callable[..., Tensor], prompt: str = "") -> float:
    """Rank correlation (Spearman's) of the scores that two models' images of the same noises get.

    Searching with the draft pays only as far as the final model agrees; below about 0.3 (a rule of thumb, not measured) the search is
    little better than chance.

    Args:
        draft, final: From noises to images.
        noises: [n, ...], at least 2; 16 or more tell something.
        verifier: Any.
        prompt: The text.

    Raises:
        ValueError: There are fewer than 2 noises.
    """
    judge = as_verifier(verifier)
    return spearman(*(checked_score(judge, model(noises), [prompt] * len(noises)).double() for model in (draft, final)))
