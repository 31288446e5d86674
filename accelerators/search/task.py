"""The core of search: what a method asks to have evaluated, and the one loop that evaluates it.

A search is a generator. It yields requests (latents, from which noise level to which, in how many denoiser calls), is sent the answers,
and returns the best sample it found; it never calls a model. Whoever drives it splits a request into micro-batches, which changes
nothing in the result, and charges the meter before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.levels import NoisePath
from hasten.accelerators.steering.loop import Scorer, checked_micro_batch, micro_batches
from hasten.accelerators.steering.mixes import Panel
from hasten.accelerators.steering.noise import SHARED, stream
from hasten.accelerators.steering.report import ROOT, Lineage, SearchReport
from hasten.accelerators.steering.verifiers import Verifier, as_verifier


class Request(NamedTuple):
    """Rows to evaluate. A row is taken from its level `start` to its level `stop`, without drawing noise, in `steps` denoiser calls; where
    both are the same level, it is only estimated there, in one call."""

    latents: Tensor  # [N, ...] float32 on the CPU
    start: Tensor  # [N] float64 noise levels
    stop: Tensor  # [N]; 0 is the clean sample
    steps: int
    scored: bool = True


class Answer(NamedTuple):
    """What became of the rows."""

    latents: Tensor  # [N, ...] at `stop`
    x0: Tensor  # [N, ...] the clean sample: finished, or the estimate of the last denoiser call
    scores: Tensor | None  # [N, V] float64 raw scores of the decoded estimates


class Candidate(NamedTuple):
    """One row that was evaluated."""

    noise: Tensor  # [...] what was evaluated
    level: float  # the level it was evaluated from
    latents: Tensor  # [...] what became of it
    x0: Tensor  # [...]
    scores: Tensor  # [V]
    node: int  # in the lineage


NOTHING, FLOW = Cost(), NoisePath()
FIRST = -2
"""As a parent: the first row of the same answer."""

Search = Generator[Request, Answer, Candidate]


class SearchMethod(Protocol):
    """The settings of a method."""

    def search(self, task: Task) -> Search:
        """The search for one prompt; what it returns has been taken to level 0, unless the time ran out."""
        ...


Evaluate = Callable[[Tensor, float, float, int], tuple[Tensor, Tensor]]
"""From latents [n, ...], start and stop levels and denoiser calls to the latents at stop and the last estimates, both [n, ...]. Latents are
float32 on the CPU; a model elsewhere moves them, and what it returns is moved back."""


@dataclass
class Task:
    """One prompt's search: what there is to search in, to judge by and to spend.

    Attributes:
        shape: Of one latent.
        steps: Denoiser calls of a full run.
        panel: The verifier.
        meter: What may be spent.
        prompt: The text.
        number: Of the prompt; its noise depends on it, on the seed and on the candidate's number alone.
        seed: Of the run.
        path: The path of the sampler.
        rows_per_step: Denoiser rows of a candidate's step: 2 under batched guidance.
        reserve: What the search must leave for whoever called it.
        lineage, facts, warnings: For the report.
    """

    shape: tuple[int, ...]
    steps: int
    panel: Panel
    meter: Meter
    prompt: str = ""
    number: int = 0
    seed: int = 0
    path: NoisePath = FLOW
    rows_per_step: int = 1
    reserve: Cost = NOTHING
    lineage: Lineage = field(default_factory=Lineage)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _drawn: int = 0

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, rows_per_step=self.rows_per_step)

    # ------------------------------------------------------------------------------------------------------- noise

    def fresh(self, count: int) -> Tensor:
        """The next noises [count, ...], each from a stream of its own."""
        numbers = range(self._drawn, self._drawn + count)
        self._drawn += count
        scale = self.path.start_scale
        drawn = [scale * torch.randn(self.shape, generator=stream(self.seed, self.number, number)) for number in numbers]
        return torch.stack(drawn) if drawn else torch.empty(0, *self.shape)

    def stream(self, number: int = 0) -> torch.Generator:
        """A stream that belongs to no candidate, such as that of a chain."""
        return stream(self.seed, self.number, SHARED - number)

    # ------------------------------------------------------------------------------------------------------- costs

    def cost(self, rows: int, steps: int, scored: bool = True) -> Cost:
        """Of so many rows, of so many denoiser calls each."""
        judged = rows if scored else 0
        return Cost(rows * steps, rows * steps * self.rows_per_step, judged, judged * self.panel.calls)

    def most(self, cost: Callable[[int], Cost], at_most: int) -> int:
        """The largest number of something, up to `at_most`, that the budget affords; see `Meter.most`."""
        return self.meter.most(lambda count: cost(count) + self.reserve, at_most)

    def affords(self, rows: int, steps: int, scored: bool = True, reserve: Cost = NOTHING) -> int:
        """How many of the rows the budget affords besides the reserve.

        Where time is limited and a pace is not known yet, one row goes first; the very first one whatever the time, because there must be
        something to return.
        """
        spent = self.meter.spent
        if self.meter.budget.seconds is not None and (spent.particle_steps == 0 or (scored and spent.verifier_rows == 0)):
            rows = min(rows, 1)
            if spent.particle_steps == 0:
                return rows if self.meter.lacking(self.cost(1, steps, scored) + reserve + self.reserve, timed=False) is None else 0
        return self.most(lambda count: self.cost(count, steps, scored) + reserve, rows)

    # -------------------------------------------------------------------------------------------------- evaluating

    def explore(
        self,
        latents: Tensor,
        start: float | Sequence[float],
        stop: float | Sequence[float],
        steps: int,
        *,
        scored: bool = True,
        reserve: Cost = NOTHING,
    ) -> Generator[Request, Answer, Answer]:
        """Has rows evaluated, from the first on, as far as the budget goes: the answer may have fewer rows, or none."""
        levels = [torch.as_tensor(level, dtype=torch.float64).expand(len(latents)) for level in (start, stop)]
        answers, done = [], 0
        while done < len(latents):
            count = self.affords(len(latents) - done, steps, scored, reserve)
            if count == 0:
                break
            part = slice(done, done + count)
            answers.append((yield Request(latents[part], levels[0][part], levels[1][part], steps, scored)))
            done += count
        empty = latents[:0]
        scores = [answer.scores for answer in answers if answer.scores is not None]
        return Answer(
            torch.cat([answer.latents for answer in answers] or [empty]),
            torch.cat([answer.x0 for answer in answers] or [empty]),
            torch.cat([torch.empty(0, self.panel.size, dtype=torch.float64), *scores]) if scored else None,
        )

    def candidates(
        self,
        latents: Tensor,
        start: float | Sequence[float],
        answer: Answer,
        stage: int | Sequence[int],
        parents: Sequence[int] | None = None,
    ) -> list[Candidate]:
        """The rows of an answer, added to the lineage; scores and values are NaN where they were not asked for.

        Args:
            latents: The rows that were asked for; there may be more than were answered.
            start: Their levels.
            stage: The round, or that of each row.
            parents: Of each row, a node or `ROOT`, or `FIRST` for the answer's first row; `ROOT` for all unless told.
        """
        count = len(answer.x0)
        scores = torch.full((count, self.panel.size), torch.nan, dtype=torch.float64) if answer.scores is None else answer.scores
        values = [math.nan] * count if answer.scores is None or not count else self.values(scores).tolist()
        levels = torch.as_tensor(start, dtype=torch.float64).expand(len(latents)).tolist()
        found: list[Candidate] = []
        for i, value in enumerate(values):
            parent = ROOT if parents is None else parents[i]
            parent = found[0].node if parent == FIRST else parent
            (node,) = self.lineage.add(stage if isinstance(stage, int) else stage[i], [parent], [value], self.number)
            found.append(Candidate(latents[i], levels[i], answer.latents[i], answer.x0[i], scores[i], node))
        return found

    def run(
        self, noises: Tensor, stage: int | Sequence[int], parents: Sequence[int] | None = None
    ) -> Generator[Request, Answer, list[Candidate]]:
        """Full runs from noises [n, ...], as far as the budget goes; see `candidates`."""
        answer = yield from self.explore(noises, self.path.top, 0.0, self.steps)
        return self.candidates(noises, self.path.top, answer, stage, parents)

    # --------------------------------------------------------------------------------------------------- comparing

    def values(self, scores: Tensor) -> Tensor:
        """Values [n] of a candidate set from its raw scores [n, V]."""
        return self.panel.values(scores, [self.prompt] * len(scores))

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, best first; of equals the earlier is first."""
        values = self.values(torch.stack([candidate.scores for candidate in candidates]))
        return [candidates[i] for i in values.argsort(dim=0, descending=True, stable=True).tolist()]

    def best(self, *candidates: Candidate | None) -> Candidate:
        """The best of those that are there; of equals the earlier."""
        return self.ranked([candidate for candidate in candidates if candidate is not None])[0]

    def value(self, candidate: Candidate) -> float:
        """Its value when it was evaluated, among those that were evaluated with it."""
        return self.lineage.nodes[candidate.node].reward


