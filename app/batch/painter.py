"""Draws jobs with a pipeline that is loaded once."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten._version import __version__
from hasten.accelerators.scheduler_hook import hooked
from hasten.app.batch.jobs import NOT_A_JOBS, OURS, Job, chosen_of, method_of
from hasten.app.drawing import pictures_of
from hasten.app.errors import BadInput
from hasten.app.models import Model, choose_model, open_model
from hasten.app.rewards import choose_reward, closest
from hasten.app.setup import BATCH, SHIPPED, method_name, steps_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from hasten.app.rewards import Reward
    from hasten.app.steering import Chosen

KEPT = 8
"""Wrappers that are kept for jobs to come; what one keeps of a model (its trace, weights in 8 bits) is made again where it was dropped."""


class Cancelled(Exception):
    """The pictures are wanted no more."""


@dataclass(frozen=True)
class Painted:
    """A picture.

    Attributes:
        image: RGB.
        seconds: The job's share of its call's time: jobs of one call share it equally.
        score: Of the reward where the picture was steered, else of the painter's verifier; None where there is none, or it cannot judge.
        plan_hash: Of the plan that was executed; None where nothing was cached.
        report: What the run did, as plain data: of caching (that of the whole call), or of steering; None for a plain run.
        warnings: What was not done as asked.
    """

    image: Image
    seconds: float
    score: float | None
    plan_hash: str | None
    report: dict[str, Any] | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Wrapper:
    """How jobs of one key are drawn.

    Attributes:
        call: The pipeline, accelerated, steered or neither.
        fast: The accelerated pipeline where there is one.
        chosen: Of steering.
        steps: What the pipeline is asked for.
        name: Of the method, for people.
    """

    call: Any
    fast: Any
    chosen: Chosen | None
    steps: int
    name: str


class Painter:
    """Holds one pipeline and draws jobs with it, those of one key in one call.

    Every picture starts from its job's own seed, drawn on the CPU, so it does not depend on the jobs beside it, but for rounding: kernels
    choose differently by batch size. It is for one thread at a time; what several threads share must be guarded by them.

    Args:
        model: As `--model` names it.
        dtype, device: As `--dtype` and `--device` say.
        score: What judges pictures that are not steered, named as `--reward` does; "auto" takes `shapes` for models that ship and nothing
            for others, None takes nothing.
        kept: Wrappers kept for jobs to come.

    Attributes:
        model: The pipeline, and how it wants to be called.

    Raises:
        BadInput: The model cannot be loaded, or there is no such reward.
    """

    def __init__(
        self, model: str = "shapes", dtype: str = "auto", device: str = "auto", *, score: str | None = "auto", kept: int = KEPT
    ) -> None:
        choice = choose_model(model)
        if score == "auto":
            score = "shapes" if choice.shipped else None
        self._verifier: Reward | None = choose_reward(score) if score is not None else None
        self.model: Model = open_model(choice, dtype=dtype, device=device)
        if self._verifier is not None:
            self._verifier.load(self.model.device)
        self._kept = kept
        self._wrappers: OrderedDict[str, _Wrapper] = OrderedDict()
        self._fast: OrderedDict[str, Any] = OrderedDict()

    # --------------------------------------------------------------------------------------------------------------- drawing

    def paint(
        self,
        jobs: Sequence[Job],
        *,
        cancelled: Callable[[], bool] | None = None,
        stepped: Callable[[int, int], None] | None = None,
    ) -> list[Painted]:
        """Draws jobs of one key in one call; steered ones in a call each.

        Args:
            jobs: At least one.
            cancelled: Asked at every denoising step; True ends the drawing there and leaves the pipeline ready for other jobs.
            stepped: Told after every denoising step how many of how many are done, of the pipeline call that is running (a steered or
                searched picture may take several).

        Returns:
            A picture for each job, in their order.

        Raises:
            Cancelled: `cancelled` said so.
            BadInput: A job asks for something that this pipeline does not take.
            ValueError: There is no job, or their keys differ.
        """
        if not jobs or len({job.key() for job in jobs}) > 1:
            raise ValueError(f"jobs must be at least one, all of the same key, not {len(jobs)} of {len({job.key() for job in jobs})} keys")
        wrapper = self._wrapper(jobs[0])
        watch = _Watch(cancelled, stepped)
        if jobs[0].steered:
            return [self._steered(wrapper, job, watch) for job in jobs]
        call = self._call(wrapper, jobs)
        began = time.perf_counter()
        with watch.over(self.model.pipe.scheduler):
            output = wrapper.call(**call)
        seconds = (time.perf_counter() - began) / len(jobs)
        images = pictures_of(self.model.pipe, output)
        if len(images) != len(jobs):
            raise BadInput(f"the pipeline must make one picture of each prompt; it made {len(images)} of {len(jobs)}")
        report = wrapper.fast.report if wrapper.fast is not None else None
        data = report.to_json() if report is not None else None
        plan = report.plan.hash if report is not None and report.plan is not None else None
        said = tuple(report.warnings) if report is not None else ()
        scores = self._scores(images, [job.prompt for job in jobs])
        return [Painted(image, seconds, score, plan, data, said) for image, score in zip(images, scores, strict=True)]

    def _steered(self, wrapper: _Wrapper, job: Job, watch: _Watch) -> Painted:
        assert wrapper.chosen is not None
        call = self._call(wrapper, [job])
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught, watch.over(self.model.pipe.scheduler):
            warnings.simplefilter("always", UserWarning)
            output = wrapper.call(**call)
        seconds = time.perf_counter() - began
        image = pictures_of(self.model.pipe, output)[0]
        report = wrapper.call.report
        if "draft_steps" in wrapper.chosen.extra:
            score = _judged(wrapper.chosen.reward, [image], [job.prompt], self.model.device)[0]  # the report's are those of drafts
        else:
            score = _finite(float(report.lineage.nodes[report.selected[0][0]].reward))
        plan = wrapper.fast.report.plan if wrapper.fast is not None else None
        said = tuple(dict.fromkeys([*report.warnings, *(" ".join(str(warning.message).split()) for warning in caught)]))
        return Painted(image, seconds, score, plan.hash if plan is not None else None, report.to_json(), said)

    def _call(self, wrapper: _Wrapper, jobs: Sequence[Job]) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        import torch

        first = jobs[0]
        size = (first.width, first.height) if first.width is not None and first.height is not None else None
        try:
            arguments = self.model.arguments(first.guidance, size)
        except BadInput as why:
            raise BadInput(str(why).replace("--", "")) from None
        arguments |= first.arguments
        if first.negative_prompt is not None:
            arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
        generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        prompts = [job.prompt for job in jobs]
        return {"prompt": prompts, "generator": generators, "num_inference_steps": wrapper.steps, **arguments}

    def _scores(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float | None]:
        """Of the painter's verifier; None where it cannot judge."""
        scores: list[float | None] = [None] * len(images)
        if self._verifier is None:
            return scores
        judged = [i for i, prompt in enumerate(prompts) if _readable(self._verifier, prompt)]
        if judged:
            found = _judged(self._verifier, [images[i] for i in judged], [prompts[i] for i in judged], self.model.device)
            for i, score in zip(judged, found, strict=True):
                scores[i] = score
        return scores

    # ------------------------------------------------------------------------------------------------------------- wrappers

    def check(self, job: Job) -> None:
        """Finds out without drawing whether the pipeline takes what the job asks for, as far as can be told.

        Raises:
            BadInput: It does not.
        """
        self._call(self._wrapper(job), [job])

    @property
    def call_arguments(self) -> list[str]:
        """Names of further arguments that a job may give; see `hasten.app.batch.jobs.Rules`."""
        return job_arguments(self.model.parameters)

    def _wrapper(self, job: Job) -> _Wrapper:
        """How jobs of this key are drawn, kept from before or made now."""
        key = job.key()
        if key in self._wrappers:
            self._wrappers.move_to_end(key)
            return self._wrappers[key]
        wrapper = self._made(job)
        self._wrappers[key] = wrapper
        while len(self._wrappers) > self._kept:
            self._wrappers.popitem(last=False)
        return wrapper

    def _made(self, job: Job) -> _Wrapper:
        from hasten.accelerators.caching.plan import Plan

        known = self.model.parameters
        for name in (*job.arguments, *(["negative_prompt"] if job.negative_prompt is not None else [])):
            if name not in known:
                raise BadInput(f"{type(self.model.pipe).__name__} takes no {name}{closest(name, list(known))}")
        choice = self.model.choice
        default = SHIPPED.get(choice.name, "delta-dit") if choice.shipped else "auto"
        method = method_of(job.caching, default="none" if job.steered and not job.caching else default)
        steps = job.steps or self.model.steps
        if isinstance(method, Plan):
            planned = steps_of(method)
            if job.steps is not None and job.steps != planned:
                raise BadInput(f"steps must be {planned}, for which the plan was made, not {job.steps}")
            steps = planned
        fast = self._accelerated(job, method) if method is not None else None
        pipe = fast if fast is not None else self.model.pipe
        if not job.steered:
            return _Wrapper(pipe, fast, None, steps, method_name(method))
        chosen = chosen_of(job, shipped=choice.shipped)
        chosen.reward.load(self.model.device)
        return _Wrapper(self._steering(job, chosen, pipe, fast is not None), fast, chosen, steps, method_name(method))

    def _accelerated(self, job: Job, method: Any) -> Any:
        """The pipeline with a method or plan: one for all sizes and numbers of steps, so that the model is traced once."""
        from hasten.pipelines.accelerated import accelerate

        options = json.dumps(dict(job.caching), sort_keys=True)
        if options in self._fast:
            self._fast.move_to_end(options)
            return self._fast[options]
        try:
            fast = self._fast[options] = accelerate(self.model.pipe, method)
        except ValueError as why:
            raise BadInput(str(why)) from why
        while len(self._fast) > self._kept:
            self._fast.popitem(last=False)
        return fast

    def _steering(self, job: Job, chosen: Chosen, pipe: Any, cached: bool) -> Any:
        from hasten.pipelines.searching import search
        from hasten.pipelines.steering import steer

        steers = "steer" in job.steering
        micro_batch = job.steering.get("micro_batch")
        if micro_batch is None and not (steers and cached):  # cached blocks belong to all particles
            micro_batch = BATCH if self.model.choice.shipped else 1
        try:
            return (steer if steers else search)(
                pipe, chosen.reward.verifier, chosen.method, budget=chosen.budget, micro_batch=micro_batch, **chosen.extra
            )
        except ValueError as why:
            raise BadInput(str(why)) from why

    def settings(self, job: Job) -> dict[str, Any]:
        """Everything that the job's picture depends on, as plain data, as it is written into its file."""
        import diffusers
        import torch

        wrapper = self._wrapper(job)
        call = self._call(wrapper, [job])
        return {
            **{name: value for name, value in call.items() if isinstance(value, bool | int | float | str)},
            **job.to_row(),
            "model": self.model.choice.name,
            "method": wrapper.name,
            "steps": wrapper.steps,
            "dtype": self.model.dtype,
            "device": self.model.device,
            "versions": {"hasten": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }


def job_arguments(parameters: Mapping[str, Any]) -> list[str]:
    """Of the parameters of a pipeline's call those that a job may give under their own name."""
    return [name for name in parameters if name not in OURS and name not in NOT_A_JOBS and name not in ("self", "args", "kwargs")]


class _Watch:
    """Listens to a scheduler: tells how far a call is, and ends it where it is wanted no more."""

    def __init__(self, cancelled: Callable[[], bool] | None, stepped: Callable[[int, int], None] | None) -> None:
        self._cancelled, self._told = cancelled, stepped
        self._done, self._total = 0, 1

    def over(self, scheduler: Any) -> Any:
        """The context of a call."""
        self._ask()
        return hooked(scheduler, self)

    def timesteps_set(self, scheduler: Any) -> None:
        """The scheduler says how many steps there are."""
        self._done, self._total = 0, max(1, len(scheduler.timesteps))
        self._ask()

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """The denoiser is about to be called."""
        self._ask()

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        """Nothing to do."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """One step further."""
        self._done += 1
        if self._told is not None:
            self._told(self._done, self._total)
        self._ask()

    def _ask(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled


def _readable(reward: Reward, prompt: str) -> bool:
    try:
        reward.check_captions([prompt])
    except BadInput:
        return False
    return True


def _judged(reward: Reward, images: Sequence[Image], prompts: Sequence[str], device: str) -> list[float | None]:
    """Scores of pictures; None for what is no number, and for all where the verifier refuses them."""
    import numpy as np
    import torch

    from hasten.accelerators.steering.verifiers import VerifierError, checked_score

    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    try:
        with torch.no_grad():
            scores = checked_score(reward.verifier, pixels.to(device).float() / 255, list(prompts))
    except VerifierError:
        return [None] * len(images)
    return [_finite(float(score)) for score in scores]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
