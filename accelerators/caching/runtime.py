"""Carries a plan out on a denoiser, for the length of one run.

Every block of a reused span stays in the model's own loop and hands its input on unchanged; the last one called adds the span's
offset. The offset is the sum of the blocks' own offsets, so whatever the model adds between two blocks (control residuals) is neither
frozen nor doubled. All state belongs to the run and dies with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.branches import Branches
from hasten.accelerators.caching.plan import ALL_BRANCHES, Action, Plan, PlanError
from hasten.accelerators.caching.report import RunReport
from hasten.accelerators.caching.segments import Row, Span, program, state_bytes
from hasten.accelerators.caching.trace import (
    Block,
    Position,
    Stream,
    Trace,
    TraceError,
    format_bytes,
    latents_position,
    tensors_of,
    trace_module,
    version_of,
)
from hasten.accelerators.dispatch import Call, compiled_whole, intercept

TraceKey = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of the latents."""
UNREACHED = 255


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
    if plan.sites != trace.sites:
        raise PlanError(f"the plan is for {len(plan.sites)} sites ({', '.join(plan.sites[:2])} ...), the model has {len(trace.sites)}")
    return plan


def compute_all(trace: Trace, steps: int) -> Plan:
    """The plan that computes everything: bit-identical to the bare denoiser."""
    facts = {"model": trace.model, "config": trace.config_hash, "method": "compute-all"}
    return Plan(np.zeros((steps, len(trace.sites)), np.uint8), trace.sites, facts=facts)


class _Sum:
    """Collects the offset of one stream over a span.

    While a block receives the very object the one before returned, unchanged, the offsets telescope and nothing is computed; where
    something was added in between, the part so far is taken off before it.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.part: tuple[Tensor, Tensor] | None = None
        self.versions: tuple[int | None, int | None] = (None, None)

    def extend(self, before: Tensor, entered: Tensor, version: int | None, after: Tensor) -> str | None:
        """One more block.

        Args:
            before: What it was given (a copy where the block works in place).
            entered: The object it was given, at `version` when the block was called.
            after: What it returned.

        Returns:
            Why the offset cannot be told, or None.
        """
        if self.part is not None and entered is self.part[1]:
            if version != self.versions[1]:
                return "the model changes the stream in place between two blocks"
            before = self.part[0]
            versions = self.versions[0], version_of(after)
        else:
            if (reason := self.close()) is not None:
                return reason
            if self.total is not None and (before.shape, before.dtype) != (self.total.shape, self.total.dtype):
                return "the stream changes its shape between two blocks"
            versions = version_of(before), version_of(after)
        self.part, self.versions = (before, after), versions
        # In inference mode nobody can tell whether a tensor was changed since: there every block's offset is taken at once.
        return self.close() if versions[1] is None else None

    def close(self) -> str | None:
        """Takes the offset of the open part; the reason if that is no longer possible."""
        if self.part is not None:
            before, after = self.part
            if (version_of(before), version_of(after)) != self.versions:
                return "the model changes the stream in place between two blocks"
            offset = after - before
            self.total = offset if self.total is None else self.total + offset
            self.part = None
        return None


@dataclass
class _Collector:
    """Collects a span's offsets during one forward."""

    span: Span
    sums: dict[int, _Sum] = field(default_factory=dict)
    broken: str | None = None

    def close(self) -> str | None:
        return next((reason for total in self.sums.values() if (reason := total.close()) is not None), None)


class _Given(NamedTuple):
    """A stream on its way into a block: its value before the call, the object itself, and its version."""

    before: Tensor | None
    entered: Tensor | None
    version: int | None

    @classmethod
    def of(cls, stream: Stream, tensor: Tensor | None, in_place: bool) -> _Given:
        if tensor is None:
            return cls(None, None, None)
        return cls(tensor.clone() if in_place else tensor, tensor, version_of(tensor))