@dataclass(frozen=True)
class Found:
    """What a search returns.

    Attributes:
        latents: [...] the finished sample.
        noise: [...] what it was made from: starting there at `level` gives the sample again.
        level: 1 (or the top of the path) for noise.
        scores: [V] its raw scores.
        report: What was done, at what cost.
    """

    latents: Tensor
    noise: Tensor
    level: float
    scores: Tensor
    report: SearchReport


def search(
    method: SearchMethod,
    evaluate: Evaluate,
    shape: Sequence[int],
    verifier: Verifier | Callable[..., Tensor],
    *,
    steps: int,
    prompt: str = "",
    number: int = 0,
    path: NoisePath = FLOW,
    decode: Callable[[Tensor], Tensor] | None = None,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
) -> Found:
    """Carries out a search for one prompt.

    Args:
        method: Settings such as `ZeroOrder()`.
        evaluate: Runs the model. Deterministic, and a row's outcome must not depend on its batch-mates.
        shape: Of one latent.
        verifier: What is maximised.
        steps: Denoiser calls of a full run.
        prompt, number: The text, and its number among those of the call, which its noise depends on.
        path: The path of the sampler.
        decode: From latents to images in 0 to 1; latents are images unless told.
        budget: Of this search, or a meter that has one.
        seed: Same seed, same result, whatever the micro-batch.
        micro_batch: Rows at a time; None for all.
        rows_per_step: Denoiser rows that a row counts for; 2 under batched guidance.

    Raises:
        BudgetError: The budget does not suffice for one sample.
        ValueError: An argument is out of range.
    """
    meter = budget if isinstance(budget, Meter) else Meter(budget or Budget())
    task = Task(tuple(shape), steps, Panel(as_verifier(verifier)), meter, prompt, number, seed, path, rows_per_step)
    meter.require_sample(task.cost(1, steps))
    scorer = Scorer(task.panel.verifier, [prompt], meter, decode, micro_batch)
    found = drive(method.search(task), task, evaluate, scorer)
    report = SearchReport(str(method), task.lineage, [[found.node]], meter, task.facts, task.warnings)
    return Found(found.x0, found.noise, found.level, found.scores, report)


