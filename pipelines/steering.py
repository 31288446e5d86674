"""Steers an unmodified diffusers pipeline: several particles of each prompt are judged on the way, and the pipeline returns the chosen.

    steered = hasten.steer(pipe, hasten.CLIPScore(), particles=4)
    image = steered("a red circle left of a blue square").images[0]
    print(steered.report)

The pipeline's scheduler is hooked for the length of one call, its denoiser computes living rows alone, and the last step hands on the
chosen rows, so that nothing else is decoded. Everything is taken off in `finally`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.scheduler_hook import Reindex, driven
from hasten.accelerators.steering.budget import Budget, Meter
from hasten.accelerators.steering.controller import Population, Run, Selection, SteeringError, SteeringMethod, StepAction, StepInfo
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.kernels import Kernel, ddim_eta, full_renoise, linear_sde
from hasten.accelerators.steering.levels import AlphaSigma
from hasten.accelerators.steering.loop import Scorer, checked_micro_batch
from hasten.accelerators.steering.noise import NoiseStreams
from hasten.accelerators.steering.report import SearchReport
from hasten.accelerators.steering.verifiers import Verifier, as_verifier
from hasten.pipelines.accelerated import AcceleratedPipeline, denoisers_of
from hasten.pipelines.latent_decoding import Decode, decoder_of
from hasten.pipelines.particle_rows import LivingRows, bound, default, encoded_once, permuted_state, prompts_of, repeated, with_generators
from hasten.pipelines.scheduler_levels import SchedulerLevels

KERNELS = ("auto", "ddim", "linear-sde", "renoise", "scheduler")


@dataclass
class Particles:
    """One call of a pipeline with P x K rows: a scheduler's driver.

    Args:
        pipe: The plain pipeline.
        method: What steers.
        scorer: Decodes and judges.
        meter: Of the call.
        seed: Of the call.
        kernel: Replaces the scheduler's update; None leaves it to the scheduler.
        steps: Completed steps to expect.
        stochastic: Whether noise is drawn at the steps.
        rows_per_step: Denoiser rows of a particle's step, where the budget counts them.
        micro_batch: Rows at a time.
        prompts: P.
        keep_pictures: Whether the report gets what was decoded.

    Attributes:
        population: The controller.
        selection: What was returned, once the last step is done.
    """

    pipe: Any
    method: SteeringMethod
    scorer: Scorer
    meter: Meter
    seed: int
    kernel: Kernel | None
    steps: int
    stochastic: bool
    prompts: int
    rows_per_step: int = 1
    micro_batch: int | None = None
    keep_pictures: bool = False
    population: Population = field(init=False)
    selection: Selection | None = field(init=False, default=None)
    reindex: Reindex = field(init=False)

    def __post_init__(self) -> None:
        self.levels = SchedulerLevels(self.pipe.scheduler)
        self._begin()
        self.rows = LivingRows(self.count, self.meter, self.micro_batch)
        self.streams = NoiseStreams(self.seed, self.prompts, self.population.particles)
        self.owners = torch.arange(self.prompts).repeat_interleave(self.population.particles)
        self._calls, self._first, self._total = 0, 0, 0
        self.pictures: dict[int, Any] = {}
        self._seen: list[Tensor] = []
        if self.keep_pictures:
            self.scorer.watch = self._seen.append
        self._held: Tensor | None = None

    def _begin(self) -> None:
        panel = self.scorer.panel
        run = Run(
            self.prompts, self.steps, self.meter, self.seed, self.stochastic, self.rows_per_step, self.scorer.calls, panel.reward_std
        )  # fmt: skip
        self.population = self.method.begin(run)

    @property
    def count(self) -> int:
        """R = P * K."""
        return self.prompts * self.population.particles

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The context in which the pipeline is called."""
        with driven(self.pipe.scheduler, self) as self.reindex, self.rows.watching(denoisers_of(self.pipe)):
            yield

    # ---------------------------------------------------------------------------------------------------- the scheduler

    def timesteps_set(self, scheduler: Any) -> None:
        """The next `step` is the first."""
        self._calls = 0

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        """One call of the scheduler's `step`: the controller is asked before its noise is drawn; see `SchedulerDriver`."""
        given = arguments.arguments
        if self._calls == 0:
            self._settle(given)
        call, self._calls = self._calls, self._calls + 1
        self.rows.stepped()
        position = self._first + call
        now, last = self.levels.at(position), call == self._total - 1
        if self._held is None and call % self.levels.order == 0:
            self._ask(call // self.levels.order, arguments, now)
        sample = given["sample"]
        clean = self._clean(arguments, now) if self.kernel is not None and self._held is None else None
        if self.kernel is None and self.stochastic:
            with_generators(proceed, given, self.streams.generators)
        out = proceed(*arguments.args, **arguments.kwargs)
        if self._held is not None:
            out = _replaced(out, self._held)
        elif clean is not None:
            out = _replaced(out, self._drawn(sample, clean, now, self.levels.at(position + self.levels.order)))
        return self._chosen(out) if last else out

    def _settle(self, given: dict[str, Any]) -> None:
        """Learns from the first step what the call runs through."""
        scheduler, sample = self.pipe.scheduler, given["sample"]
        if len(sample) != self.count:
            raise SteeringError(
                f"{type(self.pipe).__name__} runs with {len(sample)} latents for {self.count} particles, so they cannot be told apart"
            )
        begin = getattr(scheduler, "begin_index", None)
        timesteps = torch.as_tensor(scheduler.timesteps).double().cpu()
        if begin is None:
            begin = int((timesteps - float(given["timestep"])).abs().argmin())
        self._first, self._total = int(begin), len(timesteps) - int(begin)
        steps = self.levels.steps(self._first)
        if steps != self.steps:
            particles, self.steps = self.population.particles, steps
            self._begin()
            if self.population.particles != particles:
                raise SteeringError(
                    f"the call has {steps} steps, for which the budget affords {self.population.particles} particles and not {particles}; "
                    "give num_inference_steps, or a budget that does not bind"
                )

    def _clean(self, arguments: inspect.BoundArguments, now: AlphaSigma) -> Tensor:
        given = arguments.arguments
        return self.levels.clean(given["model_output"], given["sample"], now)

    def _ask(self, step: int, arguments: inspect.BoundArguments, now: AlphaSigma) -> None:
        """Scores the estimates where the controller wants it, and does what it answers."""
        given, x0 = arguments.arguments, self._clean(arguments, now)
        rewards = None
        if self.population.scores_at(step):
            rewards = self._rewards(x0, finished=False)
        action = self.population.on_step(StepInfo(step, given["sample"], x0, rewards))
        self._keep()
        before = self.rows.alive.nonzero()[:, 0]
        if action.alive is not None:
            self.rows.alive = action.alive
        self._follow(action, arguments, before)
        if action.stop:
            self._held = x0 if action.index is None else x0.index_select(0, action.index.to(x0.device))
            self._held = self._held.to(given["sample"].dtype)
            self._stopped = self.rows.alive.clone()
            self.rows.alive = torch.zeros_like(self.rows.alive)

    def _follow(self, action: StepAction, arguments: inspect.BoundArguments, before: Tensor) -> None:
        """Everything that belongs to a row goes where the row goes."""
        if action.index is None and action.alive is None:
            return
        given = arguments.arguments
        index = torch.arange(self.count) if action.index is None else action.index
        if action.index is not None:
            sample = given["sample"]
            permuted_state(self.pipe.scheduler, index, sample)
            for name, value in given.items():
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.count:
                    given[name] = value.index_select(0, index.to(value.device))
        place = torch.zeros(self.count, dtype=torch.int64)
        place[before] = torch.arange(len(before))
        self.reindex(place[index[self.rows.alive.nonzero()[:, 0]]], len(before))

    def _rewards(self, latents: Tensor, finished: bool) -> Tensor:
        """[R] of the living rows; -inf for the others."""
        living = self.rows.alive.nonzero()[:, 0]
        rewards = torch.full((self.count,), -torch.inf, dtype=torch.float64)
        rewards[living] = self.scorer.rewards(latents.index_select(0, living.to(latents.device)), self.owners[living], finished)
        return rewards

    def _keep(self) -> None:
        """Puts what was decoded beside the nodes that the controller has added for it, the last ones of the lineage."""
        images = [picture for batch in self._seen for picture in batch]
        self._seen.clear()
        end = len(self.population.lineage)
        for node, image in zip(range(end - len(images), end), images, strict=True):
            frame = image if image.ndim == 3 else image[0]  # a video's first
            self.pictures[node] = (frame.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    def _drawn(self, sample: Tensor, clean: Tensor, now: AlphaSigma, then: AlphaSigma) -> Tensor:
        """The kernel's step, with every row's noise from its own stream."""
        assert self.kernel is not None
        transition = self.kernel(sample, clean, now, then)
        noise = self.streams.normal(range(self.count), sample.shape[1:]) if transition.std > 0 else None
        return transition.sample(noise).to(sample.dtype)

    def _chosen(self, out: Any) -> Any:
        """The last step's output, of the rows alone that are returned."""
        if self._held is not None:
            self.rows.alive = self._stopped
        latents = out[0] if isinstance(out, tuple) else out.prev_sample
        self.selection = self.population.finish(self._rewards(latents, finished=True))
        self._keep()
        index = torch.tensor([row for rows in self.selection.rows for row in rows])

        def some(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.count:
                return value.index_select(0, index.to(value.device))
            return value

        if isinstance(out, tuple):
            return tuple(some(value) for value in out)
        return type(out)(**{name: some(value) for name, value in out.items()})

    def injected(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call with a generator for every row."""
        parameters = inspect.signature(self.pipe.__call__).parameters
        return {**call, "generator": self.streams.generators} if "generator" in parameters else call


def _replaced(out: Any, latents: Tensor) -> Any:
    """A scheduler's output with other latents."""
    if isinstance(out, tuple):
        return (latents, *out[1:])
    return type(out)(**{**out, "prev_sample": latents})


class SteeredPipeline:
    """A pipeline whose samples are steered. Made by `steer`; call it as the pipeline is called.

    The call's generator says the seed. Its `latents` may have a row for each prompt (all particles start there) or for each particle.
    With select="all" every particle comes back, best first.

    Attributes:
        pipe: What was given: a pipeline, or an accelerated one.
        report: What the last call did: lineage, rewards, cost. `report.plot(path)` draws it.
        selection: Rows, weights and rewards of the last call.
    """

    def __init__(
        self,
        pipe: Any,
        verifier: Verifier | Callable[..., Tensor],
        method: SteeringMethod,
        *,
        estimates: Verifier | Callable[..., Tensor] | None = None,
        kernel: str = "auto",
        eta: float = 1.0,
        decode: Decode | None = None,
        budget: Budget | None = None,
        micro_batch: int | None = None,
        keep_pictures: bool = False,
    ) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
        self.pipe = pipe
        self.method, self.kernel, self.eta = method, kernel, eta
        self.decode, self.budget, self.micro_batch = decode, budget, checked_micro_batch(micro_batch)
        self.keep_pictures = keep_pictures
        self.verifier = as_verifier(verifier)
        self.estimates = None if estimates is None else as_verifier(estimates)
        self.report: SearchReport | None = None
        self.selection: Selection | None = None
        self._known: dict[Any, Any] = {}
        self._lock = threading.Lock()
        plain = plain_of(pipe)
        denoisers_of(plain)
        SchedulerLevels(plain.scheduler)
        if isinstance(pipe, AcceleratedPipeline) and self.micro_batch is not None:
            raise SteeringError("micro_batch does not go with an accelerated pipeline, whose cached blocks belong to the whole batch")
        self.__signature__ = inspect.signature(plain.__call__)

    def __repr__(self) -> str:
        return f"<hasten: {self.method} on {type(plain_of(self.pipe)).__name__}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline with K particles of every prompt.

        Returns:
            The pipeline's own output, of the chosen particles.

        Raises:
            BudgetError: The budget does not suffice for one sample of every prompt.
            SteeringError: The method or the call does not fit the pipeline.
            VerifierError: The verifier returned something that is not one score per image.
            RuntimeError: The pipeline is being steered already.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this steered pipeline is already running in another thread; make one per thread, each with its own pipeline"
            )
        try:
            return self._run(bound(plain_of(self.pipe), args, kwargs))
        finally:
            self._lock.release()

    def _run(self, call: dict[str, Any]) -> Any:
        pipe = plain_of(self.pipe)
        prompts = prompts_of(pipe, call)
        meter = Meter(self.budget or Budget())
        seed = seed_of(call.pop("generator", None))
        decode = self.decode if self.decode is not None else decoder_of(pipe, call)
        kernel, stochastic = self._chosen_kernel(pipe, call)
        particles = Particles(
            pipe,
            self.method,
            Scorer(self.verifier, prompts, meter, decode, self.micro_batch, self.estimates),
            meter,
            seed,
            kernel,
            expected_steps(pipe, call),
            stochastic,
            len(prompts),
            probed_rows(self.pipe, call, len(prompts), meter, self._known),
            self.micro_batch,
            self.keep_pictures,
        )
        rows = particles.injected(repeated(pipe, call, len(prompts), particles.population.particles))
        try:
            with encoded_once(pipe, particles.count, particles.population.particles, self._known):
                out = called(self.pipe, particles.inside(), rows)
        finally:
            self.selection = particles.selection
            self.report = replace(particles.population.report(), pictures=particles.pictures)
            self.report.facts |= {"seed": seed, "kernel": self.kernel if kernel is None else _name(kernel), "stochastic": stochastic}
        for text in self.report.warnings:
            warnings.warn(text, stacklevel=3)
        return out

    def _chosen_kernel(self, pipe: Any, call: dict[str, Any]) -> tuple[Kernel | None, bool]:
        """The kernel in place of the scheduler's update, None for its own, and whether noise is drawn."""
        levels = SchedulerLevels(pipe.scheduler)
        own = levels.draws_noise or (bool(call.get("eta")) and "eta" in inspect.signature(pipe.scheduler.step).parameters)
        if self.kernel == "scheduler" or (self.kernel == "auto" and (own or not self.method.needs_noise)):
            if own and "generator" not in inspect.signature(pipe.scheduler.step).parameters:
                raise SteeringError(f"{levels.name} draws its noise from no generator of ours; use kernel='ddim' or another scheduler")
            return None, own
        if levels.order > 1:
            raise SteeringError(
                f"{levels.name} takes two denoiser calls a step, which no kernel of ours can replace; use a first-order scheduler "
                "(DDIM, Euler, DPM-Solver++), or kernel='scheduler' with a method that needs no noise"
            )
        if self.kernel == "linear-sde":
            return linear_sde, True
        if self.kernel == "renoise":
            return full_renoise, True
        return partial(ddim_eta, eta=self.eta), self.eta > 0


class _Probed(Exception):
    """Ends a call at its first step."""


@dataclass
class _Probe:
    """Counts the rows of one step."""

    pipe: Any
    rows: LivingRows

    @contextmanager
    def inside(self) -> Iterator[None]:
        with driven(self.pipe.scheduler, self), self.rows.watching(denoisers_of(self.pipe)):
            yield

    def timesteps_set(self, scheduler: Any) -> None:
        pass

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        self.rows.stepped()
        raise _Probed


# ------------------------------------------------------------------------------------------------------------------ shared


def plain_of(pipe: Any) -> Any:
    """The pipeline within an accelerated one, or itself."""
    return pipe.pipe if isinstance(pipe, AcceleratedPipeline) else pipe


def called(pipe: Any, inside: Any, call: dict[str, Any]) -> Any:
    """A pipeline's call within a context that lies inside of its acceleration."""
    if isinstance(pipe, AcceleratedPipeline):
        return pipe.call_within(inside, **call)
    with ExitStack() as stack:
        stack.enter_context(inside)
        return pipe(**call)


def seed_of(generator: Any) -> int:
    """The seed that a call's generator was made with; without one, a new one is drawn.

    Raises:
        SteeringError: There are several generators.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != 1:
            raise SteeringError(
                f"generator must be one generator, whose seed is the run's, not {len(generator)}: every particle gets its own"
            )
        generator = generator[0]
    if generator is None:
        return int(torch.randint(2**31, ()).item())
    return int(generator.initial_seed()) & ((1 << 63) - 1)


def probed_rows(pipe: Any, call: dict[str, Any], prompts: int, meter: Meter, known: dict[Any, Any]) -> int:
    """Denoiser rows of a particle's step: found out by one step, charged like any other, where the budget counts them; else 1.

    Raises:
        SteeringError: The pipeline does not use its scheduler.
    """
    if meter.budget.denoiser_rows is None:
        return 1
    plain = plain_of(pipe)
    probe = _Probe(plain, LivingRows(prompts, meter))
    generator = [torch.Generator().manual_seed(0) for _ in range(prompts)]
    try:
        with encoded_once(plain, prompts, 1, known):
            called(pipe, probe.inside(), {**repeated(plain, call, prompts, 1), "generator": generator})
    except _Probed:
        return probe.rows.per_step
    raise SteeringError(f"{type(plain).__name__} never calls its scheduler's step, so it cannot be steered")


def expected_steps(pipe: Any, call: dict[str, Any]) -> int:
    """Completed steps that a call is likely to have; the first step tells for sure."""
    for name in ("timesteps", "sigmas"):
        value: Sequence[Any] | None = call.get(name)
        if value is not None:
            return len(value)
    steps = call.get("num_inference_steps")
    steps = default(pipe, "num_inference_steps") if steps is None else steps
    strength = call.get("strength")
    if strength is not None:
        steps = min(int(steps * strength), steps)
    return max(1, int(steps or 50))


def _name(kernel: Kernel) -> str:
    if isinstance(kernel, partial):
        return f"{kernel.func.__name__} eta={kernel.keywords['eta']:g}"
    return str(getattr(kernel, "__name__", kernel))


def steer(
    pipe: Any,
    verifier: Verifier | Callable[..., Tensor],
    method: SteeringMethod | None = None,
    *,
    estimates: Verifier | Callable[..., Tensor] | None = None,
    kernel: str = "auto",
    eta: float = 1.0,
    decode: Decode | None = None,
    budget: Budget | None = None,
    micro_batch: int | None = None,
    keep_pictures: bool = False,
    **settings: Any,
) -> SteeredPipeline:
    """Wraps a pipeline so that its samples maximise a verifier.

    Args:
        pipe: Any diffusers pipeline, or one that `accelerate` made. It stays as it is.
        verifier: What is maximised: any callable f(images, prompts) or f(images) with one score per image, higher is better; images are
            [n, 3, H, W] in 0 to 1 (videos [n, F, 3, H, W]).
        method: `FKSteering` unless told; or `BestOfN`, `SuccessiveHalving`, `SVDD`, `CoDe`.
        estimates: Judges the estimates on the way, where the verifier is too strict (or too slow) for pictures that are still blurred; the
            verifier then judges finished samples alone. None: what the verifier says of itself (its attribute `for_estimates`), else the
            verifier. To judge both by one verifier whatever it says, give it here, too.
        kernel: The step that draws the noise without which copies of a particle would stay the same. "ddim" is the generalised DDIM step
            on the scheduler's own noise levels, "linear-sde" that of Rollover Budget Forcing, "renoise" (all noise anew) is right for
            distilled models alone, and "scheduler" leaves the update to the scheduler. "auto" takes the scheduler's own where it draws
            noise or where the method needs none, else "ddim".
        eta: How much noise "ddim" draws; 1 is DDPM's, FK steering's choice.
        decode: From latents to images in 0 to 1, where the pipeline's own way is not known or too slow for the estimates.
        budget: The most that a call may spend over all its prompts.
        micro_batch: Rows at a time for the denoiser, the decoder and the verifier; None for all.
        keep_pictures: Keep what was decoded for `report.plot_gallery`.
        settings: Of `FKSteering`, in place of a method: particles, potential, lambda_, ...

    Raises:
        ValueError: A setting is out of range, or the pipeline has no denoiser.
        SteeringError: The scheduler's noise levels are not known.
    """
    if method is not None and settings:
        raise ValueError(f"give a method or its settings ({', '.join(settings)}), not both")
    chosen = method if method is not None else FKSteering(**settings)
    return SteeredPipeline(
        pipe,
        verifier,
        chosen,
        estimates=estimates,
        kernel=kernel,
        eta=eta,
        decode=decode,
        budget=budget,
        micro_batch=micro_batch,
        keep_pictures=keep_pictures,
    )
