"""Tunes a distilled pipeline towards a preference or a reward, without its teacher: `hasten.tune` goes on with a step LoRA's adapters.

    lora = hasten.StepLoRA.load("runs/steps")
    tuned = hasten.tune(pipe, lora, prompts, hasten.OnlinePSO(), reward=hasten.Brightness(), steps=200, output="runs/brighter")

What the adapters were before is the reference, so that the student stays one of few steps. The reward is any verifier or callable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators.distillation.adapters import Adapters, LoRA
from hasten.accelerators.distillation.grid import Denoiser, Grid
from hasten.accelerators.distillation.method import TuningMethod, TuningTask
from hasten.accelerators.distillation.pso import drawn_trajectory
from hasten.accelerators.steering.verifiers import Verifier, as_verifier, checked_score
from hasten.pipelines.checkpoint import Checkpoint
from hasten.pipelines.distillation_data import Encoded, encode, grid_at, latents_of
from hasten.pipelines.distilling import adapted
from hasten.pipelines.latent_decoding import Decode, decoder_of
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.training import Optimised, Settings, Training

PAIRS = "pairs.npz"
"""Of the student as it began, where there are prompts only."""
MOST_USUAL = 4
"""Steps that are tuned by default, where the adapters are for so many."""


def tune(
    pipe: Any,
    lora: StepLoRA,
    data: str | os.PathLike[str] | Sequence[str],
    method: TuningMethod,
    *,
    steps: int,
    output: str | os.PathLike[str],
    reward: Verifier | Callable[..., Tensor] | None = None,
    sampled_in: int | None = None,
    merged: bool = False,
    call: Mapping[str, Any] | None = None,
    sample_prompts: Sequence[str] = (),
    resume: bool = True,
    progress: bool = True,
    **settings: Any,
) -> StepLoRA:
    """Goes on training a step LoRA.

    Args:
        pipe: The diffusers pipeline that the adapters are for. It is left as it was.
        lora: The adapters; they are not changed.
        data: Prompts; for a method that learns from given pairs (`OfflinePSO`) also a folder whose `metadata.jsonl` has `preferred`,
            `rejected` (files) and `text`. With prompts such a method's pairs are drawn by the student first, two samples of each prompt.
        method: `OnlinePSO`, `OfflinePSO` or `RewardFeedback`.
        steps: Optimiser steps.
        output: Folder for the adapters, the checkpoint, the log and the sample grids.
        reward: Of pictures in 0 to 1 and their prompts, higher is better; not needed with given pairs.
        sampled_in: Number of steps that is tuned; by default 4, or the most that the adapters are for.
        merged: See `LoRA`.
        call, sample_prompts, resume, progress: As for `hasten.distill`.
        settings: Of `hasten.pipelines.training.Settings`, but for those of the teacher's grid.

    Returns:
        The tuned adapters, saved in `output`.

    Raises:
        ValueError: The adapters are for another base or other steps, there is no reward or one without gradients where they are needed, no
            two samples differ in it, a setting is out of range, or the checkpoint is of a run with other settings.
        ImportError: peft is not installed.
    """
    if not isinstance(method, TuningMethod):
        raise ValueError(f"method must be OnlinePSO(), OfflinePSO() or RewardFeedback(), not {type(method).__name__}")
    given = method.from_pairs and isinstance(data, str | os.PathLike)
    if reward is None and not given:
        raise ValueError("reward must be given: a verifier, or a function of images in 0 to 1 and their prompts")
    if not given and (isinstance(data, str | os.PathLike) or not list(data)):
        raise ValueError(f"data must be prompts for {type(method).__name__}, at least one, not {data!r}")
    for name in ("grid_steps", "top", "shift"):
        if name in settings:
            raise ValueError(f"{name} must be left out: the adapters say which timesteps they are for")
    if sampled_in is None:
        sampled_in = MOST_USUAL if MOST_USUAL in lora.steps else lora.steps[-1]
    lora.timesteps(sampled_in)
    run = Tuning(
        pipe, Settings(steps=steps, **settings), Path(output), adapted(LoRA(lora.rank, None, merged), lora), lora.denoiser,
        dict(call or {}), lora, data, method, None if reward is None else as_verifier(reward), sampled_in,
    )  # fmt: skip
    return run(tuple(sample_prompts), resume, progress)


@dataclass
class Tuning(Training):
    """One training; arguments as for `tune`."""

    reward: Verifier | None
    sampled_in: int
    encoded: Encoded = field(init=False)
    captions: list[str] = field(init=False)
    pairs: tuple[Tensor, Tensor] | None = None

    def _grid(self) -> Grid:
        assert self.start is not None
        return grid_at(self.pipe, self.start.timesteps(self.sampled_in))

    def _facts(self, network: nn.Module) -> dict[str, Any]:
        assert self.start is not None
        return {**self.start.facts, "method": self._told_method()}

    def _read(self, network: nn.Module) -> str:
        listed: list[dict[str, str]] = []
        folder = Path(self.data) if isinstance(self.data, str | os.PathLike) else None
        if folder is not None:
            listed = listed_pairs(folder)
        self.captions = [entry["text"] for entry in listed] or list(self.data)
        assert self.start is not None
        scale = self.start.guidance[0] if self.start.facts["embedded"] else 1.0
        self.encoded, self.layout = encode(self.pipe, self.name, network, self.captions, self.call, scale)
        self.decode: Decode = decoder_of(self.pipe, self.call)
        digest = hashlib.sha256("\0".join(self.captions).encode())
        if folder is not None:
            both = [torch.cat([latents_of(self.pipe, folder / entry[side], self.layout) for entry in listed]) for side in SIDES]
            self.pairs = both[0], both[1]
            for latents in both:
                digest.update(latents.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _begin(self, adapters: Adapters) -> list[Optimised]:
        assert self.start is not None
        # Multiplied in once: the reference never changes.
        with torch.no_grad():
            factors = {name: factor.to(self.device) for name, factor in self.start.factors.items()}
            self.reference = self._with(adapters, {name: factor.float() for name, factor in factors.items()})
        if self.method.from_pairs and self.pairs is None:
            about = [self.start.hash, self.captions, self.settings.seed, self.sampled_in]
            kept = Checkpoint(self.output / PAIRS, about).remember("drawn", self._drawn_pairs)
            rows = torch.from_numpy(kept["caption"])
            self.captions = [self.captions[i] for i in rows.tolist()]
            self.encoded = Encoded(self.encoded.rows(rows, torch.device("cpu")), self.encoded.rowwise)
            self.pairs = torch.from_numpy(kept["preferred"]), torch.from_numpy(kept["rejected"])
        return []

    @torch.no_grad()
    def _drawn_pairs(self) -> dict[str, Any]:
        """Of two samples of each prompt, the one that the reward prefers and the other; none of those that it holds equal."""
        assert self.reward is not None
        made: list[list[Tensor]] = [[], []]
        for side in (0, 1):
            for at in range(0, len(self.captions), self.settings.batch_size):
                generator = self._randomness(-1 - at, 1 + side)
                index = torch.arange(at, min(at + self.settings.batch_size, len(self.captions)))
                noise = torch.randn(len(index), *self.layout.shape, generator=generator, device=self.device)
                told = self.encoded.rows(index, self.device)
                nodes = list(range(self.grid.steps, 0, -1))
                made[side].append(drawn_trajectory(self.reference, noise, told, self.grid, nodes, generator).x0)
        first, second = torch.cat(made[0]), torch.cat(made[1])
        scores = []
        for samples in (first, second):
            parts = zip(samples.split(self.settings.batch_size), _split(self.captions, self.settings.batch_size), strict=True)
            scores.append(torch.cat([checked_score(self.reward, self.decode(latents), told) for latents, told in parts]))
        better = scores[0] > scores[1]
        rows = (scores[0] != scores[1]).nonzero()[:, 0]
        if not len(rows):
            raise ValueError("the reward prefers neither of the two samples of any prompt: nothing can be learned from it")
        where = better.view(-1, *[1] * (first.ndim - 1))
        preferred, rejected = torch.where(where, first, second), torch.where(where, second, first)
        return {"caption": rows.cpu().numpy(), "preferred": preferred[rows].cpu().numpy(), "rejected": rejected[rows].cpu().numpy()}

    def _step(self, step: int, student: Optimised, adapters: Adapters) -> tuple[float, str]:
        loss = self.method.tuning_loss(self._task(step, adapters))
        student.step(loss, self.settings.rate(step))
        return loss.item(), type(self.method).__name__

    def _task(self, step: int, adapters: Adapters) -> TuningTask:
        generator, rows = self._randomness(step), self.settings.batch_size
        index = torch.randint(len(self.captions), (rows,), generator=generator, device=self.device).cpu()
        noise = torch.randn(rows, *self.layout.shape, generator=generator, device=self.device)
        told, prompts = self.encoded.rows(index, self.device), [self.captions[i] for i in index.tolist()]
        pairs = None if self.pairs is None else (self.pairs[0][index].to(self.device), self.pairs[1][index].to(self.device))
        reference: Denoiser = self.reference
        return TuningTask(self._student(adapters), reference, noise, told, prompts, self.grid, generator, self.decode, self.reward, pairs)


SIDES = ("preferred", "rejected")


def listed_pairs(folder: Path) -> list[dict[str, str]]:
    """What a folder's `metadata.jsonl` lists.

    Raises:
        ValueError: There is none, it is empty, or an entry lacks something or names a file that is not there.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(f"data must be prompts, or a folder whose metadata.jsonl lists preferred, rejected and text; {folder} has none")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not entries:
        raise ValueError(f"{path} is empty")
    for number, entry in enumerate(entries, 1):
        for key in (*SIDES, "text"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{path}, entry {number} has no {key!r}")
        for side in SIDES:
            if not (folder / entry[side]).is_file():
                raise ValueError(f"{path}, entry {number}: there is no file {entry[side]}")
    return entries


def _split(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
