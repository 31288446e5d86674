"""Wraps a diffusers pipeline: the same call, the same output, faster.

The pipeline that is given stays as it was. Everything is put on when a call begins and taken off in `finally`.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.attention import Attention, AttentionReport
from hasten.accelerators.caching.auto import Auto
from hasten.accelerators.caching.compose import Composed
from hasten.accelerators.caching.graphs import Graphs, graphs_of
from hasten.accelerators.caching.parts import part_program
from hasten.accelerators.caching.plan import Plan, PlanError
from hasten.accelerators.caching.report import RunReport
from hasten.accelerators.caching.runtime import Method, Session, TraceKey, compiled, compute_all, plan_for
from hasten.accelerators.caching.segments import state_bytes
from hasten.accelerators.caching.state import Packer
from hasten.accelerators.caching.trace import Trace, TraceError, format_bytes, trace_module
from hasten.accelerators.dispatch import Call, intercept
from hasten.accelerators.quantization.int8 import Quantised
from hasten.accelerators.scheduler_hook import hooked

DENOISERS = ("transformer", "unet", "transformer_2")
"""Names under which pipelines keep their denoisers."""


@dataclass(frozen=True)
class ComputeAll:
    """Computes everything: the plain pipeline, timed.

    Attributes:
        sites: Picks the sites whose values are stored where the session stores all.
    """

    sites: Callable[[Trace], tuple[str, ...]] | None = None

    def plan(self, trace: Trace, steps: int) -> Plan:
        """A plan without reuse."""
        return compute_all(trace, steps, self.sites(trace) if self.sites is not None else None)


def parse_bytes(value: int | str | None) -> int | None:
    """Bytes from a number or a text such as '2GiB', '500MB'.

    Raises:
        ValueError: It is neither.
    """
    if value is None or isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"state_budget must be a number of bytes or a text such as '2GiB' or '500MB', not {value!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def denoisers_of(pipe: Any, denoiser: str | None = None) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by their name.

    Raises:
        ValueError: There is none, or none of that name.
    """
    names = (denoiser,) if denoiser is not None else DENOISERS
    found = {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
    if not found:
        components = getattr(pipe, "components", {})
        have = [name for name, value in components.items() if isinstance(value, nn.Module)]
        asked = f"no denoiser {denoiser!r}" if denoiser is not None else f"none of {', '.join(DENOISERS)}"
        raise ValueError(
            f"{type(pipe).__name__} has {asked}; name one of its networks with denoiser= ({', '.join(have) or 'it has none'}), or use "
            "hasten.attach(network, ...) in a loop of your own"
        )
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler to tell the steps from; use hasten.attach(network, ...) instead")
    return found


class _Clock:
    """The step, from the scheduler: begin index plus completed `step` calls, two of them a step for second-order samplers."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.sessions: list[Session] = []
        self._calls = 0
        self._steps: int | None = None
        self._scaled: Any = None

    @property
    def order(self) -> int:
        return max(1, int(getattr(self.scheduler, "order", 1)))

    def timesteps_set(self, scheduler: Any) -> None:
        self._calls, self._steps, self._scaled = 0, None, None
        for session in self.sessions:
            session.restart()
        self._tell()

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        self._scaled = timestep

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        for session in self.sessions:
            self._learn_guidance(session, sample)
            session.guided(model_output)
        self._calls += 1
        self._tell()

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        for session in self.sessions:
            if session.latents_batch is not None:
                blocks = session.latents_batch // rows  # more than one under batched guidance
                session.reindex(torch.cat([index + block * rows for block in range(blocks)]))

    def _tell(self) -> None:
        for session in self.sessions:
            session.set_step(self._calls // self.order)

    def _learn_guidance(self, session: Session, sample: Any) -> None:
        """Learns from its first step how a denoiser's guidance is laid out, and holds it against the plan. No step before that reuses."""
        if "guidance" in session.facts or session.latents_batch is None:
            return
        calls = len(session.branches)
        ratio = session.latents_batch / sample.shape[0] if isinstance(sample, Tensor) and sample.ndim else 1
        session.facts["guidance"] = f"{calls} calls" if calls > 1 else f"batched x{ratio:g}" if ratio != 1 else "single"
        if isinstance(session.method, Plan):
            session.method.check({"guidance": session.facts["guidance"]})

    def total(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many steps this run executes; asked at the first call of each of its denoisers."""
        timesteps = self.scheduler.timesteps
        if self._steps is None:
            begin = getattr(self.scheduler, "begin_index", None)
            if begin is None:
                # A denoiser for the late steps is first called when some are done.
                begin = max(0, _index_of(timesteps, self._scaled, args, kwargs) - self._calls)
            self._steps = math.ceil((len(timesteps) - int(begin)) / self.order)
            facts: dict[str, Any] = {"scheduler": type(self.scheduler).__name__, "order": self.order}
            sigmas = noise_levels(self.scheduler)
            if sigmas is not None:
                facts["sigmas"] = [round(float(s), 6) for s in sigmas[int(begin) :]]
            for session in self.sessions:
                session.facts |= facts
        return self._steps


def noise_levels(scheduler: Any) -> np.ndarray | None:
    """The noise level of every timestep: the scheduler's sigmas, else sqrt((1 - alpha_bar) / alpha_bar)."""
    timesteps = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return np.asarray(torch.as_tensor(sigmas)[: len(timesteps)].cpu(), dtype=np.float64)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    at = torch.as_tensor(alphas).cpu()[torch.as_tensor(timesteps).cpu().long().clamp(0, len(alphas) - 1)].double()
    return ((1 - at) / at).sqrt().numpy()


def _index_of(timesteps: Any, scaled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which timestep a denoiser call is for, where the scheduler does not say: the one for which the latents were scaled, else the one
    that the denoiser is given, as it stands or as a fraction of 1000; the first if that is none of them."""
    values = torch.as_tensor(timesteps).double().cpu()
    named = [kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs] + list(args[1:])
    for value in (scaled, *named):
        if isinstance(value, Tensor) and value.numel() and value.ndim <= 1:
            first = float(value.flatten()[0])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            first = float(value)
        else:
            continue
        for scale in (1.0, 1000.0):
            match = (values - first * scale).abs() < 1e-3
            if bool(match.any()):
                return int(match.nonzero()[0])
    return 0


class AcceleratedPipeline:
    """A pipeline with a plan. Made by `accelerate`; call it as the pipeline is called.

    Everything that is not listed here is the pipeline's own (`fast.scheduler`, `fast.to(...)`, `fast.load_lora_weights(...)`).

    Attributes:
        pipe: The pipeline, unchanged.
        method: The method or plan.
        report: What the last run did (of the first denoiser, where there are several; `reports` has all that were called by name).
        trace: The denoiser's trace, None before the first run.
        graphs: The CUDA graphs of every denoiser by its name, where they were asked for.
        attention: What the attention layers of every denoiser ran in the last call, by its name, where a back end was asked for.
    """

    _OWN = frozenset(
        {"pipe", "method", "reports", "traces", "graphs", "attention", "__signature__"}
        | {"_denoisers", "_options", "_lock", "_enabled", "_baselines", "_announced", "_traced", "_quantised", "_attention"}
    )

    def __init__(
        self,
        pipe: Any,
        method: Method | Plan,
        denoisers: tuple[str, ...],
        graphs: bool | int = False,
        attention: Attention | None = None,
        traces: Mapping[str, dict[TraceKey, Trace]] | None = None,
        **options: Any,
    ) -> None:
        self.pipe = pipe
        self.method = method
        self.reports: dict[str, RunReport] = {}
        self.traces: dict[str, Trace] = {}
        self._traced = {name: (getattr(pipe, name), known) for name, known in (traces or {}).items()}
        self._quantised: dict[str, dict[str, Quantised]] = {}
        self.graphs: dict[str, Graphs] = {name: made for name in denoisers if (made := graphs_of(graphs)) is not None}
        self.attention: dict[str, AttentionReport] = {}
        self._attention = attention  # one object for all runs: another would have compiled blocks compiled again
        self._denoisers = denoisers
        self._options = options
        self._lock = threading.Lock()
        self._enabled = True
        self._baselines: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._announced = not isinstance(method, Auto)
        self.__signature__ = inspect.signature(pipe.__call__)

    def __getattr__(self, name: str) -> Any:
        if name in AcceleratedPipeline._OWN:
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in AcceleratedPipeline._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"<hasten: {self.method} on {type(self.pipe).__name__}>"

    @property
    def report(self) -> RunReport:
        """What the last run did."""
        return next(iter(self.reports.values()), RunReport())

    @property
    def trace(self) -> Trace | None:
        """The first denoiser's trace, once there was a run."""
        return next(iter(self.traces.values()), None)

    def enabled(self, on: bool = True) -> AcceleratedPipeline:
        """Turns the acceleration on or off; returns the wrapper."""
        self._enabled = on
        return self

    @contextmanager
    def paused(self) -> Iterator[AcceleratedPipeline]:
        """Plain calls inside the block."""
        before, self._enabled = self._enabled, False
        try:
            yield self
        finally:
            self._enabled = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline, with the plan carried out.

        Raises:
            RuntimeError: The wrapper is already running in another thread.
            PlanError: The plan does not fit this run.
        """
        return self.call_within(nullcontext(), *args, **kwargs)

    def call_within(self, inside: AbstractContextManager[Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline within a context that is entered when everything of the acceleration is in place; errors as for a call."""
        if not self._enabled:
            with inside:
                return self.pipe(*args, **kwargs)
        out = self._run(self.method, args, kwargs, inside)
        plan = self.report.plan
        if not self._announced and plan is not None:
            self._announced = True
            print(
                f"hasten: {plan.facts.get('method')}; {100 * plan.computed_fraction:.0f}% computed, "
                f"at most {self.report.bound or 1.0:.2f}x faster",
                file=sys.stderr,
            )
        return out

    def to(self, *args: Any, **kwargs: Any) -> AcceleratedPipeline:
        """As the pipeline's own `to`; returns the wrapper."""
        self.pipe.to(*args, **kwargs)
        return self

    def baseline(self, *args: Any, **kwargs: Any) -> Any:
        """The plain pipeline, timed: later reports of the same steps and shape tell the measured speed-up."""
        out = self._run(ComputeAll(), args, kwargs)
        for name, report in self.reports.items():
            self._baselines[self._key(name, report)] = (report.seconds, report.call_seconds)
        return out

    def _key(self, name: str, report: RunReport) -> tuple[Any, ...]:
        facts = report.plan.facts if report.plan is not None else {}
        shape = report.trace.resolution if report.trace is not None else ()
        return name, len(report.step_seconds), shape, facts.get("scheduler"), facts.get("guidance")

    def _run(
        self, method: Method | Plan, args: tuple[Any, ...], kwargs: dict[str, Any], inside: AbstractContextManager[Any] | None = None
    ) -> Any:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this accelerated pipeline is already running in another thread; make one wrapper and pipeline per thread")
        try:
            clock = _Clock(self.pipe.scheduler)
            began = time.perf_counter()
            with ExitStack() as stack:
                if self._attention is not None and method is self.method:
                    self.attention = {
                        name: stack.enter_context(self._attention.applied(module, getattr(self.pipe, "_execution_device", None)))
                        for name in self._denoisers
                        if isinstance(module := getattr(self.pipe, name, None), nn.Module)
                    }
                sessions = {
                    name: Session(
                        module,
                        method,
                        clock.total,
                        traces=self._known(name, module),
                        quantised=self._quantised.setdefault(name, {}),
                        graphs=self.graphs.get(name) if method is self.method else None,
                        **self._options,
                    )
                    for name in self._denoisers
                    if isinstance(module := getattr(self.pipe, name, None), nn.Module)
                }
                clock.sessions = list(sessions.values())
                stack.callback(self._collect, sessions, began)
                for session in sessions.values():
                    stack.enter_context(session)
                stack.enter_context(hooked(self.pipe.scheduler, clock))
                if inside is not None:
                    stack.enter_context(inside)
                return self.pipe(*args, **kwargs)
        finally:
            self._lock.release()

    def _known(self, name: str, module: nn.Module) -> dict[TraceKey, Trace]:
        """Earlier traces of this denoiser, unless the pipeline has been given another one since; one put into `traces` counts."""
        before, known = self._traced.get(name, (module, {}))
        if before is not module:
            known = {}
            self._quantised.pop(name, None)
        elif name in self.traces:
            trace = self.traces[name]
            known[trace.resolution, getattr(torch, trace.dtype)] = trace
        self._traced[name] = module, known
        return known

    def _collect(self, sessions: dict[str, Session], began: float) -> None:
        """Keeps reports and traces, also of a run that failed."""
        self.reports = {}
        for name, session in sessions.items():
            report = session.report
            if session.trace is None:
                continue
            self.traces[name] = session.trace
            report.call_seconds = time.perf_counter() - began
            known = self._baselines.get(self._key(name, report))
            if known is not None:
                report.baseline_seconds, report.baseline_call_seconds = known
            self.reports[name] = report


def accelerate(
    pipe: Any,
    method: Method | Plan | Sequence[Method | Plan] | None = None,
    *,
    denoiser: str | None = None,
    state_budget: int | str | None = None,
    nan_check: str = "auto",
    force_store: bool = False,
    allow_mismatch: bool = False,
    state: str | None = None,
    graphs: bool | int = False,
    attention: str | None = None,
) -> AcceleratedPipeline:
    """Wraps a diffusers pipeline so that its calls carry out a method or a plan.

    Args:
        pipe: Any diffusers pipeline; it stays as it was.
        method: For example `hasten.DeltaDiT(interval=2)`, or a `Plan`. None chooses a conservative rule from the trace and the
            number of steps, and prints what it expects to save. Several at once as a list, where each decides something else:
            `[hasten.Forecast(interval=3), hasten.SkipGuidance()]`.
        denoiser: Name of the network to cache where the default ("transformer", "unet", "transformer_2") is not meant.
        state_budget: Most bytes of stored offsets, such as "2GiB"; a plan that needs more is refused.
        nan_check: "auto" (at once on CPU, on CUDA at the end of the run), "sync", or "off".
        force_store: Collect every offset at every step, for tests and timing.
        allow_mismatch: Whether a calibrated plan may run on other weights or adapters than those it was calibrated on.
        state: "int8" or "fp8" to keep stored values in 8 bits with a scale for every token: a half to a quarter of the memory.
        graphs: True to capture every kind of denoiser call as a CUDA graph and replay it, at most 16 of them, or how many at most. Of
            use where a call's kernels take less time than Python needs to launch them. The second call of a kind makes its graph, and
            whatever cannot be captured runs as always, for a reason that the report's warnings tell. They keep memory between runs:
            that of one more denoiser call, its arguments, and the stored offsets; `fast.graphs[name].clear()` gives it back.
        attention: What computes the denoiser's attention during calls: "xformers", "flash", "flash3", "sage", "math" or another name that
            the error for a wrong one lists. None leaves it as it is. After a run `fast.attention[name]` says what each layer ran.

    Raises:
        ValueError: No denoiser, an option is not one of those allowed, or the package of the attention back end is missing.
    """
    if isinstance(pipe, AcceleratedPipeline):
        raise ValueError("this pipeline is accelerated already; accelerate(fast.pipe, ...) makes a second wrapper")
    if isinstance(method, list | tuple):
        chosen: Method | Plan | None = method[0] if len(method) == 1 else Composed(tuple(method))
    else:
        chosen = method  # type: ignore[assignment]
    if chosen is not None and not hasattr(chosen, "plan") and not isinstance(chosen, Plan):
        raise ValueError(f"method must be a caching method such as hasten.DeltaDiT(), or a Plan, not {type(chosen).__name__}")
    names = tuple(denoisers_of(pipe, denoiser))
    Packer(state)  # refuses what it does not know
    if nan_check not in ("auto", "sync", "off"):
        raise ValueError(f"nan_check must be 'auto', 'sync' or 'off', not {nan_check!r}")
    return AcceleratedPipeline(
        pipe,
        chosen if chosen is not None else Auto(),
        names,
        state_budget=parse_bytes(state_budget),
        nan_check=nan_check,
        force_store=force_store,
        allow_mismatch=allow_mismatch,
        state=state,
        graphs=graphs,
        attention=None if attention is None else Attention(attention),
    )


class _Captured(Exception):
    """Stops a pipeline at its first denoiser call."""


def _first_call(pipe: Any, denoiser: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, Any, int]:
    """Name, arguments and number of executed steps of the pipeline's first denoiser call; nothing is denoised."""
    caught: dict[str, Any] = {}
    modules = denoisers_of(pipe, denoiser)
    clock = _Clock(pipe.scheduler)

    def stop_at(name: str) -> Any:
        def handle(call: Call, call_args: tuple[Any, ...], call_kwargs: dict[str, Any]) -> Any:
            caught.update(name=name, args=call_args, kwargs=call_kwargs, steps=clock.total(call_args, call_kwargs))
            raise _Captured

        return handle

    try:
        with hooked(pipe.scheduler, clock), intercept({module: stop_at(name) for name, module in modules.items()}):
            pipe(*args, **kwargs)
    except _Captured:
        return caught["name"], caught["args"], caught["kwargs"], caught["steps"]
    raise TraceError(f"{type(pipe).__name__} finished without calling {', '.join(modules)}")


def trace(target: Any, *args: Any, denoiser: str | None = None, **kwargs: Any) -> Trace:
    """Traces a denoiser, or the denoiser of a pipeline.

        print(hasten.trace(pipe, "a red circle", num_inference_steps=20))
        print(hasten.trace(transformer, latents, timestep=t, encoder_hidden_states=text))

    Args:
        target: A network, called as `target(*args, **kwargs)`; or a pipeline with the arguments of its call, which is stopped at its
            first denoiser call.
        denoiser: Which network of a pipeline.

    Raises:
        TraceError: The denoiser is compiled as a whole, or is never called.
    """
    if isinstance(target, nn.Module):
        return trace_module(target, args, kwargs)
    if isinstance(target, AcceleratedPipeline):
        target = target.pipe
    name, call_args, call_kwargs, _ = _first_call(target, denoiser, args, kwargs)
    return trace_module(getattr(target, name), call_args, call_kwargs)


@dataclass(frozen=True)
class Explanation:
    """What a method would do to a pipeline. `print` it."""

    trace: Trace
    plan: Plan
    reasons: tuple[str, ...]
    state_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "trace": self.trace.to_json(),
            "method": self.plan.facts.get("method"),
            "steps": self.plan.steps,
            "computed_fraction": self.plan.computed_fraction,
            "bound": self.plan.speedup_bound(self.trace),
            "state_bytes_per_branch": self.state_bytes,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        lines = [
            str(self.trace),
            "",
            str(self.plan),
            f"speed-up of the denoiser loop at most {self.plan.speedup_bound(self.trace):.2f}x; stored offsets "
            f"{format_bytes(self.state_bytes)} per guidance branch",
        ]
        return "\n".join([*lines, *(f"not cached: {reason}" for reason in self.reasons)])


def explain(pipe: Any, method: Method | Plan | None = None, *args: Any, denoiser: str | None = None, **kwargs: Any) -> Explanation:
    """Says before a run what a method will cache, and why something will not be.

        print(hasten.explain(pipe, hasten.DeltaDiT(interval=2), "a red circle", num_inference_steps=20))

    Args:
        pipe: A diffusers pipeline.
        method: A method, a plan, or None for the default.
        args: Arguments of the pipeline's call, with `kwargs`; it is stopped at the first denoiser call.
        denoiser: Which network.

    Raises:
        PlanError: The plan does not fit.
    """
    if isinstance(pipe, AcceleratedPipeline):
        method, pipe = method or pipe.method, pipe.pipe
    name, call_args, call_kwargs, steps = _first_call(pipe, denoiser, args, kwargs)
    found = trace_module(getattr(pipe, name), call_args, call_kwargs)
    plan = plan_for(method if method is not None else Auto(), found, steps)
    reasons = [f"{block.path}: {block.reason}" for block in found.blocks if block.reason is not None]
    plan, whole = plan.blocks, plan
    kind = found.kind_of(plan.sites)
    if kind == "blocks":
        rows, broken = compiled(found, plan, 0)
        size = state_bytes(found, rows)
        reasons += broken
    elif kind == "parts":
        sizes = {part.path: part.bytes for part in found.parts}
        size = sum(sizes[site] for site in plan.sites)
        reasons += part_program(found, plan.sites, plan.actions[:, :, 0])[1]
    else:
        size = 0  # told by the run: a UNet's blocks return their features only when they are called
    if whole.computed_fraction == 1:
        reasons.append(f"nothing is reused in {steps} steps ({plan.facts.get('method', 'plan')})")
    return Explanation(found, whole, tuple(reasons), size)


__all__ = [
    "AcceleratedPipeline",
    "ComputeAll",
    "Explanation",
    "PlanError",
    "accelerate",
    "denoisers_of",
    "explain",
    "noise_levels",
    "trace",
]
