"""Finds a denoiser's blocks, the streams that flow through them and what can be cached, by watching one forward pass.

Tensors are watched by identity: where the object that one block returned is the object that the next one receives, the two are
linked. That gives the chains of blocks and their streams (image tokens, text tokens) with no table of model classes.
A second pass with other latents tells which blocks carry the denoised stream, whether what a model adds between two blocks is a
plain addition, and how long every block takes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators.caching.unet import Deep, LayerClock, deep_branch
from hasten.accelerators.dispatch import Call, compiled_whole, intercept

Position = int | str
"""Where a tensor stands among a block's arguments: an index or a keyword."""


class TraceError(ValueError):
    """The denoiser cannot be traced; the message says why and what to do."""


@dataclass(frozen=True)
class Stream:
    """A tensor that enters a block and leaves it in the same shape.

    `index` is the same for one stream along a chain; `slot` is its place in the block's output (None where the output is the
    tensor itself); `aliased` if the block returns the very tensor that it was given.
    """

    index: int
    position: Position
    slot: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliased: bool = False

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """An attention, cross-attention or feed-forward module inside a block.

    `bytes` are those of its output; `in_place` if the block goes on to work in place on that.
    """

    kind: str
    path: str
    seconds: float
    bytes: int = 0
    in_place: bool = False


