"""What distillation is trained on: what a pipeline tells its denoiser for each caption, and clean latents, both from one first pass."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accelerators.caching.trace import config_hash, latents_position, weight_facts
from hasten.accelerators.dispatch import Call, intercept
from hasten.accelerators.distillation.grid import Grid
from hasten.pipelines.checkpoint import Checkpoint
from hasten.pipelines.particle_rows import PER_POSITION, default
from hasten.pipelines.scheduler_levels import SchedulerLevels

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHUNK = 7
"""Captions encoded at once: an unlikely number, by which the tensors that have a row for each are told from those that have none."""


class _Caught(Exception):
    """Stops a pipeline at its first denoiser call."""


@dataclass(frozen=True)
class Layout:
    """How a pipeline calls its denoiser.

    Attributes:
        latents: Name of the latents' argument.
        timestep: Name of the timestep's argument.
        dtype: Of the timestep.
        scale: What the denoiser is told, over the scheduler's timestep.
        shape: Of the latents of one row.
    """

    latents: str
    timestep: str
    dtype: torch.dtype
    scale: float
    shape: tuple[int, ...]

    def arguments(self, latents: Tensor, timesteps: Tensor, told: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Of a call for latents [B, ...] at the scheduler's timesteps [B]."""
        times = (timesteps.double() * self.scale).to(latents.device, self.dtype)
        return {**told, self.latents: latents.to(dtype), self.timestep: times}

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """The denoiser's prediction, without a learned variance."""
        found = output if isinstance(output, Tensor) else output[0]
        return found.chunk(2, 1)[0] if found.shape[1] == 2 * latents.shape[1] and found.ndim == latents.ndim else found


@dataclass(frozen=True)
class Encoded:
    """What the denoiser is told about C captions beside latents and timestep.

    Attributes:
        tree: Arguments by name; tensors with a row for each caption, and what is the same for all.
        rowwise: The paths of the former.
    """

    tree: dict[str, Any]
    rowwise: frozenset[str]

    def rows(self, index: Tensor, device: torch.device) -> dict[str, Any]:
        """The arguments for captions [B]."""
        return {name: self._cut(value, name, index, device) for name, value in self.tree.items()}

    def _cut(self, value: Any, path: str, index: Tensor, device: torch.device) -> Any:
        if isinstance(value, Mapping):
            return {key: self._cut(entry, f"{path}.{key}", index, device) for key, entry in value.items()}
        if isinstance(value, Tensor):
            return (value[index] if path in self.rowwise else value).to(device)
        return value


@dataclass(frozen=True)
class Examples:
    """The training set.

    Attributes:
        latents: [M, ...] clean latents, as the denoiser takes them, on the CPU.
        caption: [M] which of the encoded captions belongs to each.
        encoded: The captions.
        empty: The empty caption, where guidance is folded in.
        layout: How the denoiser is called.
    """

    latents: Tensor
    caption: Tensor
    encoded: Encoded
    empty: Encoded | None
    layout: Layout

    def hash(self) -> str:
        """Of the latents and of which caption each has."""
        digest = hashlib.sha256(self.latents.numpy().tobytes())
        digest.update(self.caption.numpy().tobytes())
        return digest.hexdigest()[:16]


def grid_of(pipe: Any, steps: int, top: int | None, shift: float | None) -> Grid:
    """The teacher's grid on the pipeline's own noise schedule.

    Raises:
        ValueError: `top` or `shift` is given where it means nothing, or the shift depends on the resolution and was not given.
        SteeringError: The scheduler's path is not known.
    """
    levels = SchedulerLevels(pipe.scheduler)
    config = pipe.scheduler.config
    if levels.kind == "flow":
        if top is not None:
            raise ValueError(f"top is a timestep of variance-preserving schedules and must be None for {levels.name}, not {top!r}")
        if shift is None and config.get("use_dynamic_shifting"):
            raise ValueError(f"shift must be given for {levels.name}, whose shift depends on the resolution: exp(mu) of the pictures' size")
        chosen = float(config.get("shift") or 1.0) if shift is None else shift
        return Grid.flow(steps, chosen, float(config.num_train_timesteps))
    if shift is not None:
        raise ValueError(f"shift belongs to flows and must be None for {levels.name}, not {shift!r}")
    if levels.kind != "variance-preserving":
        raise ValueError(
            f"{levels.name} scales its latents by the noise; give the pipeline a DDIMScheduler of the same configuration first"
        )
    return Grid.variance_preserving(pipe.scheduler.alphas_cumprod, steps, levels.prediction, top)


