"""Distils an unmodified diffusers pipeline into one of few steps: `hasten.distill` trains LoRA adapters on its denoiser.

    lora = hasten.distill(pipe, "folder/of/pictures", hasten.TrajectoryConsistency(), steps=4000, output="runs/steps")
    with lora.applied(pipe, 4) as call:
        image = pipe("a red circle left of a blue square", **call).images[0]

The pipeline is asked once what it would tell its denoiser for every caption, and is otherwise left alone: teacher and student are its own
denoiser, with the adapters off and on. A run that was interrupted goes on to the same weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.adapters import Adapters, LoRA, layers_of
from hasten.accelerators.distillation.grid import Conditions, Denoiser
from hasten.accelerators.distillation.method import DistillationMethod, Task
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.pipelines.accelerated import denoisers_of
from hasten.pipelines.distillation_data import examples_of, grid_of
from hasten.pipelines.step_lora import StepLoRA, facts_of, few_steps

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SAMPLES = "samples.npz"
"""Of the teacher, where there are prompts only."""


@dataclass(frozen=True)
class Settings:
    """How the optimiser runs.

    Attributes:
        steps: Optimiser steps in all, shared out evenly among the method's stages.
        batch_size: Rows of a step, in each process.
        learning_rate: Of AdamW, after `warmup` steps; it falls to zero over the last `falling` share of the steps.
        warmup: Steps.
        falling: Share.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to it.
        grid_steps: Steps of the teacher's solver; 50 in LCM's code.
        top: Timestep at which variance-preserving sampling begins; the last one by default, see `Grid.variance_preserving`.
        shift: Of a flow's grid; that of the pipeline's scheduler by default.
        mixed_precision: "no", "bf16" or "fp16", as in accelerate.
        checkpoint_every: Steps.
        sample_every: Steps; 0 draws no sample grids.
        seed: Of the adapters, of rows, noise, nodes and guidance.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup: int = 50
    falling: float = 0.3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grid_steps: int = 50
    top: int | None = None
    shift: float | None = None
    mixed_precision: str = "no"
    checkpoint_every: int = 500
    sample_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, batch_size=self.batch_size, grid_steps=self.grid_steps, checkpoint_every=self.checkpoint_every)
        check_whole(0, warmup=self.warmup, sample_every=self.sample_every, seed=self.seed)
        if not (self.learning_rate > 0 and self.max_grad_norm > 0):
            raise ValueError(f"learning_rate and max_grad_norm must be above 0, not {self.learning_rate!r} and {self.max_grad_norm!r}")
        if not 0 <= self.falling <= 1:
            raise ValueError(f"falling must be a share from 0 to 1, not {self.falling!r}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be 'no', 'bf16' or 'fp16', not {self.mixed_precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = (self.steps - step) / (self.falling * self.steps) if self.falling else 1.0
        return self.learning_rate * rising * min(1.0, left)

    def stage(self, step: int, stages: int) -> int:
        """Which of so many stages a step belongs to."""
        return min(stages - 1, step * stages // self.steps)


def distill(
    pipe: Any,
    data: Any,
    method: DistillationMethod | None = None,
    *,
    steps: int,
    output: str | os.PathLike[str],
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
        lora: Rank and layers.
        denoiser: Which network of a pipeline with several.
        call: Arguments of the pipeline's call that it needs beyond the prompt (sizes, sequence lengths).
        teacher_steps: Of the samples drawn from prompts, with the middle of the method's range of guidance.
        sample_prompts: For the sample grids.
        resume: Whether to go on from a checkpoint in `output`; False refuses to overwrite one.
        progress: Whether a bar is shown.
        settings: Of `Settings`.

    Returns:
        The adapters, saved in `output` in the format of diffusers.

    Raises:
        ValueError: The data are empty or incomplete, a setting is out of range, or the checkpoint is of a run with other settings.
        ImportError: peft is not installed.
    """
    method = TrajectoryConsistency() if method is None else method
    if not hasattr(method, "loss") or not hasattr(method, "stages"):
        raise ValueError(f"method must be a distillation method such as TrajectoryConsistency(), not {type(method).__name__}")
    run = _Run(pipe, data, method, Settings(steps=steps, **settings), Path(output), lora or LoRA(), denoiser, dict(call or {}))
    return run(teacher_steps, tuple(sample_prompts), resume, progress)


@dataclass
class _Run:
    """One training; arguments as for `distill`."""

    pipe: Any
    data: Any
    method: DistillationMethod
    settings: Settings
    output: Path
    lora: LoRA
    denoiser: str | None
    call: dict[str, Any]

    def __call__(self, teacher_steps: int, prompts: tuple[str, ...], resume: bool, progress: bool) -> StepLoRA:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self.name, network = next(iter(denoisers_of(self.pipe, self.denoiser).items()))
        on_cpu = next(network.parameters()).device.type == "cpu"
        launched = bool(AcceleratorState._shared_state)
        self.accelerator = Accelerator(mixed_precision=self.settings.mixed_precision, cpu=on_cpu)
        try:
            made = self._distilled(network, teacher_steps, prompts, resume, progress)
            if self.accelerator.is_main_process:
                made.save(self.output)
            self.accelerator.wait_for_everyone()
        finally:
            if not launched:  # else the process's next run could have no other precision
                AcceleratorState._reset_state()
        return made

    def _distilled(self, network: nn.Module, teacher_steps: int, prompts: tuple[str, ...], resume: bool, progress: bool) -> StepLoRA:
        settings, method = self.settings, self.method
        if self.accelerator.num_processes > 1:
            self.pipe.to(self.accelerator.device)
        self.device = next(network.parameters()).device
        self.grid = grid_of(self.pipe, settings.grid_steps, settings.top, settings.shift)
        layers = layers_of(network, self.lora.targets)
        grids = {count: few_steps(self.grid, count) for count in method.counts if count <= self.grid.steps}
        self.facts = facts_of(network, self.lora.rank, type(method).__name__, method.guidance, grids, method.gamma)
        state = self._resumed(resume)
        with self.accelerator.main_process_first():
            self.examples = examples_of(
                self.pipe, self.name, network, self.data, self.call, method.guidance, teacher_steps, settings.seed, self.output / SAMPLES
            )
        self.data_hash = self.examples.hash()
        if state and state["data"] != self.data_hash:
            raise ValueError(f"{self.output / CHECKPOINT} is of a run on other data. Name another output folder, or delete it")
        self.output.mkdir(parents=True, exist_ok=True)
        training = network.training
        adapters = Adapters(network, layers, self.lora.rank, seed=settings.seed)
        try:
            network.eval()
            self._train(adapters, state, prompts, progress)
            return self._made(adapters)
        finally:
            adapters.remove()
            network.train(training)

    # -------------------------------------------------------------------------------------------------------- checkpoints

    def _about(self) -> dict[str, str]:
        """What the weights depend on, for the comparison with a checkpoint's."""
        method = {f"method.{key}": value for key, value in vars(self.method).items()}
        lora = {f"lora.{key}": value for key, value in vars(self.lora).items()}
        settings = {key: value for key, value in vars(self.settings).items() if key not in ("checkpoint_every", "sample_every")}
        base = {f"base {key}": self.facts[key] for key in ("config", "weights")}
        about = {**base, "method": type(self.method).__name__, **method, **lora, **settings, "processes": self.accelerator.num_processes}
        return {key: repr(value) for key, value in about.items()}

    def _resumed(self, resume: bool) -> dict[str, Any]:
        path = self.output / CHECKPOINT
        if not path.exists():
            return {}
        if not resume:
            raise ValueError(f"{path} is there already: resume=True goes on from it, or name another output folder")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before, now = state["about"], self._about()
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            listed = "; ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
            raise ValueError(f"{path} is of a run with other settings: {listed}. Name another output folder, or delete it")
        return state

    def _save(self, step: int, adapters: Adapters, optimizer: Any, averaged: Mapping[str, Tensor] | None) -> None:
        scaler = self.accelerator.scaler
        state = {
            "about": self._about(),
            "data": self.data_hash,
            "step": step,
            "factors": adapters.state(),
            "averaged": averaged,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        scratch = self.output / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(state, scratch)
        os.replace(scratch, self.output / CHECKPOINT)

    # ----------------------------------------------------------------------------------------------------------- the loop

    def _train(self, adapters: Adapters, state: dict[str, Any], prompts: tuple[str, ...], progress: bool) -> None:
        accelerator, settings, method = self.accelerator, self.settings, self.method
        if state:
            adapters.load(state["factors"])
        factors = list(adapters.factors.values())
        optimizer = accelerator.prepare(torch.optim.AdamW(factors, settings.learning_rate, weight_decay=settings.weight_decay))
        averaged = None
        if method.ema is not None:
            kept = state["averaged"] if state else adapters.state()
            averaged = {name: factor.to(self.device) for name, factor in kept.items()}
        start = 0
        if state:
            start = state["step"]
            optimizer.load_state_dict(state["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
        with _bar(settings.steps, start, progress and accelerator.is_main_process) as advance:
            for step in range(start, settings.steps):
                segments = method.stages[settings.stage(step, len(method.stages))]
                loss = self._loss(step, segments, adapters, averaged)
                accelerator.backward(loss)
                self._share_gradients(factors)
                accelerator.clip_grad_norm_(factors, settings.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate(step)
                optimizer.step()
                optimizer.zero_grad()
                if averaged is not None and method.ema is not None:
                    with torch.no_grad():
                        for name, factor in adapters.factors.items():
                            averaged[name].lerp_(factor, 1 - method.ema)
                advance(f"segments {segments} loss {loss.item():.5f}")
                if not accelerator.is_main_process:
                    continue
                done = step + 1
                if done == settings.steps or done % settings.checkpoint_every == 0:
                    self._save(done, adapters, optimizer, averaged)
                    self._log(done, segments, loss.item())
                if prompts and settings.sample_every and done % settings.sample_every == 0:
                    self._draw(done, adapters, prompts)
        if averaged is not None:
            adapters.load(averaged)

    def _loss(self, step: int, segments: int, adapters: Adapters, averaged: Mapping[str, Tensor] | None) -> Tensor:
        generator = _stream(self.settings.seed, step, self.accelerator.process_index, self.device)
        examples, rows = self.examples, self.settings.batch_size
        index = torch.randint(len(examples.latents), (rows,), generator=generator, device=self.device).cpu()
        x0 = examples.latents[index].to(self.device)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        told = examples.encoded.rows(examples.caption[index], self.device)
        untold = None if examples.empty is None else examples.empty.rows(torch.zeros_like(index), self.device)
        student, teacher, target = self._networks(adapters, averaged)
        task = Task(student, teacher, x0, noise, Conditions(told, untold), self.grid, generator, target)
        return self.method.loss(task, segments)

    def _networks(self, adapters: Adapters, averaged: Mapping[str, Tensor] | None) -> tuple[Denoiser, Denoiser, Denoiser | None]:
        """The student, the teacher and the averaged student, all on the one denoiser."""
        network, layout = adapters.denoiser, self.examples.layout
        dtype = next(network.parameters()).dtype

        def answer(call: Callable[..., Any], latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
            with self.accelerator.autocast():
                return layout.prediction(call(**layout.arguments(latents, timesteps, conditions, dtype)), latents)

        def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
            with adapters.off():
                return answer(network, latents, timesteps, conditions)

        student: Denoiser = partial(answer, network)
        if self.lora.merged:
            student = partial(answer, partial(adapters.call_merged, adapters.merged()))
        target = None if averaged is None else partial(answer, partial(adapters.call_merged, adapters.merged(averaged)))
        return student, teacher, target

    def _share_gradients(self, factors: Sequence[nn.Parameter]) -> None:
        """The mean over all processes, by one reduction."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [factor.grad for factor in factors if factor.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # ------------------------------------------------------------------------------------------------------ what comes out

    def _made(self, adapters: Adapters) -> StepLoRA:
        return StepLoRA(self.name, adapters.state(), self.facts)

    def _log(self, step: int, segments: int, loss: float) -> None:
        with (self.output / LOG).open("a") as file:
            file.write(json.dumps({"step": step, "segments": segments, "loss": loss}) + "\n")

    def _draw(self, step: int, adapters: Adapters, prompts: Sequence[str]) -> None:
        """A sheet of pictures: a row for each number of steps, a column for each prompt."""
        from PIL import Image

        made, before, rows = self._made(adapters), self.pipe.scheduler, []
        try:
            for count in made.steps:
                self.pipe.scheduler = made.scheduler(self.pipe, count)
                generators = [torch.Generator().manual_seed(self.settings.seed + i) for i in range(len(prompts))]
                with torch.no_grad(), self.accelerator.autocast():
                    call = {**self.call, **made.call(self.pipe, count), "generator": generators, "output_type": "pil"}
                    rows.append(self.pipe(list(prompts), **call)[0])
        finally:
            self.pipe.scheduler = before
        width, height = rows[0][0].size
        sheet = Image.new("RGB", (width * len(prompts), height * len(rows)))
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                sheet.paste(picture, (x * width, y * height))
        sheet.save(self.output / f"samples-{step:06d}.png")


def _stream(seed: int, step: int, process: int, device: torch.device) -> torch.Generator:
    """Randomness of one step of one process: a run that goes on needs no state of a generator."""
    digest = hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("distil"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("distil", total=total, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
