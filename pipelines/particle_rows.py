"""The rows of a pipeline's batch: prompts repeated for their particles, encoded once, and a denoiser that computes living rows alone.

The pipeline is told of P x K rows from its first line to its last and knows nothing of particles.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators.caching.trace import latents_position, synchronise, tensors_of
from hasten.accelerators.dispatch import Call, Handler, intercept
from hasten.accelerators.steering.budget import Cost, Meter
from hasten.accelerators.steering.controller import SteeringError
from hasten.accelerators.steering.loop import micro_batches

PER_CALL = frozenset({
    "timesteps", "sigmas", "generator", "latents", "callback_on_step_end_tensor_inputs", "original_size", "target_size",
    "crops_coords_top_left", "negative_original_size", "negative_target_size", "negative_crops_coords_top_left", "guidance_scale",
    "skip_guidance_layers", "cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs", "complex_human_instruction",
})  # fmt: skip
"""Arguments of pipelines that are lists or tensors and do not belong to the prompts, whatever their length."""
PER_POSITION = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis", "rotary_embs"})
"""Arguments of denoisers that belong to positions and not to rows."""
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


# ---------------------------------------------------------------------------------------------------------- a call's rows


def bound(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name.

    Raises:
        TypeError: The pipeline does not take them.
    """
    arguments = inspect.signature(pipe.__call__).bind(*args, **kwargs).arguments
    extra = next((p.name for p in inspect.signature(pipe.__call__).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    return {**{name: value for name, value in arguments.items() if name != extra}, **arguments.get(extra or "", {})}


def default(pipe: Any, name: str) -> Any:
    """A pipeline's default for an argument of its call; None where it has no such argument or no default."""
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def prompts_of(pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """The prompts of a call; empty texts where it was given embeddings, classes or images alone.

    Raises:
        SteeringError: The call asks for several samples of each prompt: those are the particles.
    """
    for name in COUNTS:
        if call.get(name) not in (None, 1):
            raise SteeringError(f"{name} must be 1 when a pipeline is steered, not {call[name]!r}: particles are the samples of a prompt")
    prompt = call.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list | tuple):
        return [str(text) for text in prompt]
    for name in ("prompt_embeds", "class_labels", "image", "control_image"):
        value = call.get(name)
        if isinstance(value, Tensor | list | tuple):
            return [""] * len(value)
    return [""] * int(call.get("batch_size") or 1)


def repeated(pipe: Any, call: Mapping[str, Any], prompts: int, particles: int) -> dict[str, Any]:
    """The call with every argument that belongs to prompts repeated for their particles, prompt-major."""
    parameters = inspect.signature(pipe.__call__).parameters
    made: dict[str, Any] = {}
    for name, value in call.items():
        if isinstance(value, str) and name == "prompt":
            value = [value]
        belongs = name not in PER_CALL and isinstance(value, list | tuple | Tensor) and _length(value) == prompts
        made[name] = _repeated(value, particles) if belongs else value
    latents = call.get("latents")
    if isinstance(latents, Tensor) and len(latents) == prompts:
        made["latents"] = latents.repeat_interleave(particles, 0)
    elif isinstance(latents, Tensor) and len(latents) != prompts * particles:
        raise SteeringError(
            f"latents must have {prompts} or {prompts * particles} rows, one for each prompt or particle, not {len(latents)}"
        )
    if "batch_size" in parameters and "prompt" not in parameters:
        made["batch_size"] = prompts * particles
    return made


def _length(value: Any) -> int:
    return len(value) if not isinstance(value, Tensor) or value.ndim else -1


def _repeated(value: Any, times: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, 0)
    return type(value)(entry for entry in value for _ in range(times))


@contextmanager
def encoded_once(pipe: Any, rows: int, particles: int, known: dict[Any, Any]) -> Iterator[None]:
    """Within the block the pipeline encodes every prompt once, however many rows it has.

    Args:
        pipe: Its `encode_prompt` is wrapped; a pipeline without one encodes the rows itself.
        rows: P x K.
        particles: K.
        known: Encodings of earlier calls with the same texts; new ones are added.
    """
    original = getattr(pipe, "encode_prompt", None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        def thinned(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                return value[::particles]
            return value[::particles] if isinstance(value, list | tuple) and len(value) == rows else value

        few, named = [thinned(value) for value in args], {name: thinned(value) for name, value in kwargs.items()}
        key = _key(few, named)
        if key is None or key not in known:
            found = original(*few, **named)
            if key is not None:
                known[key] = found
        else:
            found = known[key]
        return _spread(found, rows // particles, particles)

    own = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = encode
    try:
        yield
    finally:
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def _key(args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What tells an encoding of texts from another; None where tensors were given."""
    items = [*enumerate(args), *sorted(kwargs.items())]
    if any(isinstance(value, Tensor | dict) for _, value in items):
        return None
    return repr(items)


def _spread(found: Any, prompts: int, particles: int) -> Any:
    """Encodings with every row that belongs to a prompt repeated."""
    if isinstance(found, Tensor):
        positions = found.ndim == 2 and found.shape[-1] == 3  # of text tokens, as in Flux
        return found.repeat_interleave(particles, 0) if len(found) == prompts and not positions else found
    if isinstance(found, tuple):
        return tuple(_spread(entry, prompts, particles) for entry in found)
    if isinstance(found, list):
        return _repeated(found, particles) if len(found) == prompts else [_spread(entry, prompts, particles) for entry in found]
    return found


# -------------------------------------------------------------------------------------------------------- a denoiser's rows


def taken(value: Any, batch: int, index: Tensor, name: str = "") -> Any:
    """Arguments with the rows `index` of everything that has `batch` rows."""
    if name in PER_POSITION:
        return value
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: taken(entry, batch, index, str(key)) for key, entry in value.items()}
    if type(value) in (list, tuple):
        rowwise = all(isinstance(entry, Tensor) and entry.ndim and entry.shape[0] == batch for entry in value)
        if type(value) is list and len(value) == batch and not rowwise:
            return [value[i] for i in index.tolist()]
        return type(value)(taken(entry, batch, index) for entry in value)
    return value


def put_back(parts: list[Any], indices: list[Tensor], batch: int) -> Any:
    """A whole output of `batch` rows from outputs of some of its rows; the other rows are zeros."""
    first = parts[0]
    if isinstance(first, Tensor):
        if not first.ndim or first.shape[0] != len(indices[0]):
            return first
        whole = first.new_zeros(batch, *first.shape[1:])
        for part, index in zip(parts, indices, strict=True):
            whole.index_copy_(0, index.to(whole.device), part)
        return whole
    if type(first) is list and len(first) == len(indices[0]) and all(isinstance(entry, Tensor) for entry in first):
        rows: list[Tensor] = [torch.zeros_like(first[0])] * batch
        for part, index in zip(parts, indices, strict=True):
            for i, entry in zip(index.tolist(), part, strict=True):
                rows[i] = entry
        return rows
    if type(first) in (list, tuple):
        return type(first)(put_back(list(entries), indices, batch) for entries in zip(*parts, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: put_back([getattr(p, f.name) for p in parts], indices, batch) for f in fields(first)})
    return first


class LivingRows:
    """Computes the rows of the latents that are alive, in micro-batches, and counts them.

    Args:
        rows: R, of the latents; the denoiser is called with a whole number of times as many.
        meter: Is charged before anything is computed.
        micro_batch: Rows of the latents at a time; None for all.
        last: A row of every denoiser's output, by its id, from earlier calls; new ones are added.

    Attributes:
        alive: [R] bool. With no row alive the denoiser is not called, and its output means nothing.
        per_step: Denoiser rows that a row of the latents took in the last step.
    """

    def __init__(self, rows: int, meter: Meter, micro_batch: int | None = None, last: dict[int, Any] | None = None) -> None:
        self.rows, self.meter, self.micro_batch = rows, meter, micro_batch
        self.alive = torch.ones(rows, dtype=torch.bool)
        self.per_step = 0
        self._blocks = 0
        self._inside = False
        self.last = last if last is not None else {}

    def watching(self, denoisers: Mapping[str, nn.Module]) -> Any:
        """A context in which the denoisers compute living rows alone."""
        return intercept({module: self._handler(module) for module in denoisers.values()}, around=True)

    def stepped(self) -> None:
        """Says that the scheduler has made its step: the next call of the denoiser belongs to another."""
        self.per_step, self._blocks = self._blocks, 0

    def _handler(self, module: nn.Module) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._inside:  # a call that the acceleration makes by itself, for a trace
                return call(*args, **kwargs)
            latents = self._latents(module, args, kwargs)
            batch = len(latents)
            if batch % self.rows:
                raise SteeringError(
                    f"{type(module).__name__} is called with {batch} rows for {self.rows} latents, so particles cannot be told apart"
                )
            blocks = batch // self.rows
            living = self.alive.nonzero()[:, 0]
            if not len(living) and id(module) in self.last:
                return taken(self.last[id(module)], 1, torch.zeros(batch, dtype=torch.int64))  # nobody looks at it
            self.meter.charge(Cost(0 if self._blocks else len(living), len(living) * blocks))
            self._blocks += blocks
            self._inside = True
            try:
                with self.meter.timing("denoise"):
                    out = self._computed(call, args, kwargs, living, blocks)
                    synchronise(_tensor(out))
            finally:
                self._inside = False
            if id(module) not in self.last:
                self.last[id(module)] = taken(out, batch, torch.zeros(1, dtype=torch.int64))
            return out

        return handle

    def _computed(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], living: Tensor, blocks: int) -> Any:
        batch, parts = blocks * self.rows, micro_batches(len(living), self.micro_batch)
        if len(living) == self.rows and len(parts) == 1:
            return call(*args, **kwargs)
        indices = [torch.cat([living[part] + block * self.rows for block in range(blocks)]) for part in parts]
        outs = []
        for index in indices:
            some = {name: taken(value, batch, index, name) for name, value in kwargs.items()}
            outs.append(call(*(taken(value, batch, index) for value in args), **some))
        return put_back(outs, indices, batch)

    @staticmethod
    def _latents(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in (*args[:1], *kwargs.values()):
            if type(value) is list and value and all(isinstance(entry, Tensor) for entry in value):
                return value  # one tensor for each row, as Z-Image does it
            if isinstance(value, Tensor):
                break
        return tensors_of(args, kwargs)[latents_position(module, args, kwargs)]


def _tensor(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def with_generators(proceed: Callable[..., Any], given: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Gives a scheduler's step a generator for every row, where it takes one and the pipeline has forgotten it (flow pipelines do)."""
    if given.get("generator") is None and "generator" in inspect.signature(proceed).parameters:
        given["generator"] = generators


def permuted_state(owner: Any, index: Tensor, like: Tensor) -> None:
    """Lets the rows of a scheduler's history follow: every tensor, alone or in a list, with the latents' number of dimensions and rows."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == like.ndim and value.shape[0] == like.shape[0]:
            return value.index_select(0, index.to(value.device))
        if type(value) in (list, tuple):
            return type(value)(moved(entry) for entry in value)
        return value

    for name, value in vars(owner).items():
        if isinstance(value, Tensor | list | tuple):
            setattr(owner, name, moved(value))