@dataclass(frozen=True)
class Block:
    """One block, as it was called.

    Attributes:
        path: Its name among the denoiser's modules.
        chain: Index of its chain, or -1 where it carries no denoised stream or cannot be cached.
        gap: What stands between the block called before and this one: 'linked', 'added' (a plain addition, same shape) or 'seam'.
        streams: What a cache would keep.
        form: Output form: 'tensor', or 'tuple' / 'list' with `width` entries.
        skips_from: Indices of earlier blocks, other than the one before, whose output this block reads.
        kept: Whether the model holds on to its output for something other than a block, so that the output must be right.
        in_place: Whether it changes its input.
        seconds: Time of one call on the bare denoiser.
        reason: Why it cannot be cached, or None.
        parts: Its attention, cross-attention and feed-forward modules, in call order.
        additive: Whether the block adds its parts' outputs to its stream as they are, with no gate and nothing else beside.
    """

    path: str
    parameters: int
    seconds: float = 0.0
    chain: int = -1
    gap: str = "seam"
    streams: tuple[Stream, ...] = ()
    form: str = "tensor"
    width: int = 1
    skips_from: tuple[int, ...] = ()
    kept: bool = False
    in_place: bool = False
    reason: str | None = None
    parts: tuple[Part, ...] = ()
    additive: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of one offset of this block, all streams."""
        return sum(stream.bytes for stream in self.streams)


@dataclass(frozen=True)
class Chain:
    """Consecutive blocks with no seam between them: spans lie inside one chain. `blocks` are indices into `Trace.blocks`."""

    blocks: tuple[int, ...]
    streams: int


@dataclass(frozen=True)
class Trace:
    """What a denoiser does in one forward pass. `print(trace)` shows it as a table."""

    model: str
    config_hash: str
    blocks: tuple[Block, ...]
    chains: tuple[Chain, ...]
    seconds: float
    dtype: str
    resolution: tuple[int, ...] = field(default=())
    deep: Deep | None = None
    halves: str | None = None
    """Why half of a batch cannot be run alone; empty if it can, None if nobody has asked yet."""

    @property
    def offered(self) -> tuple[int, ...]:
        """Indices of the blocks that may be cached, in call order."""
        return tuple(i for i, block in enumerate(self.blocks) if block.chain >= 0)

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the offered blocks, in call order: the columns of a plan."""
        return tuple(self.blocks[i].path for i in self.offered)

    @property
    def whole(self) -> tuple[str, ...]:
        """The sites that together hold the most that can be cached: a UNet's deep branch, else all blocks; nothing if there is neither."""
        return self.deep.sites[:1] if self.deep is not None else self.sites

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts of the offered blocks that are called once in a pass, in call order."""
        found = [part for i in self.offered for part in self.blocks[i].parts]
        paths = [part.path for part in found]
        return tuple(part for part in found if paths.count(part.path) == 1)

    def kind_of(self, sites: tuple[str, ...]) -> str | None:
        """What a plan's sites are: 'blocks', 'parts', the 'deep' branch of a UNet; None where they are not this model's."""
        if sites == self.sites:
            return "blocks"
        if sites and set(sites) <= {part.path for part in self.parts}:
            return "parts"
        if self.deep is not None and len(sites) == 1 and sites[0] in self.deep.sites:
            return "deep"
        return None

    def costs(self, sites: tuple[str, ...] | None = None) -> tuple[list[float], float]:
        """Seconds of every site, and of everything outside them.

        Args:
            sites: Of a plan; the blocks unless told.
        """
        kind = "blocks" if sites is None else self.kind_of(sites)
        if kind == "parts":
            known = {part.path: part.seconds for part in self.parts}
            seconds = [known[site] for site in sites or ()]
        elif kind == "deep" and self.deep is not None and sites is not None:
            seconds = [self.deep.seconds(self.deep.sites.index(sites[0]))]
        else:
            seconds = [self.blocks[i].seconds for i in self.offered]
        return seconds, max(0.0, self.seconds - sum(seconds))

    def to_json(self) -> dict[str, Any]:
        """Plain data with the content of the table."""
        blocks = [
            {
                "path": b.path,
                "chain": b.chain,
                "gap": b.gap,
                "parameters": b.parameters,
                "seconds": b.seconds,
                "bytes": b.bytes,
                "streams": [[str(s.position), list(s.shape)] for s in b.streams],
                "kept": b.kept,
                "in_place": b.in_place,
                "skips_from": list(b.skips_from),
                "reason": b.reason,
                "parts": [[p.kind, p.path, p.seconds] for p in b.parts],
                "additive": b.additive,
            }
            for b in self.blocks
        ]
        return {"model": self.model, "config": self.config_hash, "seconds": self.seconds, "dtype": self.dtype, "blocks": blocks}

    def __str__(self) -> str:
        rows = [("block", "chain", "before", "streams", "parameters", "ms", "share", "state", "parts")]
        for block in self.blocks:
            streams = " + ".join("x".join(map(str, s.shape)) for s in block.streams)
            notes = [f"{p.kind}={p.path.removeprefix(block.path + '.')}" for p in block.parts]
            if block.in_place:
                notes.append("in place")
            if block.kept:
                notes.append("output kept")
            if block.skips_from:
                notes.append(f"reads block {', '.join(map(str, block.skips_from))}")
            rows.append(
                (
                    block.path,
                    str(block.chain) if block.chain >= 0 else "-",
                    block.gap,
                    streams,
                    f"{block.parameters / 1e6:.2f}M",
                    f"{1e3 * block.seconds:.2f}",
                    f"{100 * block.seconds / self.seconds:.1f}%" if self.seconds else "",
                    format_bytes(block.bytes),
                    block.reason or ", ".join(notes),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        offered = self.offered
        share = sum(self.blocks[i].seconds for i in offered) / self.seconds if self.seconds else 0.0
        head = f"{self.model}: {len(self.blocks)} blocks in {len(self.chains)} chains, {len(offered)} can be cached"
        head += f" ({100 * share:.0f}% of {1e3 * self.seconds:.1f} ms)"
        if self.deep is not None:
            for branch, site in enumerate(self.deep.sites):
                share = self.deep.seconds(branch) / self.seconds if self.seconds else 0.0
                lines.append(f"deep branch {branch}: {site} kept, {100 * share:.0f}% of the time below it")
        return "\n".join([head, *lines])


def format_bytes(n: float) -> str:
    """`n` bytes for people: '1.5 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def config_hash(denoiser: nn.Module) -> str:
    """Hash of the denoiser's config, or of its parameters' names and shapes where it has none."""
    config = getattr(denoiser, "config", None)
    if isinstance(config, Mapping):
        facts: Any = {key: repr(value) for key, value in sorted(config.items()) if not key.startswith("_")}
    else:
        facts = [(name, tuple(value.shape)) for name, value in denoiser.named_parameters()]
    return hashlib.sha256(json.dumps([type(denoiser).__name__, facts]).encode()).hexdigest()[:16]


def weight_facts(denoiser: nn.Module) -> dict[str, Any]:
    """What a calibrated plan is bound to beyond the config: a hash of sampled weights, and the adapters with their scales.

    Weights are compared in bfloat16, so that a checkpoint loaded in another dtype is the same.
    """
    digest = hashlib.sha256()
    scales: dict[str, float] = {}
    for name, module in denoiser.named_modules():
        active, scaling = getattr(module, "active_adapters", None), getattr(module, "scaling", None)
        if isinstance(scaling, Mapping) and isinstance(active, list):
            scales |= {adapter: round(float(scaling[adapter]), 6) for adapter in active if adapter in scaling}
        for key, value in module.named_parameters(recurse=False):
            if "lora_" in name or value.is_meta:
                continue
            # Adapters wrap a layer: its own weight keeps its place under another name.
            digest.update(f"{name.removesuffix('.base_layer')}.{key}".encode())
            flat = value.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 16)][:16].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return {"weights": digest.hexdigest()[:16], "adapters": dict(sorted(scales.items()))}