def grid_at(pipe: Any, timesteps: Sequence[float]) -> Grid:
    """The grid whose nodes are timesteps of the pipeline's noise schedule, and the clean sample.

    Raises:
        ValueError: The scheduler's path is not known.
    """
    levels = SchedulerLevels(pipe.scheduler)
    times = torch.tensor([0.0, *sorted(timesteps)], dtype=torch.float64)
    scale = float(pipe.scheduler.config.num_train_timesteps)
    if levels.kind == "flow":
        return Grid(times, 1 - times / scale, times / scale, "flow_prediction", scale)
    if levels.kind != "variance-preserving":
        raise ValueError(f"{levels.name} scales its latents by the noise; give the pipeline a DDIMScheduler of the same configuration")
    kept = torch.cat([torch.ones(1, dtype=torch.float64), pipe.scheduler.alphas_cumprod.double().cpu()[times[1:].long()]])
    return Grid(times.long(), kept.sqrt(), (1 - kept).sqrt(), levels.prediction, scale)


def examples_of(
    pipe: Any,
    name: str,
    network: nn.Module,
    data: Any,
    call: Mapping[str, Any],
    guidance: tuple[float, float],
    teacher_steps: int,
    seed: int,
    kept: Path | None = None,
) -> Examples:
    """Encodes the data, or draws samples of its prompts.

    Args:
        pipe: The pipeline.
        name: Of its denoiser.
        network: The denoiser.
        data: A folder, a `datasets` object, or prompts; see `hasten.distill`.
        call: Further arguments of the pipeline's call.
        guidance: Lowest and highest guidance scale of the teacher.
        teacher_steps: Of samples drawn from prompts.
        seed: Of those samples.
        kept: File that those samples are kept in; a run that goes on reads them.

    Raises:
        ValueError: There is nothing, captions lack pictures or pictures captions, or the pipeline's latents cannot be made of pictures.
    """
    embedded = bool(getattr(getattr(network, "config", None), "guidance_embeds", False))
    pictures, captions = None, None
    if isinstance(data, str | os.PathLike):
        pictures, captions = folder(Path(data))
    elif isinstance(data, Sequence) and all(isinstance(entry, str) for entry in data):
        captions = list(data)
        if not captions:
            raise ValueError("data has no prompts")
    else:
        pictures, captions = columns(data)
    unique = list(dict.fromkeys(captions))
    place = {caption: at for at, caption in enumerate(unique)}
    scale = guidance[0] if embedded else 1.0
    encoded, layout = encode(pipe, name, network, unique, call, scale)
    needs_empty = not embedded and guidance != (1.0, 1.0)
    empty = encode(pipe, name, network, [""], call, scale)[0] if needs_empty else None
    if empty is not None and _shapes(empty) != _shapes(encoded):
        raise ValueError(
            "the empty caption and the others are encoded to different lengths; say in call= to what length the pipeline pads "
            "(max_sequence_length, padding)"
        )
    if pictures is None:
        settings = {
            "call": dict(call),
            "guidance": guidance,
            "steps": teacher_steps,
            "seed": seed,
            "scheduler": dict(pipe.scheduler.config),
        }
        checkpoint = Checkpoint(kept, [config_hash(network), weight_facts(network), captions, settings])
        known = checkpoint.remember(
            "drawn", lambda: {"latents": drawn(pipe, captions, call, sum(guidance) / 2, teacher_steps, seed).numpy()}
        )
        latents = torch.from_numpy(known["latents"])
    else:
        latents = torch.cat([latents_of(pipe, picture, layout) for picture in pictures])
    if tuple(latents.shape[1:]) != layout.shape:
        raise ValueError(f"latents of the data are {list(latents.shape[1:])}, but the denoiser is given {list(layout.shape)}")
    return Examples(latents, torch.tensor([place[caption] for caption in captions]), encoded, empty, layout)


