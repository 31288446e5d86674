"""What every training of adapters shares: the optimiser, gradients over processes, checkpoints to go on from, log and sample sheets.

A kind of training (`distilling.py`, `tuning.py`) says what its data are and what the loss of a step is.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.adapters import Adapters, LoRA, layers_of
from hasten.accelerators.distillation.grid import Denoiser, Grid
from hasten.pipelines.accelerated import denoisers_of
from hasten.pipelines.distillation_data import Layout
from hasten.pipelines.step_lora import StepLoRA

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


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


class Optimised:
    """Factors and their optimiser.

    Args:
        factors: By name, with gradients.
        settings: Of the optimiser.
        accelerator: Of the run.
        betas: Of AdamW.
    """

    def __init__(
        self, factors: Mapping[str, nn.Parameter], settings: Settings, accelerator: Any, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.factors, self.settings, self.accelerator = dict(factors), settings, accelerator
        made = torch.optim.AdamW(self.factors.values(), settings.learning_rate, betas=betas, weight_decay=settings.weight_decay)
        self.optimizer = accelerator.prepare(made)

    def step(self, loss: Tensor, rate: float) -> None:
        """Along the loss's gradient, averaged over all processes."""
        parameters = list(self.factors.values())
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # in one reduction
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Of factors and optimiser, on the CPU."""
        factors = {name: factor.detach().cpu().clone() for name, factor in self.factors.items()}
        return {"factors": factors, "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(state["factors"][name])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class Training(ABC):
    """One run; arguments as for `hasten.distill`.

    Attributes:
        grid: Noise levels of the losses.
        layout: How the denoiser is called; `_read` learns it.
        facts: What the file says.
        averaged: Of the student's factors, where the method keeps an average; that is what is saved then.
    """

    pipe: Any
    settings: Settings
    output: Path
    lora: LoRA
    denoiser: str | None
    call: dict[str, Any]
    start: StepLoRA | None
    data: Any
    method: Any
    grid: Grid = field(init=False)
    layout: Layout = field(init=False)
    facts: dict[str, Any] = field(init=False)
    averaged: dict[str, Tensor] = field(init=False, default_factory=dict)

    # ------------------------------------------------------------------------------------------- what a kind of training says

    @abstractmethod
    def _grid(self) -> Grid:
        """Noise levels of the losses."""

    @abstractmethod
    def _read(self, network: nn.Module) -> str:
        """Reads the data; gives their hash."""

    @abstractmethod
    def _facts(self, network: nn.Module) -> dict[str, Any]:
        """What the adapters will be for. Raises ValueError where the settings do not go with the network."""

    @abstractmethod
    def _begin(self, adapters: Adapters) -> list[Optimised]:
        """What is trained beside the adapters, each in the state of the run's beginning."""

    @abstractmethod
    def _step(self, step: int, student: Optimised, adapters: Adapters) -> tuple[float, str]:
        """One optimiser step; gives its loss and what the log says of it."""

    # -------------------------------------------------------------------------------------------------------------- the run

    def __call__(self, prompts: tuple[str, ...], resume: bool, progress: bool) -> StepLoRA:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self.name, network = next(iter(denoisers_of(self.pipe, self.denoiser).items()))
        on_cpu = next(network.parameters()).device.type == "cpu"
        launched = bool(AcceleratorState._shared_state)
        self.accelerator = Accelerator(mixed_precision=self.settings.mixed_precision, cpu=on_cpu)
        try:
            made = self._trained(network, prompts, resume, progress)
            if self.accelerator.is_main_process:
                made.save(self.output)
            self.accelerator.wait_for_everyone()
        finally:
            if not launched:  # else the process's next run could have no other precision
                AcceleratorState._reset_state()
        return made

    def _trained(self, network: nn.Module, prompts: tuple[str, ...], resume: bool, progress: bool) -> StepLoRA:
        if self.accelerator.num_processes > 1:
            self.pipe.to(self.accelerator.device)
        self.device = next(network.parameters()).device
        self.grid = self._grid()
        if self.start is None:
            layers = layers_of(network, self.lora.targets)
        else:
            self.start.check(self.pipe)
            layers = self.start.layers
        self.facts = self._facts(network)
        state = self._resumed(resume)
        with self.accelerator.main_process_first():
            self.data_hash = self._read(network)
        if state and state["data"] != self.data_hash:
            raise ValueError(f"{self.output / CHECKPOINT} is of a run on other data. Name another output folder, or delete it")
        self.output.mkdir(parents=True, exist_ok=True)
        training = network.training
        adapters = Adapters(network, layers, self.lora.rank, seed=self.settings.seed)
        try:
            network.eval()
            if self.start is not None:
                adapters.load(self.start.factors)
            self._train(adapters, state, prompts, progress)
            return self._made(adapters)
        finally:
            adapters.remove()
            network.train(training)

    def _train(self, adapters: Adapters, state: dict[str, Any], prompts: tuple[str, ...], progress: bool) -> None:
        accelerator, settings = self.accelerator, self.settings
        beside = self._begin(adapters)
        student = Optimised(adapters.factors, settings, accelerator)
        start = 0
        if state:
            start = state["step"]
            for each, kept in zip([student, *beside], state["trained"], strict=True):
                each.load(kept)
            self.averaged = {name: factor.to(self.device) for name, factor in state["averaged"].items()}
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
        with progress_bar(settings.steps, start, progress and accelerator.is_main_process) as advance:
            for step in range(start, settings.steps):
                loss, note = self._step(step, student, adapters)
                advance(f"{note} loss {loss:.5f}")
                if not accelerator.is_main_process:
                    continue
                done = step + 1
                if done == settings.steps or done % settings.checkpoint_every == 0:
                    self._save(done, [student, *beside])
                    self._log(done, note, loss)
                if prompts and settings.sample_every and done % settings.sample_every == 0:
                    self._draw(done, adapters, prompts)
        if self.averaged:
            adapters.load(self.averaged)

    # ---------------------------------------------------------------------------------------------------------- the networks

    def _answer(self, call: Callable[..., Any], latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        with self.accelerator.autocast():
            return self.layout.prediction(call(**self.layout.arguments(latents, timesteps, conditions, self.dtype)), latents)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser."""
        network: nn.Module = getattr(self.pipe, self.name)
        return next(network.parameters()).dtype

    def _student(self, adapters: Adapters) -> Denoiser:
        if self.lora.merged:
            return self._with(adapters, None)
        return partial(self._answer, adapters.denoiser)

    def _with(self, adapters: Adapters, factors: Mapping[str, Tensor] | None) -> Denoiser:
        """The denoiser with other factors, or with its own, multiplied into its weights."""
        return partial(self._answer, partial(adapters.call_merged, adapters.merged(factors)))

    def _teacher(self, adapters: Adapters) -> Denoiser:
        def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
            with adapters.off():
                return self._answer(adapters.denoiser, latents, timesteps, conditions)

        return teacher

    def _randomness(self, step: int, part: int = 0) -> torch.Generator:
        return stream(self.settings.seed, step, self.accelerator.process_index, self.device, part)

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    def _depends(self) -> dict[str, str]:
        """What the weights depend on, for the comparison with a checkpoint's."""
        lora = {f"lora.{key}": value for key, value in vars(self.lora).items()}
        settings = {key: value for key, value in vars(self.settings).items() if key not in ("checkpoint_every", "sample_every")}
        base = {f"base {key}": self.facts[key] for key in ("config", "weights")}
        method = {"method": type(self.method).__name__, **{f"method.{key}": value for key, value in vars(self.method).items()}}
        start = None if self.start is None else self.start.hash
        about = {**base, "start": start, **method, **lora, **settings, "processes": self.accelerator.num_processes}
        return {key: repr(value) for key, value in about.items()}

    def _resumed(self, resume: bool) -> dict[str, Any]:
        path = self.output / CHECKPOINT
        if not path.exists():
            return {}
        if not resume:
            raise ValueError(f"{path} is there already: resume=True goes on from it, or name another output folder")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before, now = state["about"], self._depends()
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            listed = "; ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in differing)
            raise ValueError(f"{path} is of a run with other settings: {listed}. Name another output folder, or delete it")
        return state

    def _save(self, step: int, trained: Sequence[Optimised]) -> None:
        scaler = self.accelerator.scaler
        state = {
            "about": self._depends(),
            "data": self.data_hash,
            "step": step,
            "trained": [each.state() for each in trained],
            "averaged": self.averaged,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        scratch = self.output / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(state, scratch)
        os.replace(scratch, self.output / CHECKPOINT)

    # ------------------------------------------------------------------------------------------------------ what comes out

    def _told_method(self) -> str:
        """What the file says: all methods that made it."""
        before = [] if self.start is None else [str(self.start.facts["method"])]
        return ", ".join([*before, type(self.method).__name__])

    def _made(self, adapters: Adapters) -> StepLoRA:
        return StepLoRA(self.name, adapters.state(), self.facts)

    def _log(self, step: int, note: str, loss: float) -> None:
        with (self.output / LOG).open("a") as file:
            file.write(json.dumps({"step": step, "note": note, "loss": loss}) + "\n")

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


def stream(seed: int, step: int, process: int, device: torch.device, part: int = 0) -> torch.Generator:
    """Randomness of one part of one step of one process: a run that goes on needs no state of a generator."""
    digest = hashlib.sha256(f"{seed}/{step}/{process}/{part}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar that is moved by one step, with a note."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("training", total=total, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
