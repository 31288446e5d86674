"""Distils an unmodified diffusers pipeline into one of few steps: `hasten.distill` trains LoRA adapters on its denoiser.

    lora = hasten.distill(pipe, "folder/of/pictures", hasten.TrajectoryConsistency(), steps=4000, output="runs/steps")
    with lora.applied(pipe, 4) as call:
        image = pipe("a red circle left of a blue square", **call).images[0]

The pipeline is asked once what it would tell its denoiser for every caption, and is otherwise left alone: teacher and student are its own
denoiser, with the adapters off and on. A run that was interrupted goes on to the same weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.accelerators.distillation.adapters import Adapters, LoRA
from hasten.accelerators.distillation.adversarial import Adversarial, Discriminator
from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid
from hasten.accelerators.distillation.method import DistillationMethod, ScoredMethod, Task
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.pipelines.distillation_data import Examples, examples_of, grid_of
from hasten.pipelines.step_lora import StepLoRA, facts_of, few_steps
from hasten.pipelines.training import Optimised, Settings, Training

SAMPLES = "samples.npz"
"""Of the teacher, where there are prompts only."""


def distill(
    pipe: Any,
    data: Any,
    method: DistillationMethod | None = None,
    *,
    steps: int,
    output: str | os.PathLike[str],
    start: StepLoRA | None = None,
    lora: LoRA | None = None,
    denoiser: str | None = None,
    call: Mapping[str, Any] | None = None,
    teacher_steps: int = 50,
    sample_prompts: Sequence[str] = (),
    resume: bool = True,
    progress: bool = True,
    **settings: Any,
) -> StepLoRA:
    """Trains adapters that let a pipeline take few steps.

        lora = hasten.distill(pipe, prompts, hasten.LCM(), steps=1000, output="runs/lcm")       # data-free
        lora = hasten.distill(pipe, "pictures/", hasten.PhasedConsistency(4), steps=4000, output="runs/pcm", learning_rate=1e-5)

    Runs under `accelerate launch` too: each process takes batches of its own, gradients are averaged, and the first process writes.

    Args:
        pipe: A diffusers pipeline, variance-preserving or rectified flow. It is left as it was, on the device it was on.
        data: A folder of pictures with captions (`NAME.txt` beside `NAME.png`, or `metadata.jsonl` with `file_name` and `text`); a
            `datasets` object with the columns `image` and `text`; or prompts, of which the pipeline itself draws the samples first.
        method: One of `accelerators.distillation`; `TrajectoryConsistency()` by default.
        steps: Optimiser steps in all.
        output: Folder for the adapters, the checkpoint, the log and the sample grids.
        start: Adapters of an earlier stage to begin from, with their rank and layers; the base itself by default.
        lora: Rank and layers, where nothing is begun from.
        denoiser: Which network of a pipeline with several.
        call: Arguments of the pipeline's call that it needs beyond the prompt (sizes, sequence lengths).
        teacher_steps: Of the samples drawn from prompts, with the middle of the method's range of guidance.
        sample_prompts: For the sample grids.
        resume: Whether to go on from a checkpoint in `output`; False refuses to overwrite one.
        progress: Whether a bar is shown.
        settings: Of `hasten.pipelines.training.Settings`.

    Returns:
        The adapters, saved in `output` in the format of diffusers.

    Raises:
        ValueError: The data are empty or incomplete, a setting is out of range, or the checkpoint is of a run with other settings.
        ImportError: peft is not installed.
    """
    method = TrajectoryConsistency() if method is None else method
    if not hasattr(method, "loss") or not hasattr(method, "stages"):
        raise ValueError(f"method must be a distillation method such as TrajectoryConsistency(), not {type(method).__name__}")
    run = Distillation(
        pipe, Settings(steps=steps, **settings), Path(output), adapted(lora, start), denoiser, dict(call or {}), start,
        data, method, teacher_steps,
    )  # fmt: skip
    return run(tuple(sample_prompts), resume, progress)


def adapted(lora: LoRA | None, start: StepLoRA | None) -> LoRA:
    """Rank and layers of the adapters.

    Raises:
        ValueError: What is begun from has others than were asked for.
    """
    if start is None:
        return lora or LoRA()
    if lora is not None and (lora.rank, lora.targets) != (start.rank, None):
        raise ValueError(f"the adapters that are begun from have rank {start.rank} and layers of their own: leave those of lora out")
    return LoRA(start.rank, None, lora is not None and lora.merged)


@dataclass
class Distillation(Training):
    """One training; arguments as for `distill`."""

    teacher_steps: int
    examples: Examples = field(init=False)
    score: Optimised | None = field(init=False, default=None)
    heads: Optimised | None = field(init=False, default=None)
    adversary: Adversarial | None = field(init=False, default=None)

    def _grid(self) -> Grid:
        return grid_of(self.pipe, self.settings.grid_steps, self.settings.top, self.settings.shift)

    def _facts(self, network: nn.Module) -> dict[str, Any]:
        method = self.method
        grids = {count: few_steps(self.grid, count) for count in method.counts if count <= self.grid.steps}
        return facts_of(network, self.lora.rank, self._told_method(), method.guidance, grids, method.gamma)

    def _read(self, network: nn.Module) -> str:
        self.examples = examples_of(
            self.pipe, self.name, network, self.data, self.call, self.method.guidance, self.teacher_steps, self.settings.seed,
            self.output / SAMPLES,
        )  # fmt: skip
        self.layout = self.examples.layout
        return self.examples.hash()

    def _begin(self, adapters: Adapters) -> list[Optimised]:
        if self.method.ema is not None:
            self.averaged = {name: factor.to(self.device) for name, factor in adapters.state().items()}
        if isinstance(self.method, ScoredMethod):
            # The second score's factors are no module's: they take the student's place for a call.
            factors = {name: nn.Parameter(factor) for name, factor in adapters.fresh(self._randomness(-1)).items()}
            self.score = Optimised(factors, self.settings, self.accelerator)
        if getattr(self.method, "adversarial", False):
            discriminator = Discriminator(adapters.denoiser, seed=self.settings.seed)
            self.adversary = Adversarial(discriminator, list(adapters.factors.values())[-2:])
            self.heads = Optimised(dict(discriminator.named_parameters()), self.settings, self.accelerator)
        return [beside for beside in (self.score, self.heads) if beside is not None]

    def _step(self, step: int, student: Optimised, adapters: Adapters) -> tuple[float, str]:
        method, rate = self.method, self.settings.rate(step)
        segments = method.stages[self.settings.stage(step, len(method.stages))]
        loss = method.loss(self._task(step, 0, adapters), segments)
        student.step(loss, rate)
        if isinstance(method, ScoredMethod) and self.score is not None:
            for update in range(method.updates):
                self.score.step(method.own_loss(self._task(step, 1 + update, adapters)), rate)
        if self.adversary is not None and self.heads is not None:
            self.heads.step(self.adversary.own_loss(), rate)
        if self.averaged and method.ema is not None:
            with torch.no_grad():
                for name, factor in student.factors.items():
                    self.averaged[name].lerp_(factor, 1 - method.ema)
        return loss.item(), f"segments {segments}"

    def _task(self, step: int, part: int, adapters: Adapters) -> Task:
        generator = self._randomness(step, part)
        examples, rows = self.examples, self.settings.batch_size
        index = torch.randint(len(examples.latents), (rows,), generator=generator, device=self.device).cpu()
        x0 = examples.latents[index].to(self.device)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        told = examples.encoded.rows(examples.caption[index], self.device)
        untold = None if examples.empty is None else examples.empty.rows(torch.zeros_like(index), self.device)
        target = self._with(adapters, self.averaged) if self.averaged else None
        score: Denoiser | None = None if self.score is None else self._with(adapters, self.score.factors)
        student, teacher, conditions = self._student(adapters), self._teacher(adapters), Conditions(told, untold)
        return Task(student, teacher, x0, noise, conditions, self.grid, generator, target, score, self.adversary)
