"""Searches for the noise from which an unmodified diffusers pipeline makes the best sample.

    searched = hasten.search(pipe, verifier, hasten.ZeroOrder(rounds=4))
    image = searched("a red circle left of a blue square", num_inference_steps=20).images[0]
    print(searched.report)

Whole runs are the pipeline's own, solver and all. Where a method goes from one noise level to another, the pipeline is called on timesteps
of ours and the scheduler's update is replaced by the noiseless generalised DDIM step, so guidance and conditioning stay the pipeline's.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.scheduler_hook import driven
from hasten.accelerators.search.ascent import AscentMethod, optimise
from hasten.accelerators.search.task import Found, SearchMethod
from hasten.accelerators.search.task import search as search_noise
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.controller import SteeringError
from hasten.accelerators.steering.kernels import ddim_eta
from hasten.accelerators.steering.levels import NoisePath
from hasten.accelerators.steering.loop import checked_micro_batch
from hasten.accelerators.steering.report import SearchReport
from hasten.accelerators.steering.verifiers import Verifier, as_verifier
from hasten.pipelines.accelerated import denoisers_of
from hasten.pipelines.latent_decoding import Decode, decoder_of
from hasten.pipelines.particle_rows import LivingRows, bound, encoded_once, prompts_of, repeated, with_generators
from hasten.pipelines.scheduler_levels import SchedulerLevels
from hasten.pipelines.steering import called, expected_steps, plain_of, probed_rows, seed_of


class _Known(Exception):
    """Ends a call once the shape of its latents is known."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape


@dataclass
class Stretch:
    """One call of the pipeline from a noise level to another: a scheduler's driver.

    Args:
        scheduler: The pipeline's.
        grid: Levels from start to stop; None for a whole run by the scheduler itself.
        path: The scheduler's.
        given: [n, ...] the latents that the pipeline is given. It will multiply them by its scheduler's `init_noise_sigma`, which is known
            once the timesteps are set, and is taken out of them then; None where nobody minds.

    Attributes:
        latents: After the last step.
        clean: The last estimate.
    """

    scheduler: Any
    grid: list[float] | None
    path: NoisePath
    given: Tensor | None = None
    generators: list[torch.Generator] = field(default_factory=list)
    latents: Tensor = field(init=False)
    clean: Tensor = field(init=False)
    _calls: int = 0

    def timesteps_set(self, scheduler: Any) -> None:
        """Puts the grid's timesteps in place of the scheduler's."""
        self._calls = 0
        if self.grid is not None:
            put_grid(scheduler, self.grid[:-1] if len(self.grid) > 1 else self.grid, self.path)
        if self.given is not None:
            self.given /= float(getattr(scheduler, "init_noise_sigma", 1.0))
            self.given = None

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        """The scheduler's own step, or the noiseless one of the grid; see `SchedulerDriver`."""
        given, call = arguments.arguments, self._calls
        self._calls += 1
        if self.grid is None:
            with_generators(proceed, given, self.generators)
            out = proceed(*arguments.args, **arguments.kwargs)
            self.latents = self.clean = out[0] if isinstance(out, tuple) else out.prev_sample
            return out
        sample, now = given["sample"], self.path.at(self.grid[call])
        self.clean = SchedulerLevels(self.scheduler).clean(given["model_output"], sample, now)
        self.latents = sample
        if len(self.grid) > 1:
            after = ddim_eta(sample, self.clean, now, self.path.at(self.grid[call + 1]), eta=0.0).mean
            self.latents = after.to(sample.dtype)
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = call + 1
        return _output(given, self.latents, self.clean)


