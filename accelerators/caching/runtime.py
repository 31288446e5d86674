"""Carries a plan out on a denoiser, for the length of one run.

The session knows the step and the guidance branch of every denoiser call, and hands the call to `forward.py`. All state belongs to
the run and dies with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine, affines
from hasten.accelerators.caching.branches import Branches, Sighting
from hasten.accelerators.caching.compose import CONFLICTS
from hasten.accelerators.caching.contexts import named_contexts
from hasten.accelerators.caching.deciders import DecidedState, Decider, Recorded
from hasten.accelerators.caching.deep import DeepState, deep_program
from hasten.accelerators.caching.forward import BlockState, BranchState, Pass, Recompute
from hasten.accelerators.caching.graphs import DenoiserCall, Graphs, graphs_of
from hasten.accelerators.caching.guidance import Guidance, rows_of, separable
from hasten.accelerators.caching.parts import PartState, part_program
from hasten.accelerators.caching.plan import ALL_BRANCHES, GUIDANCE, ROW, Action, Plan, PlanError
from hasten.accelerators.caching.quantised import layer_handlers, quantised_copy
from hasten.accelerators.caching.report import RunReport
from hasten.accelerators.caching.segments import Row, Span, program, state_bytes
from hasten.accelerators.caching.state import Packer
from hasten.accelerators.caching.trace import (
    Trace,
    TraceError,
    format_bytes,
    latents_position,
    tensors_of,
    trace_module,
    weight_facts,
)
from hasten.accelerators.dispatch import Call, Handler, compiled_whole, intercept
from hasten.accelerators.fused_blocks import fused_handlers
from hasten.accelerators.quantization.int8 import Quantised

TraceKey = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of the latents."""


Observer = Callable[[str, int, dict[Span, dict[int, Tensor]]], None]
"""Hears of a branch, a step, and the offsets stored there by span and stream. It must copy what it keeps."""


