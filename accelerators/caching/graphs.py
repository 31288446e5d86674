"""CUDA graphs for static plans: a denoiser call is captured once for each kind of step, and replayed afterwards.

Two calls are of one kind when they have the same guidance branch, sites stored and reused with the same weights, shapes and plain
arguments. The first runs as always, the second is captured beside it and the replay compared with it, later ones are replayed.

A graph reads and writes memory that never moves. What a call is given is copied there; what it stores lies there, in a place that is named
by the sites and by how many younger values of theirs the call reads, never by the step. So the graph of a step that stores and the
graphs of the steps that reuse meet in the same memory and nothing is copied between them; a value that another one is about to displace
is moved aside first, and a value that does not lie where a graph wants it (a graph-less call stored it, or particles were resampled) is
copied there. That memory is none of the graphs' own pool, whose parts overwrite each other whenever another graph is replayed.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.deep import DeepForward, DeepState
from hasten.accelerators.caching.forward import BlockState, BranchState, Forward, Pass, Spare
from hasten.accelerators.caching.parts import PartForward, PartState
from hasten.accelerators.caching.segments import Span
from hasten.accelerators.dispatch import compiled_whole
from hasten.kernels import backend

LIMIT = 16
"""Most graphs kept for a denoiser, unless told."""
FAILURES = 3
"""Captures that may fail before no more are tried: what forbids one kind of call mostly forbids all."""
KINDS = 512
"""Most kinds of calls that are remembered as seen."""
TOLERANCE = 1e-2
"""Most relative difference between a replay and the call itself. Both run the same kernels; some of these add up in any order."""


class Refused(Exception):
    """A call cannot be captured; the message says why."""


# ------------------------------------------------------------------------------------------------------- what captures


class Capture(Protocol):
    """What captures work on a device and does it again."""

    def accepts(self, tensor: Tensor) -> bool:
        """Whether work on this tensor can be captured."""

    def forget(self) -> None:
        """No graph is left: the next one shares memory with none before."""

    def settle(self, device: torch.device) -> None:
        """Called before a graph's memory is touched: waits, on the device, for what was begun on another stream."""

    def capture(self, function: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
        """What repeats the function's work, and the tensors it returned, which every repetition fills anew.

        Raises:
            Exception: The work cannot be captured.
        """


class CudaCapture:
    """CUDA graphs. All of them share one memory pool: what a replay leaves in it lasts until another graph is replayed."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None
        self._latest: torch.cuda.Stream | None = None

    def accepts(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def forget(self) -> None:
        self._pool = None  # torch refuses a pool whose graphs are all gone

    def settle(self, device: torch.device) -> None:
        stream = torch.cuda.current_stream(device)
        if self._latest is not None and self._latest != stream:
            stream.wait_stream(self._latest)
        self._latest = stream

    def capture(self, function: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Thread-local: what other threads do on the device is none of this capture's business.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._streams[device], capture_error_mode="thread_local"):
                    outputs = function()
            finally:
                torch.cuda.set_stream(before)  # torch leaves its own stream current where ending a capture fails
        return graph.replay, outputs


# ---------------------------------------------------------------------------------------------------- nests of tensors

TENSOR = "tensor"
"""Stands for a tensor in a form."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)


def flatten(value: Any, found: list[Tensor], where: str) -> Hashable:
    """Puts the tensors of a nest into `found`; returns its form, in which everything else stands by value.

    Args:
        where: What the nest is, for the error.

    Raises:
        Refused: Something in it can neither be copied nor compared.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise Refused(f"{where} has a tensor that is not dense ({value.layout})")
        found.append(value)
        return TENSOR
    if kind in PLAIN or isinstance(value, Enum):
        return kind, value
    if kind in (tuple, list):
        return kind, tuple(flatten(entry, found, where) for entry in value)
    if kind is dict:
        return kind, tuple((key, flatten(entry, found, f"{where} {key!r}")) for key, entry in value.items())
    if is_dataclass(value) and not isinstance(value, type) and all(f.init for f in fields(value)):
        return kind, tuple((f.name, flatten(getattr(value, f.name), found, where)) for f in fields(value))
    raise Refused(f"{where} has a {kind.__name__}, which cannot be compared from call to call")


def unflatten(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The nest of a form, with the next of `tensors` wherever it had one."""
    if form == TENSOR:
        return next(tensors)
    kind, inner = form
    if kind in (tuple, list):
        return kind(unflatten(entry, tensors) for entry in inner)
    if kind is dict:
        return {key: unflatten(entry, tensors) for key, entry in inner}
    if is_dataclass(kind):
        made: Any = kind
        return made(**{name: unflatten(entry, tensors) for name, entry in inner})
    return inner


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a stored value."""
    found: list[Tensor] = []
    flatten(value, found, "a stored value")
    return found


def layout(tensor: Tensor) -> Hashable:
    """What has to agree between a tensor and the memory that it is copied to."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


# ------------------------------------------------------------------------------------- what a call reads and leaves behind

Place = Hashable
"""Names a stored value without its step."""
Slot = tuple[str, Any]
"""Where a state keeps a value: the name of its dictionary, and the key."""


class Effects(Protocol):
    """What a call does to one kind of state besides its arithmetic.

    Attributes:
        values: The state's dictionaries of stored values.
        mutable: Everything that a call changes in a state.
    """

    values: tuple[str, ...]
    mutable: tuple[str, ...]

    def key(self, state: Any, passing: Any) -> Hashable:
        """What tells calls apart whose work differs."""

    def reads(self, state: Any, passing: Any) -> list[tuple[Slot, Place]]:
        """The stored values that a call reads; where several are of the same sites, the oldest first."""

    def place(self, passing: Any, slot: Slot) -> Place:
        """The name of what a call stored."""

    def slot(self, passing: Any, place: Place) -> Slot:
        """Where another call of the kind stores it."""

    def noted(self, state: Any, passing: Any) -> Any:
        """What has to be said again at every replay."""

    def repeat(self, state: Any, passing: Any, noted: Any, stored: Sequence[Slot]) -> None:
        """Says it, once the values are stored."""

    def fixes(self, state: Any, passing: Any) -> list[Affine]:
        """The corrections that the call applies."""


class BlockEffects:
    """Of calls with spans of blocks."""

    values: tuple[str, ...] = ("values",)
    mutable: tuple[str, ...] = ("values", "untested", "refused", "called")

    def key(self, state: BlockState, passing: Forward) -> Hashable:
        def weighed(use: Any) -> Hashable:
            return use.start, use.stop, tuple(weight for _, weight in use.terms)

        uses = tuple(sorted((site, weighed(use)) for site, use in passing.uses.items()))
        stores = tuple(sorted((c.span.start, c.span.stop) for c in passing.collectors))
        return uses, tuple(sorted(passing.ends)), stores, tuple(state.called) if uses else ()

    def reads(self, state: BlockState, passing: Forward) -> list[tuple[Slot, Place]]:
        uses = sorted(set(passing.ends.values()))
        found = [(span, (use.start, use.stop, age)) for use in uses for age, span in enumerate(use.spans)]
        return [(("values", span), place) for span, place in reversed(found)]

    def place(self, passing: Forward, slot: Slot) -> Place:
        start, stop, source = slot[1]
        if source != passing.step:
            raise Refused("the call stores what belongs to an earlier step")
        return start, stop, 0

    def slot(self, passing: Forward, place: Any) -> Slot:
        return "values", Span(place[0], place[1], passing.step)

    def noted(self, state: BlockState, passing: Forward) -> Any:
        why = {(span.start, span.stop): reason for span, reason in state.refused.items() if span.source == passing.step}
        return frozenset(passing.reused), tuple(state.called), why

    def repeat(self, state: BlockState, passing: Forward, noted: Any, stored: Sequence[Slot]) -> None:
        reused, called, why = noted
        passing.reused = set(reused)
        passing.called = state.called = list(called)
        for _, span in stored:
            state.untested.add(span)
            state.refused.pop(span, None)
        state.refused |= {Span(start, stop, passing.step): reason for (start, stop), reason in why.items()}

    def fixes(self, state: BlockState, passing: Forward) -> list[Affine]:
        tables = [state.corrections[use.stop - 1] for use in set(passing.ends.values())] if state.corrections else []
        return [fix for table in tables if table is not None and (fix := table[passing.step]) is not None]


class PartEffects:
    """Of calls with parts of blocks."""

    values: tuple[str, ...] = ("values", "merged")
    mutable: tuple[str, ...] = ("values", "merged", "sources", "untested", "fragile")

    def key(self, state: PartState, passing: PartForward) -> Hashable:
        runs = tuple((run[0], self._numbers(run[1]), run[1] in state.merged) for run in passing.runs)
        return tuple(sorted(passing.reuse)), tuple(sorted(passing.keep)), runs, tuple(sorted(state.fragile))

    @staticmethod
    def _numbers(parts: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        return tuple(i for i, _ in parts)

    def reads(self, state: PartState, passing: PartForward) -> list[tuple[Slot, Place]]:
        single = set(passing.reuse)
        found: list[tuple[Slot, Place]] = []
        for _, parts in passing.runs:
            # Corrected parts are added up again at every step.
            if parts in state.merged and not self._corrected(state, passing, self._numbers(parts)):
                found.append((("merged", parts), ("merged", self._numbers(parts))))
            else:
                single |= set(self._numbers(parts))
        return found + [(("values", i), ("value", i)) for i in sorted(single)]

    def place(self, passing: PartForward, slot: Slot) -> Place:
        name, key = slot
        return ("value", key) if name == "values" else ("merged", self._numbers(key))

    def slot(self, passing: PartForward, place: Any) -> Slot:
        kind, key = place
        if kind == "value":
            return "values", key
        return "merged", next(parts for _, parts in passing.runs if self._numbers(parts) == key)

    def noted(self, state: PartState, passing: PartForward) -> Any:
        return None

    def repeat(self, state: PartState, passing: PartForward, noted: Any, stored: Sequence[Slot]) -> None:
        for name, key in stored:
            if name == "values":
                state.sources[key] = passing.step
                state.untested.add(key)

    def _corrected(self, state: PartState, passing: PartForward, parts: Sequence[int]) -> list[Affine]:
        tables = [state.corrections[i] for i in parts] if state.corrections is not None else []
        return [fix for table in tables if table is not None and (fix := table[passing.step]) is not None]

    def fixes(self, state: PartState, passing: PartForward) -> list[Affine]:
        return self._corrected(state, passing, sorted({*passing.reuse, *(i for _, parts in passing.runs for i, _ in parts)}))


class DeepEffects:
    """Of calls with a UNet's deep branch."""

    values: tuple[str, ...] = ("values",)
    mutable: tuple[str, ...] = ("values", "templates", "shape")

    def key(self, state: DeepState, passing: DeepForward) -> Hashable:
        weights = tuple(weight for _, weight in state.terms[passing.step]) if passing.reused else ()
        return passing.reused, weights, tuple(state.shape) if passing.reused else ()

    def reads(self, state: DeepState, passing: DeepForward) -> list[tuple[Slot, Place]]:
        terms = state.terms[passing.step] if passing.reused else ()
        return [(("values", source), age) for age, (source, _) in reversed([*enumerate(terms)])]

    def place(self, passing: DeepForward, slot: Slot) -> Place:
        if slot[1] != passing.step:
            raise Refused("the call stores what belongs to an earlier step")
        return 0

    def slot(self, passing: DeepForward, place: Place) -> Slot:
        return "values", passing.step

    def noted(self, state: DeepState, passing: DeepForward) -> Any:
        return dict(state.templates), state.shape

    def repeat(self, state: DeepState, passing: DeepForward, noted: Any, stored: Sequence[Slot]) -> None:
        templates, state.shape = noted
        state.templates = dict(templates)

    def fixes(self, state: DeepState, passing: DeepForward) -> list[Affine]:
        fix = state.corrections[passing.step] if passing.reused and state.corrections is not None else None
        return [fix] if fix is not None else []


class NoEffects:
    """Of calls that neither store nor reuse."""

    values: tuple[str, ...] = ()
    mutable: tuple[str, ...] = ()

    def key(self, state: Any, passing: None) -> Hashable:
        return None

    def reads(self, state: Any, passing: None) -> list[tuple[Slot, Place]]:
        return []

    def place(self, passing: None, slot: Slot) -> Place:
        raise Refused("the call stores what nothing reads")

    def slot(self, passing: None, place: Place) -> Slot:
        raise KeyError(place)

    def noted(self, state: Any, passing: None) -> Any:
        return None

    def repeat(self, state: Any, passing: None, noted: Any, stored: Sequence[Slot]) -> None:
        return None

    def fixes(self, state: Any, passing: None) -> list[Affine]:
        return []


EFFECTS: Mapping[type, Effects] = {BlockState: BlockEffects(), PartState: PartEffects(), DeepState: DeepEffects()}
NOTHING: Effects = NoEffects()


class Unspared(Spare):
    """Takes nothing in: memory that a graph writes to is never for others."""

    def give(self, value: Mapping[int, Any]) -> None:
        return None


# ------------------------------------------------------------------------------------------------------------ the model


class Watch:
    """What a denoiser is made of: the attributes of all its modules, by identity, and where its tensors lie.

    Weights that are changed in place need no new graph. Adapters that come, go or are weighed anew, another attention processor, weights
    that move: all of these show in an attribute. A tensor that a module keeps beside its parameters is held, so that its memory is not
    reused while a graph reads it.

    Attributes:
        reason: Why calls of this denoiser cannot be replayed, or None.
    """

    # Put there for the length of a run; and what torch keeps for itself.
    _NOT = frozenset({"_compiled_call_impl", "cache_context", "_diffusers_hook"} | set(vars(nn.Module())) - {"training"})
    _CLOSED = (nn.Module, type, FunctionType, MethodType, BuiltinFunctionType)
    _DEPTH = 3

    def __init__(self, denoiser: nn.Module) -> None:
        # Attribute by attribute, in three lists: to look at thousands of them before every call has to be quick.
        self.holders: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.lists: list[tuple[Any, tuple[Any, ...]]] = []
        self.tensors: list[Tensor] = []
        self.reason: str | None = None
        self.compiled: list[bool] = []
        self._seen: set[int] = set()
        for path, module in denoiser.named_modules():
            name = path or type(module).__name__
            if module.training:
                self.reason = self.reason or f"{name} is in training mode; call `eval()` on the model"
            if module._forward_hooks or module._forward_pre_hooks:
                self.reason = self.reason or f"{name} has a forward hook, which a replay would not call"
            # diffusers leaves an empty registry on a model whose `cache_context` was entered.
            if hasattr(module, "_hf_hook") or getattr(vars(module).get("_diffusers_hook"), "hooks", None):
                self.reason = self.reason or f"{name} has a hook that moves or casts its weights"
            self.compiled.append(path != "" and compiled_whole(module))
            self._add(vars(module), 0, tuple(key for key in vars(module) if key not in self._NOT))
            for own in (module._parameters, module._buffers, module._modules):
                self._add(own, 0)
        # Of subclasses nobody knows whether they have an address.
        self.plain = [tensor for tensor in self.tensors if type(tensor) in (Tensor, nn.Parameter)]
        self.addresses = list(map(Tensor.data_ptr, self.plain))

    def _add(self, holder: dict[Any, Any], depth: int, keys: tuple[Any, ...] | None = None) -> None:
        keys = tuple(holder) if keys is None else keys
        if id(holder) in self._seen or not keys:
            return
        self._seen.add(id(holder))
        values = list(map(holder.get, keys))
        self.holders += [holder] * len(keys)
        self.keys += keys
        self.values += values
        for value in values:
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, dict):
                self._add(value, depth + 1)
            elif isinstance(value, list | set | tuple):
                if not isinstance(value, tuple):  # those never change
                    self.lists.append((value, tuple(value)))
                self.tensors += [entry for entry in value if isinstance(entry, Tensor)]
            elif hasattr(value, "__dict__") and not isinstance(value, self._CLOSED) and depth < self._DEPTH:
                self._add(vars(value), depth + 1)

    def unchanged(self) -> bool:
        """Whether all of it is as it was."""
        now = list(map(dict.get, self.holders, self.keys))
        if not all(map(operator.is_, now, self.values)) and not all(map(_alike, now, self.values)):
            return False
        if any(len(now) != len(then) or not all(map(operator.is_, now, then)) for now, then in self.lists):
            return False
        return list(map(Tensor.data_ptr, self.plain)) == self.addresses

    def same(self, other: Watch) -> bool:
        """Whether it is of the same modules and attributes as an earlier one, and these are unchanged."""
        if self.compiled != other.compiled or len(self.holders) != len(other.holders) or self.keys != other.keys:
            return False
        # A model of the same make has dictionaries of its own.
        return all(map(operator.is_, self.holders, other.holders)) and other.unchanged()


def _alike(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and type(now) in PLAIN and now == then)


# ----------------------------------------------------------------------------------------------------------- the graphs


@dataclass
class DenoiserCall:
    """One call of a denoiser.

    Attributes:
        branch: Name of its guidance branch.
        state: What the branch keeps.
        passing: What the call stores and reuses; None where there is nothing of that.
        step: Of the run.
        again: Starts the same call once more.
        run: Carries a call out, with its arguments.
        bound: What else its work depends on, by value or by the identity of what is held.
        held: What it reads that must outlive its graph.
    """

    branch: str
    state: BranchState
    passing: Pass | None
    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    again: Callable[[], Pass | None]
    run: Callable[[Pass | None, tuple[Any, ...], dict[str, Any]], Any]
    bound: tuple[Hashable, ...] = ()
    held: tuple[object, ...] = ()


@dataclass
class _Memory:
    """A stored value's tensors where a graph expects them."""

    place: Place
    form: Hashable
    tensors: list[Tensor]

    def value(self) -> Any:
        return unflatten(self.form, iter(self.tensors))


@dataclass
class _Graph:
    """A captured call. `used` is the number of the run that replayed it last."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    reads: list[_Memory]
    writes: list[_Memory]
    form: Hashable
    outputs: list[Tensor]
    noted: Any
    held: tuple[object, ...]
    used: int = 0

    @property
    def memory(self) -> list[Tensor]:
        return [*self.inputs, *(tensor for kept in (*self.reads, *self.writes) for tensor in kept.tensors)]


class Graphs:
    """The graphs of one denoiser, kept from run to run.

    At most `limit` of them. Where there is no room, one that two runs have not asked for gives way; else the call runs without: a plan
    with more kinds of calls than that would otherwise capture anew at every step.

    Args:
        limit: Most graphs.
        capture: What captures; CUDA unless told.

    Attributes:
        captured: Graphs made so far.
        replayed: Calls answered by one so far.
        direct: Calls that ran without so far.

    Raises:
        ValueError: `limit` is below 1.
    """

    def __init__(self, limit: int = LIMIT, capture: Capture | None = None) -> None:
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit must be a whole number of at least 1, not {limit!r}")
        self.limit = limit
        self.captured = self.replayed = self.direct = 0
        self._capture = capture if capture is not None else CudaCapture()
        self._run = 0
        self._failures = 0
        self._watch: Watch | None = None
        self._fresh = True
        self._said: set[str] = set()
        self._say: Callable[[str], None] = self._said.add
        self.clear()

    def clear(self) -> None:
        """Drops all graphs and their memory. For what no attribute of the denoiser shows, such as another library's global switch."""
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: dict[Hashable, str] = {}
        self._memory: dict[Hashable, Tensor] = {}
        self._failures = 0
        self._capture.forget()

    def __len__(self) -> int:
        return len(self._graphs)

    def __str__(self) -> str:
        return f"{len(self)} graphs of at most {self.limit}; {self.replayed} calls replayed, {self.direct} without"

    @property
    def bytes(self) -> int:
        """Bytes of the memory that does not move: arguments and stored values, without the graphs' own pool."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def begin(self, say: Callable[[str], None]) -> None:
        """A run begins.

        Args:
            say: Hears why calls run without a graph, each reason once.
        """
        self._run += 1
        self._say, self._said, self._fresh = say, set(), True

    def call(self, denoiser: nn.Module, call: DenoiserCall, why: str | None = None) -> Any:
        """A call of the denoiser: replayed where a graph fits, else carried out.

        Args:
            why: Why the run cannot have graphs, or None.

        Raises:
            Recompute: As the call itself.
        """
        try:
            if why is not None:
                raise Refused(why)
            return self._called(denoiser, call)
        except Refused as reason:
            self._tell(str(reason))
        self.direct += 1
        return call.run(call.passing, call.args, call.kwargs)

    def _tell(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self._say(f"without a graph: {reason}")

    def _called(self, denoiser: nn.Module, call: DenoiserCall) -> Any:
        """As `call`. Nothing has been done when it refuses."""
        effects = self._effects(call)
        tensors: list[Tensor] = []
        form = flatten((call.args, call.kwargs), tensors, "the call")
        device = self._checked(tensors)
        self._check_model(denoiser)
        if call.passing is not None and call.passing.reasons:
            raise Refused("sites are computed that the plan wanted reused")
        if isinstance(call.state, BlockState) and not isinstance(call.state.spare, Unspared):
            call.state.spare = Unspared()
        reads = effects.reads(call.state, call.passing)
        key = self._key(call, effects, form, tensors, reads)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self.replayed += 1
            return self._replayed(graph, call, effects, tensors, call.passing, device)
        self.direct += 1
        wanted = self._wanted(key)
        before = self._snapshot(call, effects) if wanted else {}
        out = call.run(call.passing, call.args, call.kwargs)
        if wanted and (call.passing is None or not call.passing.reasons):
            self._make(key, call, effects, tensors, before, out, device)
        return out

    # ------------------------------------------------------------------------------------------- what a call depends on

    @staticmethod
    def _effects(call: DenoiserCall) -> Effects:
        found = EFFECTS.get(type(call.state))
        if found is None:
            raise Refused("the method decides during the run what is reused")
        return found if call.passing is not None else NOTHING

    def _checked(self, tensors: Sequence[Tensor]) -> torch.device:
        """The device of a call.

        Raises:
            Refused: Its work cannot be captured there, or now.
        """
        strange = next((tensor for tensor in tensors if not self._capture.accepts(tensor)), None)
        if strange is not None:
            raise Refused(f"the denoiser is given a tensor on {strange.device}")
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1:
            raise Refused(f"the denoiser is given tensors on {', '.join(sorted(map(str, devices)))}")
        device = devices.pop()
        if torch.is_grad_enabled():
            raise Refused("gradients are recorded; call under torch.no_grad()")
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            raise Refused("autocast keeps copies of weights that end with it; load the model in the dtype instead")
        if self._failures >= FAILURES:
            raise Refused(f"{FAILURES} captures have failed")
        return device

    def _check_model(self, denoiser: nn.Module) -> None:
        """Drops all graphs if the denoiser is another than it was.

        Raises:
            Refused: Its calls cannot be replayed.
        """
        if self._watch is None or self._fresh or not self._watch.unchanged():
            now = Watch(denoiser)
            if self._watch is not None and not now.same(self._watch):
                if len(self):
                    self._tell("the denoiser's weights, adapters or settings have changed, so the graphs are made anew")
                self.clear()
            self._watch, self._fresh = now, False
        if self._watch.reason is not None:
            raise Refused(self._watch.reason)

    def _key(
        self, call: DenoiserCall, effects: Effects, form: Hashable, tensors: Sequence[Tensor], reads: Sequence[tuple[Slot, Place]]
    ) -> Hashable:
        stored: list[Tensor] = []
        forms = tuple((place, flatten(getattr(call.state, name)[key], stored, "a stored value")) for (name, key), place in reads)
        fixes = effects.fixes(call.state, call.passing)
        device = tensors[0].device.type
        return (
            call.branch,
            type(call.passing),
            effects.key(call.state, call.passing),
            form,
            tuple(map(layout, tensors)),
            forms,
            tuple(map(layout, stored)),
            call.bound,
            (call.step, tuple(fix.group for fix in fixes)) if fixes else None,
            torch.is_inference_mode_enabled(),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            torch.are_deterministic_algorithms_enabled(),
            backend.usable(tensors[0].device),
        )

    def _wanted(self, key: Hashable) -> bool:
        """Whether a call is to be captured: its kind was seen before, and there is room."""
        if key in self._refused:
            self._tell(self._refused[key])
            return False
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > KINDS:
                self._seen.popitem(last=False)
            return False
        if len(self._graphs) < self.limit:
            return True
        oldest, graph = next(iter(self._graphs.items()))
        if graph.used >= self._run - 1:
            self._tell(f"there are more kinds of calls than the {self.limit} graphs that are kept; graphs={2 * self.limit} keeps more")
            return False
        del self._graphs[oldest]
        self._prune()
        return True

    def _prune(self) -> None:
        """Gives back memory that no graph reads or writes."""
        used = {id(tensor) for graph in self._graphs.values() for tensor in graph.memory}
        self._memory = {place: tensor for place, tensor in self._memory.items() if id(tensor) in used}
        if not self._graphs:
            self._capture.forget()

    # ------------------------------------------------------------------------------------------------ memory that stays

    def _fixed(self, place: Hashable, like: Tensor) -> Tensor:
        """Memory for a tensor like this one; always the same for a place."""
        key = place, layout(like)
        if key not in self._memory:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside of inference mode
                self._memory[key] = torch.empty_like(like, requires_grad=False)
        return self._memory[key]

    def _memories(self, call: DenoiserCall, slots: Sequence[tuple[Slot, Place]]) -> list[_Memory]:
        """Where stored values are to lie."""
        made = []
        for (name, key), place in slots:
            found: list[Tensor] = []
            form = flatten(getattr(call.state, name)[key], found, "a stored value")
            # A call that only stores and one that also reuses are of one branch, and share its places.
            made.append(_Memory(place, form, [self._fixed((call.branch, place, i), t) for i, t in enumerate(found)]))
        return made

    @staticmethod
    def _snapshot(call: DenoiserCall, effects: Effects) -> dict[str, Any]:
        return {name: copy.copy(getattr(call.state, name)) for name in effects.mutable}

    @staticmethod
    def _restore(call: DenoiserCall, snapshot: Mapping[str, Any]) -> None:
        for name, value in snapshot.items():
            setattr(call.state, name, copy.copy(value))

    def _spared(self, effects: Effects, after: Mapping[str, Any]) -> dict[str, Any]:
        """A snapshot whose values lie outside of the memory that graphs write to, so that a graph can be tried and given up."""
        fixed = {id(tensor) for tensor in self._memory.values()}

        def copied(value: Any) -> Any:
            found: list[Tensor] = []
            form = flatten(value, found, "a stored value")
            return unflatten(form, iter([t.clone() if id(t) in fixed else t for t in found]))

        values = {name: {key: copied(value) for key, value in after[name].items()} for name in effects.values}
        return {**after, **values}

    def _bind(
        self,
        call: DenoiserCall,
        effects: Effects,
        reads: Sequence[tuple[Slot, _Memory]],
        writes: Sequence[Slot],
        to: Sequence[_Memory],
    ) -> None:
        """Puts what a graph reads where it expects it, and out of its way what it would overwrite.

        Args:
            reads: The stored values that it reads, and where it expects them.
            writes: The values that it replaces.
            to: Where it writes them.
        """
        state = call.state
        living = {
            id(tensor): (name, key)
            for name in effects.values
            for key, value in getattr(state, name).items()
            if (name, key) not in writes
            for tensor in leaves(value)
        }

        def displace(tensor: Tensor) -> None:
            slot = living.pop(id(tensor), None)
            if slot is not None:
                found: list[Tensor] = []
                form = flatten(getattr(state, slot[0])[slot[1]], found, "a stored value")
                moved = [t.clone() if t is tensor else t for t in found]
                getattr(state, slot[0])[slot[1]] = unflatten(form, iter(moved))

        for kept in to:
            for tensor in kept.tensors:
                displace(tensor)
        for (name, key), kept in reads:
            for value, tensor in zip(leaves(getattr(state, name)[key]), kept.tensors, strict=True):
                if value is not tensor:
                    displace(tensor)
                    tensor.copy_(value)
                    living.pop(id(value), None)
                living[id(tensor)] = name, key
            getattr(state, name)[key] = kept.value()

    # ------------------------------------------------------------------------------------------------ capture and replay

    def _replayed(
        self, graph: _Graph, call: DenoiserCall, effects: Effects, tensors: Sequence[Tensor], passing: Pass | None, device: torch.device
    ) -> Any:
        """A call, from its graph."""
        reads = effects.reads(call.state, passing)
        writes = [effects.slot(passing, kept.place) for kept in graph.writes]
        self._capture.settle(device)
        self._bind(call, effects, [(slot, kept) for (slot, _), kept in zip(reads, graph.reads, strict=True)], writes, graph.writes)
        for fixed, tensor in zip(graph.inputs, tensors, strict=True):
            fixed.copy_(tensor)
        graph.replay()
        for (name, key), kept in zip(writes, graph.writes, strict=True):
            getattr(call.state, name)[key] = kept.value()
        effects.repeat(call.state, passing, graph.noted, writes)
        graph.used = self._run
        return unflatten(graph.form, iter([tensor.clone() for tensor in graph.outputs]))

    def _make(
        self,
        key: Hashable,
        call: DenoiserCall,
        effects: Effects,
        tensors: Sequence[Tensor],
        before: Mapping[str, Any],
        out: Any,
        device: torch.device,
    ) -> None:
        """Captures a call that has just been carried out, and keeps the graph if its replay gives the same.

        Args:
            before: What the call changed, as it was before.
            out: What it returned.
        """
        after = self._snapshot(call, effects)
        stored = _changed(effects, before, after)
        spared = self._spared(effects, after)
        try:
            graph = self._captured(call, effects, tensors, before, stored, out, device)
            self._try(graph, stored, call, effects, tensors, after, out, device)
        except Exception as error:  # a model may do anything that cannot be captured; its own result is at hand
            self._restore(call, spared)
            self._failures += not isinstance(error, Refused)
            self._prune()
            name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
            self._refused[key] = f"{name}{' '.join(str(error).split())[:200]}"
            self._tell(self._refused[key])
            return
        graph.used = self._run
        self._graphs[key] = graph
        self.captured += 1

    def _captured(
        self,
        call: DenoiserCall,
        effects: Effects,
        tensors: Sequence[Tensor],
        before: Mapping[str, Any],
        stored: Sequence[Slot],
        out: Any,
        device: torch.device,
    ) -> _Graph:
        """The graph of a call that stored these values; the state is left as it was before the call."""
        form = flatten(out, [], "the denoiser's output")
        writes = self._memories(call, [(slot, effects.place(call.passing, slot)) for slot in stored])
        self._restore(call, before)
        slots = effects.reads(call.state, call.passing)
        reads = self._memories(call, slots)
        if {kept.place for kept in reads} & {kept.place for kept in writes}:
            raise Refused("the call overwrites what it reads")
        inputs = [self._fixed(("argument", i), tensor) for i, tensor in enumerate(tensors)]
        self._capture.settle(device)
        for fixed, tensor in zip(inputs, tensors, strict=True):
            fixed.copy_(tensor)
        self._bind(call, effects, [(slot, kept) for (slot, _), kept in zip(slots, reads, strict=True)], stored, writes)
        start = self._snapshot(call, effects)
        again = call.again()
        args, kwargs = unflatten(flatten((call.args, call.kwargs), [], "the call"), iter(inputs))

        def work() -> list[Tensor]:
            outputs: list[Tensor] = []
            found = flatten(call.run(again, args, kwargs), outputs, "the denoiser's output")
            if found != form or set(_changed(effects, start, self._snapshot(call, effects))) != set(stored):
                raise Refused("the call returns or stores something else each time")
            for (name, key), kept in zip(stored, writes, strict=True):
                for tensor, fixed in zip(leaves(getattr(call.state, name)[key]), kept.tensors, strict=True):
                    fixed.copy_(tensor)
            return outputs

        replay, outputs = self._capture.capture(work, device)
        noted, fixes = effects.noted(call.state, again), effects.fixes(call.state, again)
        self._restore(call, start)
        return _Graph(replay, inputs, reads, writes, form, outputs, noted, (*call.held, *fixes))

    def _try(
        self,
        graph: _Graph,
        stored: Sequence[Slot],
        call: DenoiserCall,
        effects: Effects,
        tensors: Sequence[Tensor],
        after: Mapping[str, Any],
        out: Any,
        device: torch.device,
    ) -> None:
        """Replays a fresh graph in the call's place.

        Args:
            after: What the call changed, as it is since.

        Raises:
            Refused: It gives something else than the call did.
        """
        again = call.again()
        replayed = self._replayed(graph, call, effects, tensors, again, device)
        pairs = [(out, replayed), *((after[name][key], getattr(call.state, name)[key]) for name, key in stored)]
        for expected, found in pairs:
            if not all(_same(a, b) for a, b in zip(leaves(expected), leaves(found), strict=True)):
                raise Refused("a replay gives another result than the call itself")


def _changed(effects: Effects, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Slot]:
    """The values that are new."""
    return [(name, key) for name in effects.values for key, value in after[name].items() if before[name].get(key) is not value]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the order of sums. Waits for the device."""
    narrow = a.element_size() == 1  # not every device compares fp8
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if narrow else torch.equal(a, b):
        return True
    if not a.is_floating_point() and a.dtype != torch.int8:
        return False
    difference, size = (a.float() - b.float()).norm(), a.float().norm()
    return bool(difference <= TOLERANCE * size)


def graphs_of(asked: bool | int) -> Graphs | None:
    """New graphs as a user asks for them: True, how many, or False for none.

    Raises:
        ValueError: It is none of these.
    """
    if asked is False:
        return None
    if asked is True:
        return Graphs()
    if type(asked) is not int or asked < 1:
        raise ValueError(f"graphs must be True, False or a count of at least 1, not {asked!r}")
    return Graphs(asked)