@dataclass
class _Output:
    """What pipelines read of a scheduler's output."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def _output(given: dict[str, Any], latents: Tensor, clean: Tensor) -> Any:
    return (latents, clean) if given.get("return_dict") is False else _Output(latents, clean)


def put_grid(scheduler: Any, levels: list[float], path: NoisePath) -> None:
    """Gives a scheduler the timesteps of noise levels, and its table of sigmas where it has one."""
    rates = [level / (1 - level) if level < 1 else math.inf for level in levels]
    if path.kind == "flow":
        times = [level * scheduler.config.num_train_timesteps for level in levels]
        sigmas = list(levels)
    else:
        kept = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        known = (((1 - kept) / kept).sqrt()).log().numpy()
        times = np.interp(np.log(np.clip(rates, 1e-12, None)), known, np.arange(len(known))).tolist()
        sigmas = rates
    like = scheduler.timesteps
    scheduler.timesteps = torch.tensor(times, dtype=torch.float32, device=getattr(like, "device", None))
    if isinstance(getattr(scheduler, "sigmas", None), Tensor):
        scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=scheduler.sigmas.device)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None


@dataclass
class _Delivery:
    """Hands finished latents on to the pipeline's own ending: one step, for which nothing is computed."""

    latents: Tensor

    def timesteps_set(self, scheduler: Any) -> None:
        scheduler.timesteps = scheduler.timesteps[-1:]

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        sample = arguments.arguments["sample"]
        latents = self.latents.to(sample)
        return _output(arguments.arguments, latents, latents)


