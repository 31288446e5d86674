"""HEX, hidden semi-autoregressive experts (arXiv 2510.05040): the same prompt under several block lengths, and the answers vote.

What a schedule of one block length gets wrong another often gets right. All runs of all prompts are one batch, each row with blocks of its
own length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.accelerators.decoding.generate import Decoded, LogitsFn, decode
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling, measure

Tie = Literal["first", "likelihood"]
"""Which of equally frequent answers wins: the first, or the one that was likeliest in the first step."""


@dataclass(frozen=True)
class Votes:
    """The outcome.

    Attributes:
        answers: For each prompt, the answer of each run, in the order of the block lengths.
        chosen: For each prompt, the run whose answer won; None where no run has an answer.
        runs: All runs; those of a prompt follow each other. The forward that "likelihood" takes for each prompt is not among them.
    """

    answers: list[list[Hashable | None]]
    chosen: list[int | None]
    runs: Decoded

    @property
    def winners(self) -> list[Hashable | None]:
        """For each prompt the answer that won."""
        return [None if run is None else answers[run] for answers, run in zip(self.answers, self.chosen, strict=True)]


@dataclass(frozen=True)
class HEX:
    """Votes over block lengths. What an answer is depends on the task, so that the caller says how it is found.

    Attributes:
        block_lengths: (8, 16, 32, 64, 128) for answers of 256 tokens; 16 to 256 for 512, 4 to 64 for 128.
        schedule: Two tokens a step by confidence unless told, which is the paper's half as many steps as tokens.
        tie: Both rules are in the published code.

    Raises:
        ValueError: A value is out of range.
    """

    block_lengths: tuple[int, ...] = (8, 16, 32, 64, 128)
    schedule: Schedule = field(default_factory=lambda: StaticDecoding(tokens_per_step=2))
    tie: Tie = "first"

    def __post_init__(self) -> None:
        FixedBlocks(tuple(self.block_lengths))
        if self.tie not in get_args(Tie):
            raise ValueError(f"tie must be one of {', '.join(get_args(Tie))}, not {self.tie!r}")
        if self.schedule.needs.shadow:
            raise ValueError(f"HEX cannot run {type(self.schedule).__name__}: it has no shadow block")

    @torch.no_grad()
    def decode(
        self,
        logits_fn: LogitsFn,
        prompt_ids: Tensor,
        answer: Callable[[list[int]], Hashable | None],
        *,
        sampling: Sampling,
        length: int,
        prompt_mask: Tensor | None = None,
        eos_id: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Votes:
        """Decodes every prompt under every block length and lets the answers vote.

        Args:
            answer: From the generated tokens, without padding, to what is voted on; None where there is no answer.
            logits_fn, prompt_ids, sampling, length, prompt_mask, eos_id: As in `decode`.
            seeds: One for each prompt and block length.
        """
        n, prompts = len(self.block_lengths), len(prompt_ids)
        runs = decode(
            logits_fn,
            prompt_ids.repeat_interleave(n, 0),
            self.schedule,
            FixedBlocks(tuple(self.block_lengths) * prompts),
            sampling=sampling,
            length=length,
            prompt_mask=None if prompt_mask is None else prompt_mask.repeat_interleave(n, 0),
            eos_id=eos_id,
            seeds=seeds,
        )
        texts = [row[:end] for row, end in zip(runs.tokens.tolist(), runs.lengths.tolist(), strict=True)]
        answers = [[answer(text) for text in texts[i * n : (i + 1) * n]] for i in range(prompts)]
        scores: list[list[float]] | list[None] = [None] * prompts
        if self.tie == "likelihood":
            scores = _log_likelihoods(logits_fn, prompt_ids, prompt_mask, runs, sampling, n).tolist()
        return Votes(answers, [vote(found, score) for found, score in zip(answers, scores, strict=True)], runs)


def vote(answers: Sequence[Hashable | None], scores: Sequence[float] | None = None) -> int | None:
    """The place of the winning answer.

    Args:
        answers: None does not count.
        scores: Among the most frequent answers the one with the highest score wins; without, the one that comes first.

    Returns:
        A place in `answers`, or None where there is no answer.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    tied = [place for place, answer in enumerate(answers) if answer is not None and counts[answer] == most]
    return tied[0] if scores is None else max(tied, key=lambda place: scores[place])


def _log_likelihoods(
    logits_fn: LogitsFn, prompt_ids: Tensor, prompt_mask: Tensor | None, runs: Decoded, sampling: Sampling, n: int
) -> Tensor:
    """Mean log-probability of the tokens of each run in the first step, where everything is masked, [prompts, n]."""
    (prompts, prompt), length, device = prompt_ids.shape, runs.tokens.shape[1], prompt_ids.device
    masks = torch.full((prompts, length), sampling.mask_id, device=device)
    valid = torch.ones(prompts, prompt + length, dtype=torch.bool, device=device)
    if prompt_mask is not None:
        valid[:, :prompt] = prompt_mask.bool()
    columns = torch.arange(prompt, prompt + length, device=device).expand(prompts, -1)
    logits = logits_fn(torch.cat([prompt_ids, masks], 1), valid, columns)
    tokens = runs.tokens.view(prompts, n, length)
    found = measure(logits, masks, Sampling(sampling.mask_id, sampling.suppressed), probes=tokens.transpose(1, 2)).probe_log_p
    assert found is not None  # it was asked for
    counted = torch.arange(length, device=device) < runs.lengths.view(prompts, n, 1)
    return torch.where(counted, found.transpose(1, 2), 0).sum(-1) / counted.sum(-1)
