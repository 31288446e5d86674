"""The one loop that drives a controller on any denoiser: a function from noisy latents to the estimate of the clean sample.

Rows that are alive go through the denoiser, the decoder and the verifier in micro-batches; results do not depend on their size, as far as
those functions treat rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.controller import Run, Selection, SteeringMethod, StepInfo
from hasten.accelerators.steering.kernels import Kernel, ddim_eta
from hasten.accelerators.steering.levels import AlphaSigma
from hasten.accelerators.steering.mixes import Panel
from hasten.accelerators.steering.noise import NoiseStreams
from hasten.accelerators.steering.report import SearchReport
from hasten.accelerators.steering.verifiers import Verifier, as_verifier

Denoiser = Callable[[Tensor, int, Tensor], Tensor]
"""From latents [n, ...], the step and the numbers of the rows' prompts [n] to estimates of the clean sample [n, ...]. Latents are float32
on the CPU; a model elsewhere moves them, and what it returns is moved back."""


class Scorer:
    """Decodes and judges estimates, and counts it.

    Args:
        verifier: Any callable; see `verifiers`.
        decode: From latents [n, ...] to images [n, 3, H, W] in 0 to 1; latents are images unless told.
        prompts: Of all P prompts.
        meter: Is charged before anything is done.
        micro_batch: Rows at a time; None for all.
        estimates: Judges estimates in place of the verifier, which then judges finished samples alone; what the verifier says of itself
            (its attribute `for_estimates`) unless told, else the verifier.

    Attributes:
        watch: Is given the images of every micro-batch, where it is set.
    """

    def __init__(
        self,
        verifier: Verifier | Callable[..., Tensor],
        prompts: Sequence[str],
        meter: Meter,
        decode: Callable[[Tensor], Tensor] | None = None,
        micro_batch: int | None = None,
        estimates: Verifier | Callable[..., Tensor] | None = None,
    ) -> None:
        self.panel, self.prompts, self.meter, self.decode = Panel(as_verifier(verifier)), prompts, meter, decode
        estimates = estimates if estimates is not None else getattr(verifier, "for_estimates", None)
        self.estimates = self.panel if estimates is None else Panel(as_verifier(estimates))
        self.watch: Callable[[Tensor], None] | None = None
        self.micro_batch = checked_micro_batch(micro_batch)

    @property
    def calls(self) -> int:
        """Verifier rows of one image, at the most."""
        return max(self.panel.calls, self.estimates.calls)

    def scores(self, latents: Tensor, owners: Tensor, finished: bool = True) -> Tensor:
        """Raw scores [n, size of the panel] in float64 on the CPU, of latents [n, ...] that belong to the prompts `owners` [n]."""
        panel = self.panel if finished else self.estimates
        self.meter.charge(Cost(decodes=len(latents), verifier_rows=len(latents) * panel.calls))
        found = []
        with torch.no_grad():
            for rows in micro_batches(len(latents), self.micro_batch):
                with self.meter.timing("decode"):
                    images = latents[rows] if self.decode is None else self.decode(latents[rows])
                if self.watch is not None:
                    self.watch(images)
                with self.meter.timing("verify"):
                    found.append(panel.scores(images, [self.prompts[int(p)] for p in owners[rows]]).to("cpu", torch.float64))
        return torch.cat(found)

    def rewards(self, latents: Tensor, owners: Tensor, finished: bool = True) -> Tensor:
        """Values [n], every prompt's rows taken as one candidate set."""
        panel = self.panel if finished else self.estimates
        scores = self.scores(latents, owners, finished)
        values = torch.empty(len(scores), dtype=torch.float64)
        for p in owners.unique().tolist():
            rows = owners == p
            values[rows] = panel.values(scores[rows], [self.prompts[p]] * int(rows.sum())).double()
        return values


@dataclass(frozen=True)
class Steered:
    """What a steered run returns.

    Attributes:
        latents: For every prompt its samples [n, ...], best first.
        selection: Rows, weights and rewards.
        report: What was done, at what cost.
    """

    latents: list[Tensor]
    selection: Selection
    report: SearchReport