class Evaluator:
    """Runs a pipeline for one prompt between noise levels: what a search needs.

    Args:
        pipe: A pipeline, or an accelerated one.
        call: The call, for one prompt.
        steps: Of a full run.
        known: Encodings of prompts.

    Attributes:
        path: The scheduler's path.
        shape: Of one latent.
        levels: Of a full run, steps + 1 of them.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], steps: int, known: dict[Any, Any]) -> None:
        self.pipe, self.plain, self.steps, self.known = pipe, plain_of(pipe), steps, known
        self.call = {**call, "output_type": "latent"}
        self.last: dict[int, Any] = {}
        self.shape = self._probe()
        levels = SchedulerLevels(self.plain.scheduler)
        self.levels = [levels.at(k).level for k in range(len(self.plain.scheduler.timesteps) + 1)]
        self.path = NoisePath(levels.kind, self.levels[0])

    def _probe(self) -> tuple[int, ...]:
        """The shape of one latent, from a call that ends before anything is computed, and leaves the scheduler's timesteps behind."""
        original = self.plain.prepare_latents

        def prepare(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            raise _Known(tuple((made[0] if isinstance(made, tuple) else made).shape[1:]))

        self.plain.prepare_latents = prepare
        try:
            with encoded_once(self.plain, 1, 1, self.known):
                self.plain(**{**repeated(self.plain, self.call, 1, 1), "generator": constant_streams(1)})
        except _Known as found:
            shape = found.shape
        finally:
            del self.plain.prepare_latents
        return shape

    def grid(self, start: float, stop: float, steps: int) -> list[float] | None:
        """Levels of a stretch, spaced as the scheduler spaces a full run; None for a whole run."""
        if start == self.path.top and stop == 0:
            return None
        if start == stop:
            return [start]
        own, at = np.asarray(self.levels), np.linspace(0, 1, len(self.levels))
        begin, end = (float(np.interp(-level, -own, at)) for level in (start, stop))
        inside = np.interp(np.linspace(begin, end, steps + 1), at, own).tolist()
        return [start, *inside[1:-1], stop]

    def __call__(self, latents: Tensor, start: float, stop: float, steps: int) -> tuple[Tensor, Tensor]:
        """See `Evaluate`."""
        given = latents.to(_dtype(self.plain), copy=True)
        generators = constant_streams(len(latents))
        stretch = Stretch(self.plain.scheduler, self.grid(start, stop, steps), self.path, given, generators)
        rows = LivingRows(len(latents), Meter(), last=self.last)  # the search counts by itself
        call = {
            **repeated(self.plain, {**self.call, "latents": None}, 1, len(latents)),
            "latents": given,
            "num_inference_steps": max(steps, 1),
            "generator": generators,
        }
        with encoded_once(self.plain, len(latents), len(latents), self.known):
            called(self.pipe, _inside(self.plain, stretch, rows), call)
        return stretch.latents.float().cpu(), stretch.clean.float().cpu()

    def generate(self, decode: Decode, steps: int) -> Callable[[Tensor], Tensor]:
        """From noises to images in 0 to 1 in so many steps, with a gradient path through the pipeline's own call.

        Raises:
            SteeringError: The pipeline's call cannot be had without `torch.no_grad`.
        """
        call = inspect.unwrap(type(self.plain).__call__)
        if call is type(self.plain).__call__:
            raise SteeringError(f"{type(self.plain).__name__} cannot be called with gradients; use a search that needs none")

        def images(noises: Tensor) -> Tensor:
            generators = constant_streams(len(noises))
            arguments = {
                **repeated(self.plain, {**self.call, "latents": None}, 1, len(noises)),
                "latents": noises.to(_dtype(self.plain)),
                "num_inference_steps": steps,
                "generator": generators,
            }
            stretch = Stretch(self.plain.scheduler, None, self.path, generators=generators)
            with encoded_once(self.plain, len(noises), len(noises), self.known), driven(self.plain.scheduler, stretch):
                call(self.plain, **arguments)
            return decode(stretch.latents)

        return images


@contextmanager
def _inside(pipe: Any, driver: Any, rows: LivingRows) -> Iterator[None]:
    with driven(pipe.scheduler, driver), rows.watching(denoisers_of(pipe)):
        yield


def constant_streams(rows: int) -> list[torch.Generator]:
    """A generator for every row, all alike: what a search compares must not differ by the luck of later noise."""
    return [torch.Generator().manual_seed(0) for _ in range(rows)]


def _dtype(pipe: Any) -> torch.dtype:
    return next(next(iter(denoisers_of(pipe).values())).parameters()).dtype


class SearchedPipeline:
    """A pipeline whose starting noise is searched for. Made by `search`; call it as the pipeline is called.

    The call's generator says the seed. Prompts are searched for one after the other and returned together.

    Attributes:
        pipe: What was given: a pipeline, or an accelerated one.
        reports: What the last call did, for every prompt.
        found: The noise, the sample and its scores, for every prompt.
    """

    def __init__(
        self,
        pipe: Any,
        verifier: Verifier | Callable[..., Tensor],
        method: SearchMethod | AscentMethod,
        *,
        decode: Decode | None = None,
        budget: Budget | None = None,
        micro_batch: int | None = None,
        draft_steps: int | None = None,
    ) -> None:
        self.pipe, self.method, self.verifier = pipe, method, as_verifier(verifier)
        self.decode, self.budget, self.micro_batch = decode, budget, checked_micro_batch(micro_batch)
        if draft_steps is not None and (type(draft_steps) is not int or draft_steps < 1):
            raise ValueError(f"draft_steps must be a whole number of at least 1, or None, not {draft_steps!r}")
        if draft_steps is not None and not hasattr(method, "climb"):
            raise ValueError(f"draft_steps is for methods that climb gradients; {method} has drafts of its own settings")
        self.draft_steps = draft_steps
        self.reports: list[SearchReport] = []
        self.found: list[Found] = []
        self._known: dict[Any, Any] = {}
        self._lock = threading.Lock()
        plain = plain_of(pipe)
        denoisers_of(plain)
        SchedulerLevels(plain.scheduler)
        if not hasattr(plain, "prepare_latents"):
            raise SteeringError(
                f"{type(plain).__name__} draws its latents by itself (no prepare_latents), so its noise cannot be searched for"
            )
        self.__signature__ = inspect.signature(plain.__call__)

    def __repr__(self) -> str:
        return f"<hasten: {self.method} on {type(plain_of(self.pipe)).__name__}>"

    @property
    def report(self) -> SearchReport | None:
        """Of the first prompt; None before the first call."""
        return self.reports[0] if self.reports else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Searches for every prompt's noise and returns the pipeline's own output for what was found.

        Raises:
            BudgetError: The budget does not suffice for one sample of every prompt.
            SteeringError: The call does not fit the pipeline.
            VerifierError: The verifier returned something that is not one score per image, or passes no gradient where one is needed.
            RuntimeError: The pipeline is being steered or searched already.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this search is already running in another thread; make one per thread, each with its own pipeline")
        try:
            return self._run(bound(plain_of(self.pipe), args, kwargs))
        finally:
            self._lock.release()

    def _run(self, call: dict[str, Any]) -> Any:
        plain = plain_of(self.pipe)
        prompts, seed = prompts_of(plain, call), seed_of(call.pop("generator", None))
        if call.get("latents") is not None:
            raise SteeringError("latents cannot be given to a search, which looks for them; give a generator for its seed")
        decode = self.decode if self.decode is not None else decoder_of(plain, call)
        budget = (self.budget or Budget()).share(len(prompts))
        steps = expected_steps(plain, call)
        self.reports, self.found = [], []
        for number, prompt in enumerate(prompts):
            one = _one_prompt(call, number, len(prompts))
            evaluate = Evaluator(self.pipe, one, steps, self._known)
            meter = Meter(budget)
            rows = probed_rows(self.pipe, one, 1, meter, self._known)
            if hasattr(self.method, "climb"):
                found = self._climbed(evaluate, decode, meter, prompt, number, seed, rows)
            else:
                found = search_noise(
                    self.method, evaluate, evaluate.shape, self.verifier, steps=steps, prompt=prompt, number=number, path=evaluate.path,
                    decode=decode, budget=meter, seed=seed, micro_batch=self.micro_batch, rows_per_step=rows,
                )  # fmt: skip
            found.report.facts |= {"seed": seed}
            self.reports.append(found.report)
            self.found.append(found)
            for text in found.report.warnings:
                warnings.warn(text, stacklevel=4)
        return self._delivered(call, evaluate.last)

    def _climbed(self, evaluate: Evaluator, decode: Decode, meter: Meter, prompt: str, number: int, seed: int, rows: int) -> Found:
        """A search by gradients; where it climbs through a draft, the best noise is run in full afterwards (DITTO-2)."""
        drafts = min(self.draft_steps or evaluate.steps, evaluate.steps)
        whole = Cost(evaluate.steps, evaluate.steps * rows)
        found = optimise(
            self.method, evaluate.generate(decode, drafts), evaluate.shape, self.verifier, prompt=prompt, number=number,  # type: ignore[arg-type]
            steps=drafts, budget=meter, seed=seed, micro_batch=self.micro_batch, rows_per_step=rows, reserve=whole,
        )  # fmt: skip
        meter.charge(whole)
        with meter.timing("denoise"):
            latents, _ = evaluate(found.noise[None] * evaluate.path.start_scale, evaluate.path.top, 0.0, evaluate.steps)
        return Found(latents[0], found.noise, found.level, found.scores, found.report)

    def _delivered(self, call: dict[str, Any], last: dict[int, Any]) -> Any:
        """The pipeline's own output for the latents that were found."""
        plain = plain_of(self.pipe)
        latents = torch.stack([found.latents for found in self.found])
        rows = LivingRows(len(latents), Meter(), last=last)
        rows.alive = torch.zeros_like(rows.alive)
        arguments = {
            **repeated(plain, {**call, "latents": None}, len(latents), 1),
            "num_inference_steps": 1,
            "generator": constant_streams(len(latents)),
        }
        with encoded_once(plain, len(latents), 1, self._known), _inside(plain, _Delivery(latents), rows):
            return plain(**arguments)


def _one_prompt(call: dict[str, Any], number: int, prompts: int) -> dict[str, Any]:
    """The call for one of its prompts."""
    if prompts == 1:
        return call

    def own(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == prompts:
            return value[number : number + 1]
        return value[number : number + 1] if isinstance(value, list | tuple) and len(value) == prompts else value

    return {name: own(name, value) for name, value in call.items()}


def search(
    pipe: Any,
    verifier: Verifier | Callable[..., Tensor],
    method: SearchMethod | AscentMethod | None = None,
    *,
    decode: Decode | None = None,
    budget: Budget | None = None,
    micro_batch: int | None = None,
    draft_steps: int | None = None,
) -> SearchedPipeline:
    """Wraps a pipeline so that the noise it starts from is searched for.

    Args:
        pipe: Any diffusers pipeline, or one that `accelerate` made. It stays as it is.
        verifier: What is maximised; see `steer`.
        method: `RandomSearch` unless told; or `ZeroOrder`, `SearchOverPaths`, `RolloverBudget`; or, for differentiable verifiers and
            pipelines of few steps, `ReNO` and `CARINOX`.
        decode: From latents to images in 0 to 1, where the pipeline's own way is not known.
        budget: The most that a call may spend, shared evenly by its prompts.
        micro_batch: Rows at a time; None for all that the method asks for at once.
        draft_steps: Gradients go through a run of so many steps, and the noise that it found is run in full (DITTO-2's pattern); None
            climbs through full runs.

    Raises:
        ValueError: A setting is out of range, or the pipeline has no denoiser.
        SteeringError: The scheduler's noise levels are not known.
    """
    from hasten.accelerators.search.random_search import RandomSearch

    return SearchedPipeline(
        pipe, verifier, method if method is not None else RandomSearch(), decode=decode, budget=budget, micro_batch=micro_batch,
        draft_steps=draft_steps,
    )  # fmt: skip
