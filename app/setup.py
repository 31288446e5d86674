"""From options to a job: everything that can be checked is checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
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
    from hasten.pipelines.step_lora import StepLoRA

SHIPPED = {"shapes-unet": "deepcache"}
"""Methods of the models that ship, where it is not Delta-DiT."""
USUAL = 4
"""Steps with a step LoRA that is for so many, where no option says."""
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
    step_lora: str | None = None


@dataclass(frozen=True)
class Checked:
    """Options that make sense together. `steps` is None where the model decides, `lora` where no step LoRA is applied."""

    options: Options
    choice: Choice
    method: Method | Plan | None
    steps: int | None
    lora: StepLoRA | None = None


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
    lora = None if options.step_lora is None else choose_step_lora(options.step_lora)
    method = choose_method(
        options.method,
        interval=options.interval,
        threshold=options.threshold,
        skip_guidance=options.skip_guidance,
        cached=options.cached,
        boundary=options.boundary,
        preset=options.preset,
        plan=options.plan,
        # With few steps there is little to reuse: only what is asked for.
        default="none" if lora is not None else SHIPPED.get(choice.name, "delta-dit") if choice.shipped else "auto",
    )
    steps = options.steps
    if lora is not None and steps is None:
        steps = USUAL if USUAL in lora.steps else lora.steps[-1]
    if lora is not None and steps not in lora.steps:
        raise BadInput(f"--steps must be one of {', '.join(map(str, lora.steps))} with --step-lora {options.step_lora}, not {steps}")
    if options.plan is not None:
        planned = steps_of(method)
        if steps is not None and steps != planned:
            raise BadInput(f"--steps must be {planned}, for which {options.plan} was made, not {steps}")
        steps = planned
    return Checked(options, choice, method, steps, lora)


def choose_step_lora(name: str) -> StepLoRA:
    """The step LoRA of a folder or file, or one that ships.

    Raises:
        BadInput: There is none.
    """
    from hasten.pipelines.step_lora import StepLoRA
    from hasten.pipelines.zoo.loading import step_loras

    shipped = step_loras()
    try:
        return StepLoRA.load(shipped.get(name, Path(name).expanduser()))
    except FileNotFoundError:
        raise BadInput(f"--step-lora must be a folder or file, or one of {', '.join(shipped)}; there is no {name!r}") from None
    except ValueError as error:
        raise BadInput(f"--step-lora: {error}") from error


def steps_of(plan: Any) -> int:
    """The number of steps to ask the pipeline for, so that it executes those of the plan.

    Some schedulers execute other timesteps than they are asked for, so a plan that this command saved says what was asked.
    """
    return int(plan.facts.get("num_inference_steps", plan.steps))


@dataclass(frozen=True)
class Ready:
    """A loaded model and what is to be drawn with it. `fast` is None for the plain pipeline; a step LoRA is applied as long as `kept` is
    not closed."""

    checked: Checked
    model: Model
    fast: AcceleratedPipeline | None
    job: Job
    kept: ExitStack = field(default_factory=ExitStack)

    def settings(self) -> dict[str, Any]:
        """Everything that a picture depends on, as plain data."""
        import diffusers
        import torch

        options, method = self.checked.options, self.checked.method
        return {
            "model": options.model,
            "method": method_name(method),
            **({"step_lora": options.step_lora} if options.step_lora is not None else {}),
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
    arguments, kept = model.arguments(options.guidance, options.size), ExitStack()
    if checked.lora is not None:
        assert checked.steps is not None
        try:
            call = kept.enter_context(checked.lora.applied(model.pipe, checked.steps, guidance_scale=options.guidance))
        except ValueError as error:
            raise BadInput(f"--step-lora {options.step_lora}: {error}") from error
        arguments |= {name: value for name, value in call.items() if name != "num_inference_steps"}
    batch = options.batch or (BATCH if checked.choice.shipped else 1)
    job = Job(tuple(captions), options.seed, checked.steps or model.steps, batch, arguments)
    try:
        fast = accelerate(model.pipe, checked.method) if checked.method is not None else None
    except ValueError as error:
        raise BadInput(f"--model {options.model}: {error}") from error
    return Ready(checked, model, fast, job, kept)