def steer(
    method: SteeringMethod,
    denoise: Denoiser,
    schedule: Sequence[AlphaSigma],
    shape: Sequence[int],
    verifier: Verifier | Callable[..., Tensor],
    *,
    prompts: Sequence[str] = ("",),
    kernel: Kernel = ddim_eta,
    decode: Callable[[Tensor], Tensor] | None = None,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
    start_scale: float = 1.0,
) -> Steered:
    """Samples with a steering method.

    Args:
        method: Settings such as `FKSteering()`.
        denoise: The model.
        schedule: steps + 1 coefficients from noise to the clean sample.
        shape: Of one latent.
        verifier: What is maximised.
        prompts: P of them.
        kernel: The step. It is told apart whether it draws noise by its standard deviation at the first step.
        decode: As for `Scorer`.
        budget: Of the whole call, or a meter that has one.
        seed: A particle's noise depends on it, its prompt and its slot alone.
        micro_batch: Rows at a time; None for all.
        rows_per_step: Denoiser rows that a row counts for; 2 under batched guidance.
        start_scale: Standard deviation of the latents that sampling starts from.

    Raises:
        BudgetError: The budget does not suffice for one sample of every prompt.
        SteeringError: The method needs a kernel that draws noise.
        ValueError: The schedule has no step, or an argument is out of range.
    """
    if len(schedule) < 2:
        raise ValueError(f"schedule must hold at least two levels, not {len(schedule)}")
    meter = budget if isinstance(budget, Meter) else Meter(budget or Budget())
    steps, micro_batch = len(schedule) - 1, checked_micro_batch(micro_batch)
    scorer = Scorer(verifier, prompts, meter, decode, micro_batch)
    probe = torch.zeros(1, *shape)
    # The last step of many kernels draws nothing, so it is the first that tells.
    stochastic = kernel(probe, probe, schedule[0], schedule[1]).std > 0
    controller = method.begin(Run(len(prompts), steps, meter, seed, stochastic, rows_per_step, scorer.calls, scorer.panel.reward_std))
    particles = controller.particles
    streams = NoiseStreams(seed, len(prompts), particles)
    owners = torch.arange(len(prompts)).repeat_interleave(particles)
    latents = start_scale * streams.normal(range(len(owners)), shape)
    alive = torch.ones(len(owners), dtype=torch.bool)
    for step in range(steps):
        rows = alive.nonzero()[:, 0]
        meter.charge(Cost(particle_steps=len(rows), denoiser_rows=len(rows) * rows_per_step))
        x0 = torch.zeros_like(latents)
        with meter.timing("denoise"), torch.no_grad():
            for part in micro_batches(len(rows), micro_batch):
                x0[rows[part]] = denoise(latents[rows[part]], step, owners[rows[part]]).to(x0)
        rewards = None
        if controller.scores_at(step):
            rewards = torch.full((len(owners),), -torch.inf, dtype=torch.float64)
            rewards[rows] = scorer.rewards(x0[rows], owners[rows], finished=False)
        action = controller.on_step(StepInfo(step, latents, x0, rewards))
        if action.index is not None:
            latents, x0 = latents[action.index], x0[action.index]
        if action.alive is not None:
            alive = action.alive
        if action.stop:
            latents = x0
            break
        rows = alive.nonzero()[:, 0]
        transition = kernel(latents[rows], x0[rows], schedule[step], schedule[step + 1])
        noise = streams.normal(rows, shape) if transition.std > 0 else None
        latents = latents.index_copy(0, rows, transition.sample(noise).to(latents))
    rows = alive.nonzero()[:, 0]
    rewards = torch.full((len(owners),), -torch.inf, dtype=torch.float64)
    rewards[rows] = scorer.rewards(latents[rows], owners[rows])
    selection = controller.finish(rewards)
    return Steered([latents[row] for row in selection.rows], selection, controller.report())


def checked_micro_batch(micro_batch: int | None) -> int | None:
    """The argument, if it is one.

    Raises:
        ValueError: It is not.
    """
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch must be a whole number of at least 1, or None for all rows, not {micro_batch!r}")
    return micro_batch


def micro_batches(rows: int, size: int | None) -> list[slice]:
    """Consecutive parts of so many rows."""
    step = size or max(rows, 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