def block_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of everything that stands in an outermost list of modules."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        kinds = {type(item) for item in child.children()}
        if isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(child) > 1 and len(kinds) == 1):
            for key, item in child.named_children():
                yield f"{path}.{key}", item
        else:
            yield from block_lists(child, f"{path}.")


@dataclass
class _Called:
    """What was seen of one call."""

    path: str
    module: nn.Module
    inputs: dict[Position, tuple[tuple[int, ...], torch.dtype]]
    sources: dict[Position, tuple[int, int | None]]
    sums: dict[Position, Tensor]
    gaps: dict[Position, Tensor]
    outputs: dict[int | None, weakref.ref[Tensor]] = field(default_factory=dict)
    shapes: dict[int | None, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    aliases: set[int | None] = field(default_factory=set)
    versions: dict[int | None, int | None] = field(default_factory=dict)
    kept: bool = False
    form: str = "tensor"
    width: int = 1
    in_place: tuple[Position, ...] = ()
    seconds: float = 0.0
    parts: list[Part] = field(default_factory=list)
    beside: dict[Position, Tensor] = field(default_factory=dict)
    returned: list[tuple[Tensor, int | None]] = field(default_factory=list)
    additive: bool = False


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Position, Tensor]:
    """The floating-point tensors among a call's arguments."""
    items: list[tuple[Position, Any]] = [*enumerate(args), *kwargs.items()]
    return {position: value for position, value in items if isinstance(value, Tensor) and value.is_floating_point()}


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was changed in place; None in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def synchronise(tensor: Tensor) -> None:
    """Waits for the tensor's device, so that a clock means something."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class _Watcher:
    """Watches one forward pass."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.calls: list[_Called] = []
        self.candidates = list(block_lists(denoiser))
        self.inside: _Called | None = None
        self.seconds = 0.0
        self.copies: dict[int | None, Tensor] = {}
        self.latest: list[Tensor] = []  # the last call's outputs, which the model may have let go of when it added to them

    def handlers(self) -> dict[nn.Module, Callable[..., Any]]:
        handlers: dict[nn.Module, Callable[..., Any]] = {}
        for path, module in self.candidates:
            handlers[module] = self._block_handler(path, module)
            if compiled_whole(module):
                continue  # its parts are called from compiled code
            for name, child in module.named_children():
                kind = _part_kind(child)
                if kind is not None:
                    handlers.setdefault(child, self._part_handler(f"{path}.{name}", kind))
        return handlers

    def _block_handler(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = tensors_of(args, kwargs)
            called = _Called(
                path,
                module,
                inputs={position: (tuple(t.shape), t.dtype) for position, t in inputs.items()},
                sources={},
                sums={position: t.double().sum() + t.double().square().sum() for position, t in inputs.items()},
                gaps={},
            )
            for position, tensor in inputs.items():
                source = self._source(tensor)
                if source is not None:
                    if not self._changed(tensor, source):
                        called.sources[position] = source
                elif self.calls:
                    # A new object: what is it beyond what the block before returned in this shape?
                    for slot, reference in self.calls[-1].outputs.items():
                        before = reference()
                        if before is not None and before.shape == tensor.shape and before.dtype == tensor.dtype:
                            called.gaps[position] = (tensor - before).double()
                            called.sources.setdefault(position, (-1, slot))
                            break
            self._find_kept()
            versions = {position: version_of(t) for position, t in inputs.items()}
            copies = {position: t.clone() for position, t in inputs.items() if versions[position] is None}
            outer, self.inside = self.inside, called
            entered = next(iter(inputs.values()), None)
            if entered is not None:
                entered = entered.double()
            for tensor in inputs.values():
                synchronise(tensor)
                break
            began = time.perf_counter()
            out = call(*args, **kwargs)
            for tensor in inputs.values():
                synchronise(tensor)
                break
            called.seconds = time.perf_counter() - began
            self.inside = outer
            called.in_place = tuple(
                position
                for position, t in inputs.items()
                if (not torch.equal(copies[position], t) if position in copies else version_of(t) != versions[position])
            )
            self.copies, self.latest = {}, []
            called.additive = _is_sum(entered, called.beside, out, len(called.parts))
            changed = [version_of(tensor) != version for tensor, version in called.returned]
            called.parts = [replace(part, in_place=mark) for part, mark in zip(called.parts, changed, strict=True)]
            called.beside, called.returned = {}, []
            if isinstance(out, Tensor):
                entries: dict[int | None, Any] = {None: out}
            elif type(out) in (tuple, list):
                called.form, called.width = type(out).__name__, len(out)
                entries = dict(enumerate(out))
            else:
                called.form, entries = "other", {}
            for slot, value in entries.items():
                if isinstance(value, Tensor):
                    called.outputs[slot] = weakref.ref(value)
                    self.latest.append(value)
                    called.shapes[slot] = (tuple(value.shape), value.dtype)
                    called.versions[slot] = version_of(value)
                    if called.versions[slot] is None:
                        self.copies[slot] = value.clone()
                    if any(value is tensor for tensor in inputs.values()):
                        called.aliases.add(slot)
                elif value is not None:
                    called.form = "other"
            self.calls.append(called)
            return out

        return handle

    def _part_handler(self, path: str, kind: str) -> Callable[..., Any]:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = [*tensors_of(args, kwargs).items()]
            if inputs:
                synchronise(inputs[0][1])
            began = time.perf_counter()
            out = call(*args, **kwargs)
            if inputs:
                synchronise(inputs[0][1])
            if self.inside is not None and inputs:
                first = out[0] if type(out) in (tuple, list) and out else out
                if isinstance(first, Tensor) and first.shape == inputs[0][1].shape:
                    other = any(t.ndim == first.ndim and t.shape[-2] != first.shape[-2] for _, t in inputs[1:] if t.ndim >= 2)
                    single = isinstance(out, Tensor)
                    name = "cross-attention" if kind == "attention" and other and single else kind
                    self.inside.parts.append(Part(name, path, time.perf_counter() - began, first.numel() * first.element_size()))
                    self.inside.returned.append((first, version_of(first)))
                    if single:
                        self.inside.beside[path] = first.double()
            return out

        return handle

    def _changed(self, tensor: Tensor, source: tuple[int, int | None]) -> bool:
        """Whether the model has changed a block's output in place before this call: then the link is none."""
        index, slot = source
        if index != len(self.calls) - 1:
            return False
        version = self.calls[index].versions[slot]
        return not torch.equal(self.copies[slot], tensor) if version is None else version_of(tensor) != version

    def _find_kept(self) -> None:
        """An output that outlives the call of the block after it is held by the model for later."""
        for called in self.calls[:-1]:
            for slot, reference in called.outputs.items():
                tensor = reference()
                if tensor is not None and slot not in called.aliases and not any(tensor is other for other in self.latest):
                    called.kept = True

    def _source(self, tensor: Tensor) -> tuple[int, int | None] | None:
        for index in range(len(self.calls) - 1, -1, -1):
            for slot, reference in self.calls[index].outputs.items():
                if reference() is tensor:
                    return index, slot
        return None


def _is_sum(entered: Tensor | None, beside: Mapping[Position, Tensor], out: Any, parts: int) -> bool:
    """Whether a block returned what it was given plus what its parts returned."""
    if entered is None or not parts or len(beside) != parts or not isinstance(out, Tensor) or out.shape != entered.shape:
        return False
    if any(part.shape != entered.shape for part in beside.values()):
        return False
    added = sum(beside.values(), torch.zeros_like(entered))
    scale = added.abs().max().clamp_min(1e-12)
    # A rounding of the stream's dtype at each of the additions; a gate of any value but 1 is far above it.
    allowed = 8 * torch.finfo(out.dtype).eps * max(float(entered.abs().max()), float(scale)) if out.is_floating_point() else 0.0
    return bool((out.double() - entered - added).abs().max() <= allowed)


def _part_kind(module: nn.Module) -> str | None:
    if any(hasattr(module, name) for name in ("to_q", "to_qkv", "q_proj", "qkv", "wq", "in_proj_weight")):
        return "attention"
    linear = sum(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d) for m in module.modules())
    if linear >= 2 and not hasattr(module, "silu") and "norm" not in type(module).__name__.lower():
        return "feed-forward"
    return None