@dataclass
class _Branch:
    """What one guidance branch keeps during a run."""

    rows: list[Row]
    last_use: dict[Span, int]
    bytes_planned: int
    called: list[int] = field(default_factory=list)
    values: dict[Span, dict[int, Tensor]] = field(default_factory=dict)
    refused: dict[Span, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for value in self.values.values() for t in value.values())

    def release(self, step: int) -> None:
        """Drops what no step from `step` on reads. A step may be evaluated several times, so nothing is dropped within one."""
        for span in [span for span in self.values if self.last_use[span] < step]:
            del self.values[span]


class _Recompute(Exception):
    """The blocks were not called as before: this forward has to be computed."""


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
        self._branches: dict[str, _Branch] = {}
        self._names = Branches()
        self._context: str | None = None
        self._forward: _Forward | None = None
        self._executed: dict[str, np.ndarray] = {}
        self._step_seconds: list[float] = []
        self._bytes_peak = 0
        self._nan_flag: Tensor | None = None
        self._began: float | None = None
        self._ended = 0.0
        self._events: list[tuple[int, Any, Any]] = []
        self._modules: list[nn.Module] = []

    # ------------------------------------------------------------------------------------------------ life of a run

    def __enter__(self) -> Session:
        if self._stack is not None:
            raise RuntimeError("this session is already running; one session serves one run at a time")
        self._reset()
        self.report = RunReport()
        with ExitStack() as stack:
            stack.enter_context(intercept({self.denoiser: self._on_denoiser}))
            stack.enter_context(_named_contexts(self.denoiser, self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._stack = self._stack, None
        try:
            self._finish()
        finally:
            self._branches, self._names, self._forward, self._nan_flag = {}, Branches(), None, None
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
            for value in branch.values.values():
                for stream, tensor in value.items():
                    value[stream] = tensor.index_select(0, rows.to(tensor.device))
        if self.latents_batch is not None:
            self._names.reindex(rows, self.latents_batch)

    # ---------------------------------------------------------------------------------------------------- the calls

    def _on_denoiser(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._forward is not None or self._tracing:
            return call(*args, **kwargs)
        position = latents_position(self.denoiser, args, kwargs)
        latents = tensors_of(args, kwargs)[position]
        if self._plan is None:
            self.trace = self._traced(args, kwargs, latents)
            self._modules = [self.denoiser.get_submodule(path) for path in self.trace.sites]
            total = self._steps if isinstance(self._steps, int) else self._steps(args, kwargs)
            self._plan = plan_for(self.method, self.trace, total)
            self.facts |= {"dtype": self.trace.dtype, "resolution": list(self.trace.resolution[1:])}
            self.report.warnings += self._plan.check(self.facts)
            self._learning = self._evaluation
        if self._began is None:
            self._began = time.perf_counter()
        if not 0 <= self._step < self._plan.steps:
            raise PlanError(f"the plan has {self._plan.steps} steps, but the run has reached step {self._step}")
        self.latents_batch = latents.shape[0]
        learning = self._evaluation == self._learning
        seen = self._names.name(args, kwargs, latents=position, context=self._context, learning=learning)
        branch = self._branch(seen.name)
        if seen.stale:
            branch.values.clear()
        began = self._clock(latents)
        out = self._run(call, args, kwargs, branch, seen.name, branch.rows[self._step], seen.doubt)
        self._count(began, latents)
        return out

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> Trace:
        key = tuple(latents.shape), latents.dtype
        if key not in self._traces:
            self._tracing = True  # the trace calls the denoiser itself; those calls are not part of the run
            try:
                self._traces[key] = trace_module(self.denoiser, args, kwargs)
            finally:
                self._tracing = False
        return self._traces[key]

    def _run(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], branch: _Branch, name: str, row: Row, doubt: str | None
    ) -> Any:
        assert self.trace is not None
        if not (row.reuse or row.store):
            self._record(name, frozenset())
            return call(*args, **kwargs)
        forward = _Forward(self, branch, row, doubt)
        for attempt in range(2):
            self._forward = forward
            handlers = {module: forward.handler(site) for site, module in enumerate(self._modules)}
            try:
                with intercept({self.denoiser: self._on_denoiser, **handlers}):
                    out = call(*args, **kwargs)
                forward.finish()
                break
            except _Recompute as why:
                assert attempt == 0
                branch.values.clear()  # they stand for other shapes or other blocks
                forward = _Forward(self, branch, row, str(why))
            finally:
                self._forward = None
        self._record(name, frozenset(forward.reused))
        for reason in forward.reasons:
            self.report.reasons[reason] += 1
        self._bytes_peak = max(self._bytes_peak, sum(b.bytes for b in self._branches.values()))
        self._check_budget(self._bytes_peak)
        return out

    def _check_budget(self, needed: int) -> None:
        if self._budget is not None and needed > self._budget:
            raise PlanError(
                f"the plan stores {format_bytes(needed)}, more than state_budget={format_bytes(self._budget)} allows; "
                "cache fewer blocks, run smaller batches, or raise the budget"
            )

    def _branch(self, name: str) -> _Branch:
        assert self._plan is not None and self.trace is not None
        if name not in self._branches:
            order = len(self._branches)
            if self._plan.branches != (ALL_BRANCHES,) and name not in self._plan.branches and order >= len(self._plan.branches):
                self.report.warnings.append(
                    f"the plan knows the guidance branches {', '.join(self._plan.branches)}; {name} follows {self._plan.branches[0]}"
                )
            rows, reasons = program(self.trace, self._plan.branch(name, order), force_store=self._force_store)
            last_use = {span: k for k, row in enumerate(rows) for span in (*row.store, *row.release)}
            self._branches[name] = _Branch(rows, last_use, state_bytes(self.trace, rows))
            if name not in self._executed:
                self._executed[name] = np.full((self._plan.steps, len(self._plan.sites)), UNREACHED, np.uint8)
                for reason in reasons:
                    self.report.reasons[reason] += 1
            self._check_budget(sum(branch.bytes_planned for branch in self._branches.values()))
        return self._branches[name]

    def _record(self, name: str, reused: frozenset[int]) -> None:
        row = self._executed[name][self._step]
        for site in range(len(row)):
            row[site] = Action.REUSE if site in reused else Action.COMPUTE

    def _clock(self, latents: Tensor) -> Any:
        if latents.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
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
            torch.cuda.synchronize()
            for step, begin, end in self._events:
                self._step_seconds[step] += begin.elapsed_time(end) / 1e3
            self._ended = time.perf_counter()
        report.trace, report.planned = self.trace, self._plan
        report.step_seconds = self._step_seconds
        report.seconds = max(0.0, self._ended - self._began) if self._began is not None else 0.0
        report.state_bytes = sum(branch.bytes for branch in self._branches.values())
        report.state_bytes_peak = self._bytes_peak
        if self._plan is not None and self._executed:
            names = tuple(self._executed)
            cells = np.stack([self._executed[name] for name in names], -1)
            reached = max((k + 1 for k in range(len(cells)) if bool((cells[k] != UNREACHED).any())), default=0)
            if cells.shape[1] and reached < self._plan.steps:
                report.warnings.append(f"the run ended after {reached} of {self._plan.steps} steps; the executed plan computes the others")
            cells = np.where(cells == UNREACHED, Action.COMPUTE, cells)
            report.plan = Plan(cells, self._plan.sites, names, {**self._plan.facts, **self.facts})
            known = self._plan.branches
            if known != (ALL_BRANCHES,) and len(names) < len(known):
                report.warnings.append(f"the plan has the guidance branches {', '.join(known)}, this run had {', '.join(names)}")
            if isinstance(self._steps, int) and not self._stepped and self._plan.steps > 1:
                report.warnings.append("session.step(i) was never entered, so every call was taken for step 0 and nothing was reused")
        if self._nan_flag is not None and bool(self._nan_flag):
            report.warnings.append("a stored offset was not finite; use nan_check='sync' to have such sites computed instead")

    def check_finite(self, value: Tensor) -> bool:
        """Whether a value may be stored. On CUDA under "auto" the answer is left on the device and read at the end."""
        if self._nan_check == "off":
            return True
        finite = torch.isfinite(value.sum(dtype=torch.float32))
        if value.is_cuda and self._nan_check == "auto":
            self._nan_flag = ~finite if self._nan_flag is None else self._nan_flag | ~finite
            return True
        return bool(finite) or bool(torch.isfinite(value).all())


class _Forward:
    """One denoiser call: what each block does."""

    def __init__(self, session: Session, branch: _Branch, row: Row, doubt: str | None) -> None:
        assert session.trace is not None
        self.session = session
        self.branch = branch
        self.blocks = [session.trace.blocks[i] for i in session.trace.offered]
        self.reused: set[int] = set()
        self.reasons: list[str] = []
        self.called: list[int] = []
        self.spans: dict[int, Span] = {}
        self.ends: dict[int, Span] = {}
        self.done: set[Span] = set()
        stores = list(row.store)
        for span in row.reuse:
            called = [site for site in branch.called if span.start <= site < span.stop]
            why = doubt or branch.refused.get(span)
            if why is None and span not in branch.values:
                why = "nothing is stored for it yet"
            if why is None and called:
                self.spans |= dict.fromkeys(called, span)
                self.ends[called[-1]] = span
            elif why is not None:
                self._why(span, why)
                if span not in branch.values and span not in branch.refused:
                    stores.append(span)  # computed after all: the next steps may use it
        # Only what is computed now can be collected, and only where nothing inside the span is reused.
        self.collectors = [_Collector(span) for span in stores if not any(s in self.spans for s in range(span.start, span.stop))]

    def _why(self, span: Span, reason: str) -> None:
        name = self.blocks[span.start].path + (f" to {self.blocks[span.stop - 1].path}" if span.stop > span.start + 1 else "")
        self.reasons.append(f"{name}: {reason}")

    def handler(self, site: int) -> Callable[..., Any]:
        """What replaces the call of the block at `site` during this forward."""
        block = self.blocks[site]

        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.called.append(site)
            span = self.spans.get(site)
            if span is not None:
                return self._reuse(site, span, block, args, kwargs)
            collectors = [c for c in self.collectors if c.span.start <= site < c.span.stop and c.broken is None]
            if not collectors:
                return call(*args, **kwargs)
            given = [_Given.of(s, _at(s.position, args, kwargs), block.in_place) for s in block.streams]
            out = call(*args, **kwargs)
            for collector in collectors:
                collector.broken = self._collect(collector, block, given, out)
                if collector.broken is None and site == collector.span.stop - 1:
                    collector.broken = collector.close()
            return out

        return handle

    def _reuse(self, site: int, span: Span, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self.branch.values[span]
        last = site in self.ends
        outputs: dict[int | None, Tensor] = {}
        for stream in block.streams:
            tensor = _at(stream.position, args, kwargs)
            offset = value.get(stream.index)
            if tensor is None or (offset is not None and (offset.shape != tensor.shape or offset.dtype != tensor.dtype)):
                raise _Recompute("the shape of the stream, or the batch, is no longer that of the stored offset")
            if last and offset is not None:
                offset = offset.to(tensor.device)
                # A block that returns its own, changed input may be called for that effect alone.
                tensor = tensor.add_(offset) if stream.aliased and block.in_place else tensor + offset
            outputs[stream.slot] = tensor
        self.reused.add(site)
        if last:
            self.done.add(span)
        if block.form == "tensor":
            return outputs[None]
        made = [outputs.get(slot) for slot in range(block.width)]
        return tuple(made) if block.form == "tuple" else made

    def _collect(self, collector: _Collector, block: Block, given: list[_Given], out: Any) -> str | None:
        for stream, entry in zip(block.streams, given, strict=True):
            after = out if stream.slot is None else out[stream.slot]
            if entry.before is None or entry.entered is None or not isinstance(after, Tensor) or after.shape != entry.before.shape:
                return f"{block.path} was not called as it was when the model was traced"
            reason = collector.sums.setdefault(stream.index, _Sum()).extend(entry.before, entry.entered, entry.version, after)
            if reason is not None:
                return f"no link: {reason}"
        return None

    def finish(self) -> None:
        """Stores what was collected.

        Raises:
            _Recompute: A reused span did not end where it should, so its offset was not added.
        """
        missing = set(self.ends.values()) - self.done
        if missing or (self.spans and self.called != self.branch.called):
            raise _Recompute("the model called other blocks than in the steps before")
        self.branch.called = self.called
        for collector in self.collectors:
            if collector.broken is None and not collector.sums:
                continue  # none of its blocks was called (skip-layer guidance)
            broken = collector.broken or collector.close()
            if broken is not None:
                self.branch.refused[collector.span] = broken
                continue
            value = {stream: total.total for stream, total in collector.sums.items() if total.total is not None}
            if all(self.session.check_finite(tensor) for tensor in value.values()):
                self.branch.values[collector.span] = value
                self.branch.refused.pop(collector.span, None)
            else:
                self.branch.values.pop(collector.span, None)
                self._why(collector.span, "its offset was not finite and was not stored")


def _at(position: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = args[position] if isinstance(position, int) and position < len(args) else kwargs.get(position)  # type: ignore[arg-type]
    return value if isinstance(value, Tensor) else None


_SESSIONS: ContextVar[Mapping[int, Session] | None] = ContextVar("hasten_sessions", default=None)
_NAMING = threading.Lock()


class _Contexts:
    """Stands for a denoiser's `cache_context` while any session listens for its names."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.key = id(denoiser)
        self.hidden = denoiser.__dict__.get("cache_context")
        self.original: Callable[..., AbstractContextManager[Any]] = denoiser.cache_context  # type: ignore[assignment]
        self.users = 0

    @contextmanager
    def __call__(self, name: str, **fields: Any) -> Iterator[None]:
        session = (_SESSIONS.get() or {}).get(self.key)
        with self.original(name, **fields):
            if session is None:
                yield
                return
            before, session._context = session._context, name
            try:
                yield
            finally:
                session._context = before


@contextmanager
def _named_contexts(denoiser: nn.Module, session: Session) -> Iterator[None]:
    """Hears the names of the `cache_context`s that the pipeline enters on the denoiser, in this context only."""
    if not hasattr(denoiser, "cache_context"):
        yield
        return
    token = _SESSIONS.set({**(_SESSIONS.get() or {}), id(denoiser): session})
    with _NAMING:
        names = denoiser.__dict__.get("cache_context")
        if not isinstance(names, _Contexts):
            names = denoiser.__dict__["cache_context"] = _Contexts(denoiser)
        names.users += 1
    try:
        yield
    finally:
        _SESSIONS.reset(token)
        with _NAMING:
            names.users -= 1
            if names.users == 0:
                if names.hidden is None:
                    del denoiser.__dict__["cache_context"]
                else:
                    denoiser.__dict__["cache_context"] = names.hidden


def attach(
    denoiser: nn.Module,
    method: Method | Plan,
    *,
    num_inference_steps: int,
    trace: Trace | None = None,
    state_budget: int | None = None,
    nan_check: str = "auto",
    force_store: bool = False,
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

    Raises:
        ValueError: `num_inference_steps` is not positive.
        TraceError: The denoiser is compiled as a whole.
        PlanError: The plan does not fit (raised at the first call).
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    traces: dict[TraceKey, Trace] = {}
    if trace is not None:
        traces[trace.resolution, getattr(torch, trace.dtype)] = trace
    return Session(
        denoiser, method, num_inference_steps, traces=traces, state_budget=state_budget, nan_check=nan_check, force_store=force_store
    )
