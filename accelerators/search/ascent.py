"""The core of gradient noise optimisation: rewards are climbed by gradient ascent on the starting noise, through any differentiable
`generate(noise) -> images`.

Rows are climbed side by side and independently: every gradient is clipped row by row. As in `task`, a search is a generator: it yields the
noises at which it wants rewards and gradients, and whoever drives it computes them in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.task import NOTHING, ROOT, Candidate, Found, Task
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.loop import checked_micro_batch, micro_batches
from hasten.accelerators.steering.mixes import Panel
from hasten.accelerators.steering.report import SearchReport
from hasten.accelerators.steering.verifiers import Verifier, VerifierError, as_verifier, name_of

Generate = Callable[[Tensor], Tensor]
"""From noises [n, ...] to images [n, 3, H, W] in 0 to 1, with a gradient path. What it draws itself must be the same at every call."""


class GradientRequest(NamedTuple):
    """Noises at which rewards and their gradients are wanted."""

    noises: Tensor  # [N, ...] float32 on the CPU


class GradientAnswer(NamedTuple):
    """What is there."""

    images: Tensor  # [N, ...]
    scores: Tensor  # [N, V] float64 raw scores
    gradients: Tensor  # [N, V, ...] float32, of what each column adds to the value


Climb = Generator[GradientRequest, GradientAnswer, Candidate]


class AscentMethod(Protocol):
    """The settings of a method."""

    def climb(self, task: Task) -> Climb:
        """The search for one prompt; what it returns has images for latents."""
        ...


@dataclass(frozen=True)
class Ascent:
    """Nesterov's accelerated ascent with clipped gradients.

    Attributes:
        iterations: Evaluations of every row; fewer where the budget says so.
        learning_rate, momentum: Of the ascent.
        clip: Largest norm of a row's gradient.
        clip_each: Largest norm of the gradient of every column of the verifier before they are added; None for no such limit.
        regularisation: Weight of the negative log-density of the noise's norm.
    """

    iterations: int
    learning_rate: float
    momentum: float
    clip: float
    clip_each: float | None
    regularisation: float

    def climb(self, task: Task, noises: Tensor) -> Climb:
        """Climbs from noises [N, ...] and returns the best row ever evaluated, by reward alone."""
        velocity = torch.zeros_like(noises)
        parents, best, broken = [ROOT] * len(noises), None, 0
        for number in range(self.iterations):
            rows: list[Candidate] = []
            gradients = torch.zeros_like(noises)
            while len(rows) < len(noises) and (count := task.affords(len(noises) - len(rows), task.steps)):
                part = slice(len(rows), len(rows) + count)
                answer = yield GradientRequest(noises[part].clone())
                nodes = task.lineage.add(number, parents[part], task.values(answer.scores).tolist(), task.number)
                images, scores = answer.images, answer.scores
                rows += [Candidate(noises[part][i].clone(), task.path.top, images[i], images[i], scores[i], nodes[i]) for i in range(count)]
                gradients[part] = self.descent(noises[part], answer.gradients)
            if rows:
                best = task.best(best, *rows)
            if len(rows) < len(noises):
                task.warnings.append(f"the budget ended the ascent in iteration {number} of {self.iterations}")
                break
            lost = ~gradients.flatten(1).isfinite().all(1)
            broken += int(lost.sum())
            gradients[lost] = 0.0
            velocity = self.momentum * velocity + gradients
            noises = noises - self.learning_rate * (gradients + self.momentum * velocity)
            parents = [row.node for row in rows]
        if broken:
            task.warnings.append(f"{broken} gradients were not finite and were left out; half precision overflows easily")
        assert best is not None  # one evaluation at least is affordable
        return best

    def descent(self, noises: Tensor, gradients: Tensor) -> Tensor:
        """The clipped gradient [n, ...] of the loss, from those of the rewards [n, V, ...]."""
        pull = self.regularisation * norm_gradient(noises)
        if self.clip_each is None:
            return clipped(pull - gradients.sum(1), self.clip)
        # The regulariser is added to every reward's gradient, as in CARINOX.
        each = [clipped(pull - gradient, self.clip_each) for gradient in gradients.unbind(1)]
        return clipped(torch.stack(each).sum(0), self.clip)


def norm_gradient(noises: Tensor) -> Tensor:
    """Gradient [n, ...] of 0.5 * |z|^2 - (D - 1) * log |z|, the negative log-density of the norm of D standard normal numbers; it vanishes
    where |z|^2 = D - 1."""
    square = noises.flatten(1).square().sum(1).clamp(min=1e-12)
    return noises * (1 - (noises[0].numel() - 1) / square).view(-1, *(1,) * (noises.ndim - 1))


def clipped(gradients: Tensor, limit: float) -> Tensor:
    """Gradients [n, ...], each scaled down to a norm of at most `limit`."""
    norms = gradients.flatten(1).norm(dim=1)
    return gradients * (limit / norms.clamp(min=1e-12)).clamp(max=1).view(-1, *(1,) * (gradients.ndim - 1))


def evaluated(request: GradientRequest, task: Task, generate: Generate, micro_batch: int | None) -> GradientAnswer:
    """Rewards and gradients of a request, in micro-batches, charged to the task's meter.

    Raises:
        VerifierError: No gradient reaches the noise from the rewards.
    """
    panel, meter = task.panel, task.meter
    meter.charge(task.cost(len(request.noises), task.steps))
    images, scores, gradients = [], [], []
    for part in micro_batches(len(request.noises), micro_batch):
        with torch.enable_grad():
            noises = request.noises[part].detach().clone().requires_grad_(True)
            with meter.timing("denoise"):
                made = generate(noises)
            if not made.requires_grad:
                raise VerifierError(
                    "generate returned images without a gradient path to the noise; call the denoiser and the decoder directly, since a "
                    "pipeline's own call runs under torch.no_grad"
                )
            prompts = [task.prompt] * len(noises)
            with meter.timing("verify"):
                raw = panel.scores(made, prompts)
                added = panel.contributions(raw, prompts)
            if not added.requires_grad:
                raise VerifierError(f"{name_of(panel.verifier)} detaches its scores from the images; gradients must pass through it")
            with meter.timing("denoise"):  # most of the backward pass is the denoiser's
                columns = added.sum(0).unbind()
                found = [torch.autograd.grad(c, noises, retain_graph=c is not columns[-1], materialize_grads=True)[0] for c in columns]
        images.append(made.detach().cpu())
        scores.append(raw.detach().to("cpu", torch.float64))
        gradients.append(torch.stack(found, 1).float().cpu())
    return GradientAnswer(torch.cat(images), torch.cat(scores), torch.cat(gradients))


def optimise(
    method: AscentMethod,
    generate: Generate,
    shape: Sequence[int],
    verifier: Verifier | Callable[..., Tensor],
    *,
    prompt: str = "",
    number: int = 0,
    steps: int = 1,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
    reserve: Cost = NOTHING,
) -> Found:
    """Optimises the noise for one prompt. `Found.latents` is the image.

    Args:
        method: Settings such as `ReNO()`.
        generate: From noises to images, differentiable: a one-step model and its decoder.
        shape: Of one noise.
        verifier: What is maximised; differentiable.
        prompt, number: The text, and its number among those of the call, which its noise depends on.
        steps: Denoiser calls of one `generate`. Only forward passes are counted.
        budget: Of this search, or a meter that has one.
        seed: Same seed, same result, whatever the micro-batch.
        micro_batch: Rows at a time; None for all.
        rows_per_step: Denoiser rows that a row counts for.
        reserve: Left in the budget for whoever called.

    Raises:
        BudgetError: The budget does not suffice for one sample and the reserve.
        VerifierError: The verifier or `generate` passes no gradient.
    """
    judge = as_verifier(verifier)
    if not judge.differentiable:
        raise VerifierError(f"{name_of(judge)} has no gradient; use differentiable verifiers, and a weighted sum in place of ranks")
    meter, micro_batch = budget if isinstance(budget, Meter) else Meter(budget or Budget()), checked_micro_batch(micro_batch)
    task = Task(tuple(shape), steps, Panel(judge), meter, prompt, number, seed, rows_per_step=rows_per_step, reserve=reserve)
    meter.require_sample(task.cost(1, steps) + reserve)
    running = method.climb(task)
    try:
        request = next(running)
        while True:
            request = running.send(evaluated(request, task, generate, micro_batch))
    except StopIteration as end:
        best: Candidate = end.value
    report = SearchReport(str(method), task.lineage, [[best.node]], meter, task.facts, task.warnings)
    return Found(best.latents, best.noise, best.level, best.scores, report)


def check_ascent(iterations: int, **positive: float) -> None:
    """Refuses settings that are out of range."""
    check_whole(1, iterations=iterations)
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, not {value!r}")