def latents_position(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Position:
    """Where the latents stand in a denoiser's call: its first floating-point tensor.

    Raises:
        TraceError: There is none.
    """
    floating = tensors_of(args, kwargs)
    if args and 0 in floating:
        return 0
    names = [name for name in inspect.signature(denoiser.forward).parameters if name in floating]
    if names:
        return names[0]
    if floating:
        return next(iter(floating))
    raise TraceError(f"{type(denoiser).__name__} was called without a floating-point tensor: there are no latents to follow")


def trace_module(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Traces one call `denoiser(*args, **kwargs)`: two forward passes without gradients.

    Raises:
        TraceError: The denoiser is compiled as a whole, or was called without latents.
    """
    if compiled_whole(denoiser):
        raise TraceError(
            f"{type(denoiser).__name__} is compiled as a whole, so its blocks cannot be told apart; compile the blocks one by "
            "one instead (`denoiser.compile_repeated_blocks()`, or `block.compile()` for each)"
        )
    position = latents_position(denoiser, args, kwargs)
    latents: Tensor = tensors_of(args, kwargs)[position]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)

    def run(value: Tensor, watcher: _Watcher | None) -> float:
        new_args, new_kwargs = list(args), dict(kwargs)
        if isinstance(position, int):
            new_args[position] = value
        else:
            new_kwargs[position] = value
        synchronise(latents)
        began = time.perf_counter()
        with torch.no_grad(), intercept(watcher.handlers() if watcher is not None else {}, around=True):
            denoiser(*new_args, **new_kwargs)
        synchronise(latents)
        return time.perf_counter() - began

    first, second = _Watcher(denoiser), _Watcher(denoiser)
    # A denoiser in training mode draws dropout masks: the run that follows must draw the same as without a trace.
    with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
        seconds = min(run(latents.clone(), first), run(latents + noise, second), run(latents.clone(), None))
        deep = deep_branch(denoiser)
        if deep is not None:
            clock = LayerClock(denoiser, deep)
            with intercept(clock.handlers(), around=True):
                run(latents.clone(), None)
            deep = clock.timed(seconds)
    return replace(_assemble(denoiser, first, second, seconds, latents), deep=deep)


def _assemble(denoiser: nn.Module, first: _Watcher, second: _Watcher, seconds: float, latents: Tensor) -> Trace:
    calls = first.calls
    same = [c.path for c in calls] == [c.path for c in second.calls]
    counts: dict[str, int] = {}
    for called in calls:
        counts[called.path] = counts.get(called.path, 0) + 1
    flows = _flows(calls)
    blocks: list[Block] = []
    chains: list[list[int]] = []
    names: dict[int | None, int] = {}  # output slot of the block before -> stream index
    for i, called in enumerate(calls):
        other = second.calls[i] if same else called
        gap = _gap(calls, i, other, flows)
        streams: list[Stream] = []
        taken: dict[int | None, int] = {}
        fresh = max(names.values(), default=-1) + 1 if gap != "seam" else 0
        for at, slot in flows[i].items():
            shape, dtype = called.inputs[at]
            source = called.sources.get(at)
            if gap != "seam" and source is not None and source[0] in (i - 1, -1) and source[1] in names:
                index = names[source[1]]
            else:
                index, fresh = fresh, fresh + 1
            taken[slot] = index
            streams.append(Stream(index, at, slot, shape, dtype, slot in called.aliases))
        moved = not same or any(not torch.equal(called.sums[at], other.sums[at]) for at in flows[i])
        reason = _reason(called, counts, flows[i], moved)
        if reason is None:
            if gap == "seam" or not chains or blocks[-1].chain < 0:
                gap = "seam"
                chains.append([])
            chains[-1].append(i)
        skips = sorted({s for at, (s, _) in called.sources.items() if 0 <= s < i - 1})
        blocks.append(
            Block(
                called.path,
                sum(p.numel() for p in called.module.parameters()),
                seconds=min(called.seconds, other.seconds),
                chain=len(chains) - 1 if reason is None else -1,
                gap=gap,
                streams=tuple(sorted(streams, key=lambda s: s.index)),
                form=called.form,
                width=called.width,
                skips_from=tuple(skips),
                kept=called.kept,
                in_place=bool(set(called.in_place) & set(flows[i])),
                reason=reason,
                parts=tuple(p for p in (other.parts if same else called.parts)),
                additive=called.additive and other.additive,
            )
        )
        names = taken
    read = {producer for block in blocks for producer in block.skips_from}
    # At a seam every span ends anyway, and the model's variables may well outlive it.
    inside = [i + 1 < len(blocks) and blocks[i + 1].gap != "seam" for i in range(len(blocks))]
    kept = [block.kept and inside[i] and i not in read for i, block in enumerate(blocks)]
    if any(kept) and inside[-2]:
        kept[-2] = True  # no call comes after the last one that could show whether this output is held as well
    # The watched passes are slowed by the watching: block times are scaled so that they cannot exceed the fastest pass.
    times = _typical(blocks, [type(called.module) for called in calls])
    scale = min(1.0, seconds / total) if (total := sum(times)) else 1.0
    blocks = [
        replace(block, seconds=t * scale, kept=k, parts=_parts_within(block, t * scale))
        for block, t, k in zip(blocks, times, kept, strict=True)
    ]
    made = tuple(Chain(tuple(c), len({s.index for i in c for s in blocks[i].streams})) for c in chains)
    precision = str(latents.dtype).removeprefix("torch.")
    return Trace(type(denoiser).__name__, config_hash(denoiser), tuple(blocks), made, seconds, precision, tuple(latents.shape))


def _parts_within(block: Block, seconds: float) -> tuple[Part, ...]:
    """The parts' times, scaled as the block's own."""
    scale = seconds / block.seconds if block.seconds else 1.0
    return tuple(replace(part, seconds=part.seconds * scale) for part in block.parts)


def _typical(blocks: list[Block], kinds: list[type]) -> list[float]:
    """Block times without the noise of the clock: blocks of one class, size and shape take the median of their times."""
    groups: dict[Any, list[float]] = {}
    keys = [(kind, b.parameters, tuple(s.shape for s in b.streams), len(b.skips_from)) for kind, b in zip(kinds, blocks, strict=True)]
    for key, block in zip(keys, blocks, strict=True):
        groups.setdefault(key, []).append(block.seconds)
    return [statistics.median(groups[key]) for key in keys]


def _flows(calls: list[_Called]) -> list[dict[Position, int | None]]:
    """For every call, which argument leaves by which output slot.

    What the links of a list show (argument p of the next block is output s of this one) holds for all blocks of that list; where
    nothing links, an output belongs to the first argument of its shape, `hidden_states` before others.
    """
    shown: dict[str, dict[Position, int | None]] = {}
    for i in range(1, len(calls)):
        key = calls[i].path.rpartition(".")[0]
        if key == calls[i - 1].path.rpartition(".")[0]:
            for position, (source, slot) in calls[i].sources.items():
                if source in (i - 1, -1) and position not in shown.setdefault(key, {}):
                    shown[key][position] = slot
    flows = []
    for called in calls:
        flow: dict[Position, int | None] = {}
        for position, slot in shown.get(called.path.rpartition(".")[0], {}).items():
            if called.inputs.get(position) is not None and called.inputs[position] == called.shapes.get(slot):
                flow[position] = slot
        order = sorted(called.inputs, key=lambda p: (p not in (0, "hidden_states", "x"), str(p)))
        for slot, facts in called.shapes.items():
            if slot not in flow.values():
                match = next((p for p in order if p not in flow and called.inputs[p] == facts), None)
                if match is not None:
                    flow[match] = slot
        flows.append(flow)
    return flows


def _gap(calls: list[_Called], i: int, other: _Called, flows: list[dict[Position, int | None]]) -> str:
    """What lies between call i - 1 and call i, over the streams of call i."""
    called = calls[i]
    if i == 0 or not flows[i]:
        return "seam"
    kind = "linked"
    for position in flows[i]:
        source = called.sources.get(position)
        if source is None or source[0] not in (i - 1, -1):
            return "seam"
        if source[0] == -1:
            difference, again = called.gaps.get(position), other.gaps.get(position)
            # An addition adds the same whatever the latents are; a norm or a change of layout does not.
            if difference is None or again is None or difference.shape != again.shape:
                return "seam"
            scale = difference.abs().max().clamp_min(1e-12)
            if bool((difference - again).abs().max() > 1e-2 * scale):
                return "seam"
            kind = "added"
    return kind


def _reason(called: _Called, counts: dict[str, int], flow: dict[Position, int | None], moved: bool) -> str | None:
    if not flow:
        return "returns nothing in the shape of what it receives"
    if not moved:
        return "does not depend on the latents"
    if counts[called.path] > 1:
        return f"called {counts[called.path]} times in one pass"
    if called.form == "other":
        return "its output is neither a tensor nor a tuple or list of tensors"
    if any(slot not in flow.values() for slot in called.shapes):
        return "returns tensors beside its streams"
    return None