def drive(running: Search, task: Task, evaluate: Evaluate, scorer: Scorer) -> Candidate:
    """Answers a search's requests until it returns."""
    micro_batch = checked_micro_batch(scorer.micro_batch)
    try:
        request = next(running)
        while True:
            request = running.send(_answered(request, task, evaluate, scorer, micro_batch))
    except StopIteration as end:
        candidate: Candidate = end.value
        return candidate


def _answered(request: Request, task: Task, evaluate: Evaluate, scorer: Scorer, micro_batch: int | None) -> Answer:
    task.meter.charge(task.cost(len(request.latents), request.steps, scored=False))
    latents, x0 = torch.empty_like(request.latents), torch.empty_like(request.latents)
    with task.meter.timing("denoise"), torch.no_grad():
        pairs = torch.stack([request.start, request.stop], 1)
        for pair in pairs.unique(dim=0):  # most samplers take one level for all rows
            rows = (pairs == pair).all(1).nonzero()[:, 0]
            start, stop = pair.tolist()
            for part in micro_batches(len(rows), micro_batch):
                after, estimate = evaluate(request.latents[rows[part]], start, stop, request.steps)
                latents[rows[part]], x0[rows[part]] = after.to(latents), estimate.to(x0)
    finished = request.stop == 0  # a sampler's last step may add to its last estimate
    x0[finished] = latents[finished]
    scores = scorer.scores(x0, torch.zeros(len(x0), dtype=torch.int64)) if request.scored else None
    return Answer(latents, x0, scores)