# --------------------------------------------------------------------------------------------------- what is said to the denoiser


@torch.no_grad()
def encode(
    pipe: Any, name: str, network: nn.Module, captions: Sequence[str], call: Mapping[str, Any], guidance: float
) -> tuple[Encoded, Layout]:
    """What the pipeline tells its denoiser about captions, learned from its first call, in which nothing is denoised.

    Raises:
        ValueError: The call cannot be understood.
    """
    trees, rowwise, layout = [], frozenset[str](), None
    for at in range(0, len(captions), CHUNK):
        part = list(captions[at : at + CHUNK])
        tree, rowwise, layout = _first_call(pipe, name, network, part + [part[-1]] * (CHUNK - len(part)), call, guidance)
        trees.append((tree, len(part)))
    assert layout is not None
    joined = {key: _joined([(tree[key], n) for tree, n in trees], key, rowwise) for key in trees[0][0]}
    return Encoded(joined, rowwise), layout


def _first_call(
    pipe: Any, name: str, network: nn.Module, prompts: list[str], call: Mapping[str, Any], guidance: float
) -> tuple[dict[str, Any], frozenset[str], Layout]:
    caught: dict[str, Any] = {}

    def stop(inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        caught.update(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
        caught.update(caught.pop("kwargs", {}))
        raise _Caught

    settings = {"guidance_scale": guidance} if default(pipe, "guidance_scale") is not None else {}
    try:
        with intercept({network: stop}):
            pipe(**{**settings, "num_inference_steps": 2, **call, "prompt": prompts})
    except _Caught:
        pass
    if not caught:
        raise ValueError(f"{type(pipe).__name__} finished without calling its {name}")
    position = latents_position(network, (), caught)
    if "timestep" not in caught or not isinstance(position, str):
        raise ValueError(f"{type(network).__name__} takes no timestep beside its latents: it cannot be distilled")
    latents, timestep = caught.pop(position), torch.as_tensor(caught.pop("timestep"))
    if len(latents) != len(prompts):
        raise ValueError(
            f"{type(pipe).__name__} calls its {name} with {len(latents)} rows for {len(prompts)} prompts at guidance {guidance:g}; say "
            "in call= how its guidance is switched off and that each prompt has one picture"
        )
    first = float(pipe.scheduler.timesteps[0])
    scale = float(timestep.flatten()[0]) / first
    known = next((whole for whole in (1.0, 1 / pipe.scheduler.config.num_train_timesteps) if abs(scale / whole - 1) < 2e-2), None)
    if known is None:
        told = float(timestep.flatten()[0])
        raise ValueError(f"{type(pipe).__name__} tells its {name} {told:g} at timestep {first:g}, no known scale")
    dtype = timestep.dtype if timestep.is_floating_point() else torch.int64
    kept = {key: value for key, value in caught.items() if value is not None or key == "added_cond_kwargs"}
    found: set[str] = set()
    tree = {key: _cpu(value, key, len(prompts), found) for key, value in kept.items()}
    return {**tree, "return_dict": False}, frozenset(found), Layout(position, "timestep", dtype, known, tuple(latents.shape[1:]))


def _cpu(value: Any, path: str, rows: int, found: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _cpu(entry, f"{path}.{key}", rows, found) for key, entry in value.items()}
    if isinstance(value, Tensor):
        if value.ndim and len(value) == rows and path not in PER_POSITION:
            found.add(path)
        return value.detach().cpu()
    return value


def _joined(parts: list[tuple[Any, int]], path: str, rowwise: frozenset[str]) -> Any:
    first = parts[0][0]
    if isinstance(first, Mapping):
        return {key: _joined([(value[key], n) for value, n in parts], f"{path}.{key}", rowwise) for key in first}
    if path not in rowwise:
        return first
    if len({tuple(value.shape[1:]) for value, _ in parts}) > 1:
        raise ValueError(
            f"captions are encoded to different lengths ({path}); say in call= to what length it pads (max_sequence_length, padding)"
        )
    return torch.cat([value[:n] for value, n in parts])


def _shapes(encoded: Encoded) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                visit(entry, f"{path}.{key}")
        elif path in encoded.rowwise:
            found[path] = tuple(value.shape[1:])

    for key, value in encoded.tree.items():
        visit(value, key)
    return found


# ------------------------------------------------------------------------------------------------------------------ the pictures


def folder(path: Path) -> tuple[list[Any], list[str]]:
    """Paths of the pictures in a folder, and their captions.

    Raises:
        ValueError: There is none, a caption has no picture, or a picture has no caption.
    """
    if not path.is_dir():
        raise ValueError(f"data must be a folder, prompts or a dataset; {path} is no folder")
    listing = path / "metadata.jsonl"
    if listing.is_file():
        entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        said = {path / str(entry["file_name"]): str(entry["text"]) for entry in entries}
        missing = [str(file.relative_to(path)) for file in said if not file.is_file()]
    else:
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        texts = {file.stem: file for file in sorted(path.glob("*.txt"))}
        stems = {file.stem for file in pictures}
        missing = [file.name for stem, file in texts.items() if stem not in stems]
        bare = [file.name for file in pictures if file.stem not in texts]
        if pictures and bare:
            raise ValueError(f"{path}: {len(bare)} pictures have no caption, {bare[0]} the first; put NAME.txt beside NAME.png")
        said = {file: texts[file.stem].read_text(encoding="utf-8").strip() for file in pictures}
    if missing:
        raise ValueError(f"{path}: {len(missing)} captions have no picture, {missing[0]} the first; captions alone are passed as prompts")
    if not said:
        raise ValueError(f"{path} holds no pictures with captions: NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text")
    return list(said), list(said.values())


def columns(data: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Pictures and captions of a `datasets` object, or of anything that yields mappings with `image` and `text`.

    Raises:
        ValueError: It is empty, or an entry lacks one of them.
    """
    pictures, captions = [], []
    for at, entry in enumerate(data):
        for column in ("image", "text"):
            if not isinstance(entry, Mapping) or entry.get(column) is None:
                have = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
                raise ValueError(f"entry {at} of the data has no {column!r}, only {have}")
        pictures.append(entry["image"])
        captions.append(str(entry["text"]))
    if not pictures:
        raise ValueError("data is empty")
    return pictures, captions


@torch.no_grad()
def latents_of(pipe: Any, picture: Any, layout: Layout) -> Tensor:
    """Clean latents [1, ...] of a picture, cut to a square of the pipeline's size in its middle."""
    from PIL import Image

    vae = getattr(pipe, "vae", None)
    if vae is None or len(layout.shape) != 3 or layout.shape[0] != vae.config.latent_channels:
        raise ValueError(
            f"how {type(pipe).__name__} makes latents {list(layout.shape)} of pictures is not known; pass prompts, and it draws samples"
        )
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (side * factor for side in layout.shape[1:])
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    ratio = max(height / pixels.shape[2], width / pixels.shape[3])
    size = max(height, round(pixels.shape[2] * ratio)), max(width, round(pixels.shape[3] * ratio))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width].clamp(-1, 1)
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    scaling = float(vae.config.scaling_factor or 1.0)
    if mean is not None and std is not None:
        around, by = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return (latents - around) * scaling / by
    return (latents - float(getattr(vae.config, "shift_factor", None) or 0.0)) * scaling


@torch.no_grad()
def drawn(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any], guidance: float, steps: int, seed: int) -> Tensor:
    """The pipeline's own samples of prompts [M, ...], latents, each from a noise of its own."""
    settings = {"guidance_scale": guidance} if default(pipe, "guidance_scale") is not None else {}
    made = []
    for at in range(0, len(prompts), CHUNK):
        part = list(prompts[at : at + CHUNK])
        generators = [torch.Generator().manual_seed(seed + at + i) for i in range(len(part))]
        arguments = {**settings, "num_inference_steps": steps, **call, "generator": generators, "output_type": "latent"}
        made.append(pipe(part, **arguments)[0].float().cpu())
    return torch.cat(made)
