"""From options to a job: everything that can be checked is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten._version import __version__
from hasten.app.drawing import Job, check_number
from hasten.app.errors import BadInput
from hasten.app.methods import choose_method
from hasten.app.models import Choice, Model, choose_model, open_model

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan
    from hasten.accelerators.caching.runtime import Method
    from hasten.pipelines.accelerated import AcceleratedPipeline

SHIPPED = {"shapes-unet": "deepcache"}
"""Methods of the models that ship, where it is not Delta-DiT."""
BATCH = 8
"""Pictures of the shapes model at a time; they are small."""


@dataclass(frozen=True)
class Options:
    """What drawing commands were told, as they were told it."""

    model: str
    method: str | None = None
    interval: int | None = None
    cached: str | None = None
    boundary: str | None = None
    preset: str | None = None
    plan: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    batch: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    threshold: float | None = None
    skip_guidance: int | None = None


@dataclass(frozen=True)
class Checked:
    """Options that make sense together. `steps` is None where the model decides."""

    options: Options
    choice: Choice
    method: Method | Plan | None
    steps: int | None


def check(options: Options) -> Checked:
    """Checks the options without loading a model.

    Raises:
        BadInput: One of them is not allowed.
        PlanError: The plan file is none.
    """
    check_number("--steps", options.steps, 1, whole=True)
    check_number("--guidance", options.guidance, 0)
    check_number("--batch", options.batch, 1, whole=True)
    if not 0 <= options.seed < 2**62:
        raise BadInput(f"--seed must be a whole number from 0 to 2^62, not {options.seed}")
    choice = choose_model(options.model)
    method = choose_method(
        options.method,
        interval=options.interval,
        threshold=options.threshold,
        skip_guidance=options.skip_guidance,
        cached=options.cached,
        boundary=options.boundary,
        preset=options.preset,
        plan=options.plan,
        default=SHIPPED.get(choice.name, "delta-dit") if choice.shipped else "auto",
    )
    steps = options.steps
    if options.plan is not None:
        planned = steps_of(method)
        if steps is not None and steps != planned:
            raise BadInput(f"--steps must be {planned}, for which {options.plan} was made, not {steps}")
        steps = planned
    return Checked(options, choice, method, steps)


def steps_of(plan: Any) -> int:
    """The number of steps to ask the pipeline for, so that it executes those of the plan.

    Some schedulers execute other timesteps than they are asked for, so a plan that this command saved says what was asked.
    """
    return int(plan.facts.get("num_inference_steps", plan.steps))


@dataclass(frozen=True)
class Ready:
    """A loaded model and what is to be drawn with it. `fast` is None for the plain pipeline."""

    checked: Checked
    model: Model
    fast: AcceleratedPipeline | None
    job: Job

    def settings(self) -> dict[str, Any]:
        """Everything that a picture depends on, as plain data."""
        import diffusers
        import torch

        options, method = self.checked.options, self.checked.method
        return {
            "model": options.model,
            "method": method_name(method),
            "plan": str(options.plan) if options.plan is not None else None,
            "steps": self.job.steps,
            **{name: value for name, value in self.job.arguments.items() if isinstance(value, bool | int | float | str)},
            "seed": self.job.seed,
            "batch": self.job.batch,
            "dtype": self.model.dtype,
            "device": self.model.device,
            "versions": {"hasten": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }


def method_name(method: Method | Plan | None) -> str:
    """A method's name for people: 'delta-dit N=2 Nc=0.75 b=0.5', 'auto', 'plan 0123abcd', 'none'."""
    from hasten.accelerators.caching.auto import Auto
    from hasten.accelerators.caching.plan import Plan

    if method is None:
        return "none"
    if isinstance(method, Plan):
        return f"plan {method.hash}"
    return "auto" if isinstance(method, Auto) else str(method)


def prepare(checked: Checked, captions: Sequence[str]) -> Ready:
    """Loads the model.

    Raises:
        BadInput: It cannot be loaded, or not be called or accelerated as was asked.
    """
    from hasten.pipelines.accelerated import accelerate

    options = checked.options
    model = open_model(checked.choice, dtype=options.dtype, device=options.device)
    arguments = model.arguments(options.guidance, options.size)
    batch = options.batch or (BATCH if checked.choice.shipped else 1)
    job = Job(tuple(captions), options.seed, checked.steps or model.steps, batch, arguments)
    try:
        fast = accelerate(model.pipe, checked.method) if checked.method is not None else None
    except ValueError as error:
        raise BadInput(f"--model {options.model}: {error}") from error
    return Ready(checked, model, fast, job)