class Method(Protocol):
    """Anything that makes a plan from a trace and a number of steps."""

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for a run of `steps` executed steps."""


def plan_for(method: Method | Plan, trace: Trace, steps: int) -> Plan:
    """The plan that a method makes for a run, or the given plan if it fits.

    Raises:
        PlanError: The plan has other sites, another number of steps or is bound to another model.
    """
    plan = method if isinstance(method, Plan) else method.plan(trace, steps)
    if plan.steps != steps:
        raise PlanError(f"the plan has {plan.steps} steps, this run has {steps}")
    plan.check({"model": trace.model, "config": trace.config_hash})
    if trace.kind_of(plan.blocks.sites) is None:
        raise PlanError(f"the plan is for {len(plan.sites)} sites ({', '.join(plan.sites[:2])} ...), the model has {len(trace.sites)}")
    return plan


def compiled(
    trace: Trace, plan: Plan, branch: int, levels: Sequence[float] | None = None, *, force_store: bool = False
) -> tuple[list[Row], list[str]]:
    """What the runtime does under one branch of a plan for blocks, and why cells cannot be reused; see `program`.

    Args:
        levels: Noise level of every step; those of the plan's facts unless told.
    """
    weights = plan.weights[:, :, branch] if plan.weights is not None else None
    levels = levels if levels is not None else plan.facts.get("sigmas")
    return program(trace, plan.actions[:, :, branch], weights=weights, order=plan.forecast_order, levels=levels, force_store=force_store)


def compute_all(trace: Trace, steps: int, sites: tuple[str, ...] | None = None) -> Plan:
    """The plan that computes everything: bit-identical to the bare denoiser, but for rounding where blocks are fused (`fused_blocks`).

    Args:
        sites: Whose values are stored where a session stores all; the blocks unless told.
    """
    facts = {"model": trace.model, "config": trace.config_hash, "method": "compute-all"}
    sites = trace.sites if sites is None else sites
    return Plan(np.zeros((steps, len(sites)), np.uint8), sites, facts=facts)


class Session:
    """One run of one denoiser under a plan. Made by `attach` and by the pipeline wrapper.

    Args:
        denoiser: The network.
        method: A method or a plan.
        steps: Number of executed steps, or a function that tells it from the arguments of the first denoiser call.
        traces: Earlier traces of this very denoiser, by the shape and dtype of its latents; it is traced at the first call of a shape
            that is not among them, and the trace is put there.
        state_budget: Most bytes of stored offsets, or None.
        nan_check: "auto" (tested at once on CPU; on CUDA a flag read at the end), "sync" (at once everywhere), or "off".
        force_store: Collect the offset of every site at every step, for tests and timing.
        quantised: Quantised copies that plans asked for earlier, by the plan's hash; what is made here is put there.
        allow_mismatch: Whether a calibrated plan may run on other weights or adapters than those it was calibrated on.
        state: "int8" or "fp8" to keep stored values in 8 bits; None as the plan says (a fact of that name), else as they are.
        prepare: Called before every denoiser call with the step.
        observe: Called after every denoiser call with the branch, the step and what was stored in it.
        graphs: The denoiser's CUDA graphs, from earlier runs too; None to do without.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        method: Method | Plan,
        steps: int | Callable[[tuple[Any, ...], dict[str, Any]], int],
        *,
        traces: MutableMapping[TraceKey, Trace] | None = None,
        state_budget: int | None = None,
        nan_check: str = "auto",
        force_store: bool = False,
        quantised: MutableMapping[str, Quantised] | None = None,
        allow_mismatch: bool = False,
        state: str | None = None,
        prepare: Callable[[int], None] | None = None,
        observe: Observer | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        if nan_check not in ("auto", "sync", "off"):
            raise ValueError(f"nan_check must be 'auto', 'sync' or 'off', not {nan_check!r}")
        if compiled_whole(denoiser):
            raise TraceError(
                f"{type(denoiser).__name__} is compiled as a whole, so its blocks cannot be cached; compile the blocks one by one "
                "instead (`denoiser.compile_repeated_blocks()`)"
            )
        self.denoiser = denoiser
        self.method = method
        self.trace: Trace | None = None
        self.report = RunReport()
        self.facts: dict[str, Any] = {}
        """Facts of the run that bind its plan; whoever drives the session fills them in before the first call."""
        self._steps = steps
        self._traces: MutableMapping[TraceKey, Trace] = traces if traces is not None else {}
        self._budget = state_budget
        self._nan_check = nan_check
        self._force_store = force_store
        self._quantised_copies: MutableMapping[str, Quantised] = quantised if quantised is not None else {}
        self._allow_mismatch = allow_mismatch
        Packer(state)  # refuses what it does not know
        self._state_kind = state
        self._prepare = prepare
        self._observe = observe
        self._graphs = graphs
        self._stack: ExitStack | None = None
        self._reset()

    def _reset(self) -> None:
        self._step = 0
        self._stepped = False
        self._evaluation = 0
        self._learning: int | None = None
        self._tracing = False
        self.latents_batch: int | None = None
        self._plan: Plan | None = None
        self._guidance: Guidance | None = None
        self._fixes: dict[str, list[Affine]] = {}
        self._branches: dict[str, BranchState] = {}
        self._names = Branches()
        self.context: str | None = None
        self._forward: Pass | None = None
        self._executed: dict[str, list[np.ndarray | None]] = {}
        self._compactable: dict[type, str | None] = {}
        self._quantised: Quantised | None = None
        self._bound: tuple[str | int | None, ...] = ()
        self._layers: dict[nn.Module, Handler] = {}
        self._step_seconds: list[float] = []
        self._bytes_peak = 0
        self._nan_flag: Tensor | None = None
        self._began: float | None = None
        self._ended = 0.0
        self._events: list[tuple[int, Any, Any]] = []

    # ------------------------------------------------------------------------------------------------ life of a run

    def __enter__(self) -> Session:
        if self._stack is not None:
            raise RuntimeError("this session is already running; one session serves one run at a time")
        self._reset()
        self.report = RunReport()
        if self._graphs is not None:
            self._graphs.begin(lambda reason: self.report.warnings.append(reason))
        with ExitStack() as stack:
            stack.enter_context(intercept({self.denoiser: self._on_denoiser}))
            stack.enter_context(named_contexts(self.denoiser, self))
            stack.enter_context(intercept(fused_handlers(self.denoiser)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._stack = self._stack, None
        try:
            self._finish()
        finally:
            self._branches, self._names, self._forward, self._nan_flag, self._guidance = {}, Branches(), None, None, None
            if stack is not None:
                stack.close()

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Says that the denoiser calls inside belong to step `index` (0 is the noisiest).

        Raises:
            ValueError: `index` is outside the run's steps.
        """
        total = self._steps
        if isinstance(total, int) and not 0 <= index < total:
            raise ValueError(f"step must be from 0 to {total - 1}, not {index}: the session was made for {total} steps")
        self.set_step(index)
        yield

    def set_step(self, index: int) -> None:
        """As `step`, for callers that hear of the step instead of enclosing it: what follows is another evaluation, in step `index`."""
        self._evaluation += 1
        if index < self._step:
            # The sampler went back: what is stored belongs to later noise levels, and perhaps to another picture.
            self._forget()
        self._step, self._stepped = index, True
        for branch in self._branches.values():
            branch.release(index)

    def restart(self) -> None:
        """Says that the sampler has set its timesteps: whatever follows is another run, with a plan of its own."""
        if self._plan is not None:
            self._forget()
            self._plan, self._step, self._executed, self._step_seconds = None, 0, {}, []
            self.report.reasons.clear()
            self.report.warnings = ["the pipeline sampled more than once in this call; the report's plan is that of the last time"]

    def _forget(self) -> None:
        if self._guidance is not None:
            self._guidance.clear()
        self._branches, self._names, self._learning = {}, Branches(), self._evaluation

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the guidance branches seen so far in this run."""
        return tuple(self._names.order)

    def reindex(self, index: Tensor | Sequence[int]) -> None:
        """Permutes, drops and repeats the rows of all cached state, as particles are resampled.

        Args:
            index: [M] row of the present batch that each row of the coming batch continues. Under batched guidance give the rows
                of the whole denoiser batch.
        """
        rows = torch.as_tensor(index, dtype=torch.long)
        for branch in self._branches.values():
            if self._guidance is not None and self._guidance.batched:
                branch.clear()  # some of it has the rows of one guidance branch, some of both
            else:
                branch.reindex(rows)
        if self._guidance is not None:
            self._guidance.reindex(rows)
        if self.latents_batch is not None:
            self._names.reindex(rows, self.latents_batch)

    def guided(self, model_output: Any) -> None:
        """Hears what the scheduler was given: the guided output."""
        if self._guidance is not None:
            self._guidance.learn(model_output)

    # ---------------------------------------------------------------------------------------------------- the calls

    def _on_denoiser(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._forward is not None or self._tracing:
            return call(*args, **kwargs)
        position = latents_position(self.denoiser, args, kwargs)
        latents = tensors_of(args, kwargs)[position]
        if self._plan is None:
            self.trace = self._traced(args, kwargs, latents)
            total = self._steps if isinstance(self._steps, int) else self._steps(args, kwargs)
            self._plan = plan_for(self.method, self.trace, total)
            self.facts |= {"dtype": self.trace.dtype, "resolution": list(self.trace.resolution[1:])}
            self.report.warnings += self._plan.check(self.facts)
            self._adopt(self._plan)
            self._learning = self._evaluation
        if self._began is None:
            self._began = time.perf_counter()
        if not 0 <= self._step < self._plan.steps:
            raise PlanError(f"the plan has {self._plan.steps} steps, but the run has reached step {self._step}")
        self.latents_batch = latents.shape[0]
        learning = self._evaluation == self._learning
        seen = self._names.name(args, kwargs, latents=position, context=self.context, learning=learning)
        branch = self._branch(seen.name)
        if seen.stale:
            branch.clear()
            if self._guidance is not None:
                self._guidance.clear()
        began = self._clock(latents)
        if self._guidance is None:
            out = self._run(call, args, kwargs, branch, seen.name, seen.doubt)
        else:
            out = self._guided_run(self._guidance, call, args, kwargs, branch, seen, latents)
        self._count(began, latents)
        return out

    def _adopt(self, plan: Plan) -> None:
        """What a plan needs beyond its sites: skipped branches, the weights that it was calibrated on, and quantised layers."""
        if plan.skips.any():
            if isinstance(self.method, Decider) or any(ROW in name for name in plan.branches):
                raise PlanError(CONFLICTS["decisions", "guidance"])
            self._guidance = Guidance(
                plan.skips, self.facts.get("sigmas"), int(plan.facts.get("guidance_order", 0)), plan.facts.get("conditional")
            )
        known = {name: plan.facts[name] for name in ("weights", "adapters") if name in plan.facts}
        if known:
            found = weight_facts(self.denoiser)
            for name, value in known.items():
                if found[name] != value and not self._allow_mismatch:
                    raise PlanError(
                        f"the plan was calibrated with {name} {value}, the model now has {found[name]}: a LoRA was loaded or weights "
                        "were changed since; calibrate again, or pass allow_mismatch=True"
                    )
        if plan.facts.get("quantised"):
            if plan.hash not in self._quantised_copies:
                self._quantised_copies[plan.hash] = quantised_copy(plan, self.denoiser)
            self._quantised = self._quantised_copies[plan.hash]
            self._layers = layer_handlers(self._quantised, self.denoiser)
        # Layers are told by which copy they are: each reads the step from memory of its own.
        layers = id(self._quantised) if self._quantised is not None else None
        self._bound = plan.hash if plan.corrections else None, layers, self._state_kind or plan.facts.get("state")

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> Trace:
        key = tuple(latents.shape), latents.dtype
        if key not in self._traces:
            self._tracing = True  # the trace calls the denoiser itself; those calls are not part of the run
            try:
                self._traces[key] = trace_module(self.denoiser, args, kwargs)
            finally:
                self._tracing = False
        return self._traces[key]

    def _guided_run(
        self,
        guidance: Guidance,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        branch: BranchState,
        seen: Sighting,
        latents: Tensor,
    ) -> Any:
        """A call of a run in which branches are skipped."""
        name, step, batch = seen.name, self._step, len(latents)
        wanted = bool(guidance.skips[step]) and seen.doubt is None
        if not guidance.looks_batched(latents):
            first = self._names.order[0] == name
            if wanted and not first:
                out = guidance.answer(name, step, self._evaluation)
                if out is not None:
                    self._record(name, None, skipped=True)
                    return out
                self.report.reasons[f"{name}: both branches have not been computed yet, so it cannot be skipped"] += 1
            out = self._run(call, args, kwargs, branch, name, seen.doubt)
            guidance.computed(name, first, step, self._evaluation, out)
            return out
        why = guidance.why_not(name)
        if wanted and why is None:
            rows = guidance.rows(batch)
            if name not in guidance.halved:
                branch.reindex(torch.arange(batch)[rows], batch)
                guidance.halved.add(name)
            for fix in self._fixes.get(name, ()):
                fix.group = guidance.conditional
            half = self._run(call, rows_of(args, batch, rows), rows_of(kwargs, batch, rows), branch, name, None, skipped=True)
            return guidance.join(name, step, half)
        if wanted and why is not None:
            self.report.reasons[f"guidance: {why}"] += 1
        guidance.halved.discard(name)
        for fix in self._fixes.get(name, ()):
            fix.group = None
        out = self._run(call, args, kwargs, branch, name, seen.doubt)
        if guidance.reason is None:
            self._ask_halves(guidance, call, args, kwargs, latents, out)
        if guidance.reason is None:
            guidance.both(name, step, out)
        return out

    def _ask_halves(self, guidance: Guidance, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor, out: Any) -> None:
        """Whether half of the batch can be run alone: tried once for each shape."""
        assert self.trace is not None
        if self.trace.halves is None:
            self._tracing = True
            try:
                with intercept(self._layers):
                    self.trace = replace(self.trace, halves=separable(call, args, kwargs, len(latents), out))
            finally:
                self._tracing = False
            self._traces[tuple(latents.shape), latents.dtype] = self.trace
        guidance.reason = self.trace.halves or None

    def _run(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        branch: BranchState,
        name: str,
        doubt: str | None,
        skipped: bool = False,
    ) -> Any:
        if self._prepare is not None:
            self._prepare(self._step)
        if self._quantised is not None:
            self._quantised.step.set(self._step)
        passing = branch.start(self._step, doubt)
        if passing is None:
            self._record(name, None, skipped)
            return self._carried(call, args, kwargs, branch, name, None, doubt)
        for attempt in range(2):
            try:
                out = self._carried(call, args, kwargs, branch, name, passing, doubt)
                break
            except Recompute as why:
                assert attempt == 0
                branch.clear()  # what is stored stands for other shapes or other blocks
                again = branch.start(self._step, str(why))
                assert again is not None
                passing = again
        self._record(name, passing, skipped)
        for reason in passing.reasons:
            self.report.reasons[reason] += 1
        if self._observe is not None:
            self._observe(name, self._step, branch.stored(self._step))
        beside = self._guidance.bytes if self._guidance is not None else 0
        self._bytes_peak = max(self._bytes_peak, sum(b.bytes for b in self._branches.values()) + beside)
        self._check_budget(self._bytes_peak)
        return out

    def _carried(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        branch: BranchState,
        name: str,
        passing: Pass | None,
        doubt: str | None,
    ) -> Any:
        """The call itself; from a graph where there is one."""

        def run(passing: Pass | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if passing is None:
                with intercept(self._layers) if self._layers else nullcontext():
                    return call(*args, **kwargs)
            self._forward = passing
            try:
                with intercept({self.denoiser: self._on_denoiser, **self._layers}), intercept(passing.handlers(), around=True):
                    out = call(*args, **kwargs)
                passing.finish()
                return out
            finally:
                self._forward = None

        if self._graphs is None:
            return run(passing, args, kwargs)
        why = "every call is observed" if self._observe is not None or self._prepare is not None else None
        bound, step = (*self._bound, self._names.order.index(name)), self._step
        held = (self._quantised,) if self._quantised is not None else ()
        graphed = DenoiserCall(name, branch, passing, step, args, kwargs, lambda: branch.start(step, doubt), run, bound, held)
        return self._graphs.call(self.denoiser, graphed, why)

    def _check_budget(self, needed: int) -> None:
        if self._budget is not None and needed > self._budget:
            raise PlanError(
                f"the plan stores {format_bytes(needed)}, more than state_budget={format_bytes(self._budget)} allows; "
                "cache fewer blocks, run smaller batches, or raise the budget"
            )

    def _branch(self, name: str) -> BranchState:
        assert self._plan is not None and self.trace is not None
        if name not in self._branches:
            order = len(self._branches)
            known = self._plan.guidance_branches
            if known != (ALL_BRANCHES,) and name not in known and order >= len(known):
                self.report.warnings.append(f"the plan knows the guidance branches {', '.join(known)}; {name} follows {known[0]}")
            self._branches[name], reasons = self._state(name, order)
            if name not in self._executed:
                self._executed[name] = [None] * self._plan.steps
                for reason in reasons:
                    self.report.reasons[reason] += 1
            self._check_budget(sum(branch.bytes_planned for branch in self._branches.values()))
        return self._branches[name]

    def _state(self, name: str, order: int) -> tuple[BranchState, list[str]]:
        """What a guidance branch keeps, by the kind of the plan's sites; also why cells of its plan cannot be reused."""
        assert self._plan is not None and self.trace is not None
        plan, trace = self._plan.blocks, self.trace
        if isinstance(self.method, Decider):
            return self._decided(self.method), []
        rows = plan.rows_of(name, order)
        if rows is not None:
            return self._decided(Recorded(rows)), []
        branch, kind, pack = plan.branch_index(name, order), trace.kind_of(plan.sites), self._packer
        actions = plan.actions[:, :, branch]
        fixes = {site: affines(plan.corrections, site, branch, plan.steps) for site in plan.sites}
        self._fixes[name] = [fix for steps in fixes.values() if steps is not None for fix in steps if fix is not None]
        if kind == "parts":
            program, reasons = part_program(trace, plan.sites, actions, force_store=self._force_store)
            return PartState(self.denoiser, trace, plan.sites, program, self._finite, [fixes[site] for site in plan.sites], pack), reasons
        if kind == "deep":
            assert trace.deep is not None
            site = plan.sites[0]
            weights = plan.weights[:, 0, branch] if plan.weights is not None else None
            levels = self.facts.get("sigmas", plan.facts.get("sigmas"))
            terms = deep_program(actions[:, 0], weights=weights, order=plan.forecast_order, levels=levels)
            return DeepState(self.denoiser, trace.deep, site, terms, self._finite, fixes[site], self._force_store, pack), []
        modules = [self.denoiser.get_submodule(path) for path in trace.sites]
        blocks = [trace.blocks[i] for i in trace.offered]
        made, reasons = compiled(trace, plan, branch, self.facts.get("sigmas"), force_store=self._force_store)
        size = state_bytes(trace, made)
        return BlockState(blocks, modules, made, self._finite, size, [fixes[site] for site in plan.sites], pack), reasons

    @property
    def _packer(self) -> Packer:
        assert self._plan is not None
        return Packer(self._state_kind if self._state_kind is not None else self._plan.facts.get("state"))

    def _decided(self, decider: Decider | Recorded) -> DecidedState:
        assert self._plan is not None and self.trace is not None
        return DecidedState(self.denoiser, self.trace, decider, self._plan.steps, self._finite, self._compactable, self._packer)

    def _record(self, name: str, passing: Pass | None, skipped: bool = False) -> None:
        """Notes what a call did; `skipped` if a guidance branch was."""
        assert self._plan is not None
        planned = self._plan.blocks.branch(name, self._names.order.index(name))[self._step]
        row = passing.executed(planned) if passing is not None else np.full(len(planned), Action.COMPUTE, np.uint8)
        if GUIDANCE in self._plan.sites:
            row = np.append(row, np.uint8(Action.SKIP_BRANCH if skipped else Action.COMPUTE))
        self._executed[name][self._step] = row

    def _clock(self, latents: Tensor) -> Any:
        if latents.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(latents.device))
            return event
        return time.perf_counter()

    def _count(self, began: Any, latents: Tensor) -> None:
        while len(self._step_seconds) <= self._step:
            self._step_seconds.append(0.0)
        if latents.is_cuda:
            self._events.append((self._step, began, self._clock(latents)))
        else:
            self._ended = time.perf_counter()
            self._step_seconds[self._step] += self._ended - began

    # ------------------------------------------------------------------------------------------------------ the end

    def _finish(self) -> None:
        report = self.report
        if self._events:
            for step, begin, end in self._events:
                end.synchronize()
                self._step_seconds[step] += begin.elapsed_time(end) / 1e3
            self._ended = time.perf_counter()
        report.trace, report.planned = self.trace, self._plan
        report.step_seconds = self._step_seconds
        report.seconds = max(0.0, self._ended - self._began) if self._began is not None else 0.0
        report.state_bytes = sum(branch.bytes for branch in self._branches.values())
        report.state_bytes_peak = self._bytes_peak
        if self._plan is not None and self._executed:
            names = tuple(self._executed)
            reached = max((k + 1 for rows in self._executed.values() for k, row in enumerate(rows) if row is not None), default=0)
            if self._plan.sites and reached < self._plan.steps:
                report.warnings.append(f"the run ended after {reached} of {self._plan.steps} steps; the executed plan computes the others")
            report.plan = self._recorded()
            known = self._plan.guidance_branches
            if known != (ALL_BRANCHES,) and len(names) < len(known):
                report.warnings.append(f"the plan has the guidance branches {', '.join(known)}, this run had {', '.join(names)}")
            if isinstance(self._steps, int) and not self._stepped and self._plan.steps > 1:
                report.warnings.append("session.step(i) was never entered, so every call was taken for step 0 and nothing was reused")
        if self._nan_flag is not None and bool(self._nan_flag):
            report.warnings.append("a stored offset was not finite; use nan_check='sync' to have such sites computed instead")

    def _recorded(self) -> Plan:
        """What was executed; a branch whose rows decided differently has a column for each of them."""
        assert self._plan is not None
        plan, columns, branches, sources = self._plan, [], [], []
        for order, (name, steps) in enumerate(self._executed.items()):
            count = max((row.shape[1] for row in steps if row is not None and row.ndim == 2), default=1)
            blank = np.full(len(plan.sites), Action.COMPUTE, np.uint8)
            full = [blank if row is None else row for row in steps]
            cells = np.stack([row if row.ndim == 2 else np.repeat(row[:, None], count, 1) for row in full])
            for i in range(count):
                columns.append(cells[:, :, i])
                branches.append(f"{name}{ROW}{i}" if count > 1 else name)
                sources.append(plan.branch_index(name, order))
        weights = plan.weights[:, :, sources] if plan.weights is not None else None
        corrections = {site: table[:, :, sources] for site, table in plan.corrections.items()}
        return Plan(np.stack(columns, -1), plan.sites, tuple(branches), {**plan.facts, **self.facts}, weights, corrections, plan.tables)

    def _finite(self, value: Tensor) -> bool:
        """Whether a value may be used. On CUDA under "auto" the answer is left on the device and read at the end."""
        if self._nan_check == "off":
            return True
        finite = torch.isfinite(value.sum(dtype=torch.float32))
        if value.is_cuda and self._nan_check == "auto":
            self._nan_flag = ~finite if self._nan_flag is None else self._nan_flag | ~finite
            return True
        return bool(finite) or bool(torch.isfinite(value).all())


def attach(
    denoiser: nn.Module,
    method: Method | Plan,
    *,
    num_inference_steps: int,
    trace: Trace | None = None,
    state_budget: int | None = None,
    nan_check: str = "auto",
    force_store: bool = False,
    allow_mismatch: bool = False,
    state: str | None = None,
    graphs: bool | int = False,
) -> Session:
    """A session for your own loop, or for a network that is no pipeline.

        with hasten.attach(denoiser, hasten.DeltaDiT(interval=2), num_inference_steps=20) as session:
            for i, t in enumerate(timesteps):
                with session.step(i):
                    out = denoiser(x, t)
        print(session.report)

    Args:
        denoiser: The network; it is left as it was when the block ends.
        method: A method or a plan.
        num_inference_steps: How many steps the loop runs.
        trace: An earlier trace of latents of this shape; the first call traces otherwise (three extra forward passes).
        state_budget: Most bytes of stored offsets.
        nan_check: "auto", "sync" or "off"; see `Session`.
        force_store: Collect everything at every step, for tests and timing.
        allow_mismatch: Whether a calibrated plan may run on other weights or adapters than those it was calibrated on.
        state: "int8" or "fp8" to keep stored values in 8 bits.
        graphs: True to capture calls as CUDA graphs and replay them, or how many graphs are kept; see `Graphs`.

    Raises:
        ValueError: `num_inference_steps` or `graphs` is not positive.
        TraceError: The denoiser is compiled as a whole.
        PlanError: The plan does not fit (raised at the first call).
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    traces: dict[TraceKey, Trace] = {}
    if trace is not None:
        traces[trace.resolution, getattr(torch, trace.dtype)] = trace
    return Session(
        denoiser,
        method,
        num_inference_steps,
        traces=traces,
        state_budget=state_budget,
        nan_check=nan_check,
        force_store=force_store,
        allow_mismatch=allow_mismatch,
        state=state,
        graphs=graphs_of(graphs),
    )
