"""What the recipes share: how checkpoints, logs and exports are written, and Muon with averaged weights; and of the three `shapes` models
the VAE and the text encoder with its tokenizer.

    vae       an AutoencoderKL that draws 64x64 pictures from 8x8x4 latents
    text      a T5 encoder with its own word tokenizer, taught to parse captions
    decoder   the VAE's decoder once more, on slightly wrong latents

Held-out combinations (`world.HELD_OUT_PAIRS`, `world.HELD_OUT_TRIPLES`) never occur in any stage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import world

SHARED = Path("runs/shapes")
"""Checkpoints of what is shared."""

LATENT_CHANNELS = 4


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    )


def save(path: Path, **state: object) -> None:
    """Writes a checkpoint so that an interrupted run leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    os.replace(scratch, path)


def log(work: Path, **row: object) -> None:
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **row}) + "\n")


def run_stages(
    parser: argparse.ArgumentParser, stages: Mapping[str, Callable[[argparse.Namespace], None]], folders: Iterable[Path]
) -> None:
    """The end of a recipe's command line: adds `--stage`, makes the folders that checkpoints go into, and runs what was asked for."""
    parser.add_argument("--stage", choices=(*stages, "all"), default="all", help="only this stage (default: %(default)s)")
    args = parser.parse_args()
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name in stages if args.stage == "all" else [args.stage]:
        stages[name](args)


@contextmanager
def replacing(weights: Path) -> Iterator[Path]:
    """A folder to be filled. It takes the place of `weights` at the end; an export that fails leaves the old one."""
    scratch = weights.with_name(f".{weights.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    yield scratch
    shutil.rmtree(weights, ignore_errors=True)
    scratch.rename(weights)


def describe(folder: Path, work: Path, results: Mapping[str, Any], card: str) -> None:
    """Writes what stands beside exported weights: the figures, the training log of `work`, the card."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shutil.copy(work / "log.jsonl", folder / "training_log.jsonl")
    (folder / "README.md").write_text(card)


# ---------------------------------------------------------------------------------------------------------- optimiser

EMA = 0.999


class Training:
    """Muon for the matrices of the blocks and AdamW for the rest, and the average of the weights over time, which is what ships.

    The rate rises over the first steps, stays, and falls linearly to zero at the end.

    Args:
        path: Of the checkpoint; what it holds is taken up.
        parts: What is trained, by its name in the checkpoint. The first one's weights are averaged.
        hidden: The parameters of `parts` that Muon trains.
        steps: Of the whole training.
        rate: Of Muon; AdamW's is half of it.
        falling: Share of the steps over which the rate falls.
        warmup: Steps over which it rises.

    Attributes:
        start: The first step that is left.
        finished: Whether the checkpoint is that of a training that came to its end.
        state: The checkpoint, {} before the first.
        average: The averaged weights.
    """

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, nn.Module],
        hidden: Iterable[nn.Parameter],
        *,
        steps: int,
        rate: float,
        falling: float,
        warmup: int = 100,
    ) -> None:
        self.path, self.parts, self.hidden = path, dict(parts), list(hidden)
        self.steps, self.falling, self.warmup = steps, falling, warmup
        self.model = next(iter(self.parts.values()))
        ids = {id(p) for p in self.hidden}
        self.rest = [p for part in self.parts.values() for p in part.parameters() if id(p) not in ids]
        self.rates = (rate, rate / 2)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.hidden, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self.rest, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.start = 0
        self.state: dict[str, Any] = torch.load(path) if path.exists() else {}
        self.finished = bool(self.state) and "optimizers" not in self.state
        if self.state and not self.finished:
            for name, part in self.parts.items():
                part.load_state_dict(self.state[name])
            for optimizer, saved in zip(self.optimizers, self.state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.average, self.start = self.state["average"], self.state["step"]

    def step(self, step: int) -> None:
        """Takes a step along the gradients that are there, and clears them."""
        decay = min(1.0, (self.steps - step) / (self.falling * self.steps))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / self.warmup) * decay
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            keep = min(EMA, (step + 1) / (step + 10))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)

    def save(self, done: int, **more: object) -> None:
        """Writes the checkpoint after `done` steps; after the last one nothing that only going on would need."""
        going_on = {name: part.state_dict() for name, part in self.parts.items()}
        left = {} if done == self.steps else {**going_on, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        save(self.path, average=self.average, step=done, **left, **more)


# --------------------------------------------------------------------------------------------------------------- vae

VAE_STEPS, VAE_BATCH, VAE_RATE = 1700, 32, 1.2e-3
VAE_SIGMA = 0.08
"""Standard deviation of a pixel under the decoder: how much error costs as much as one nat of latent code."""


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.RESOLUTION,
        mid_block_add_attention=False,
    )
    # The posterior starts narrow, else the code collapses to the prior before the decoder has learned to read it.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -5.0)
    return vae.to(memory_format=torch.channels_last)


def train_vae(work: Path) -> None:
    torch.manual_seed(1)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    path, start = work / "vae.pt", 0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        if "optimizer" not in state:
            return
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def losses(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode(pictures).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / pictures[0].numel()
        return F.mse_loss(out, pictures), F.l1_loss(out, pictures), kl

    with progress() as bar:
        task = bar.add_task("vae", total=VAE_STEPS, completed=start, note="")
        for step in range(start, VAE_STEPS):
            generator = torch.Generator().manual_seed(1_000_000 + step)
            pictures = world.render(world.sample_scenes(VAE_BATCH, generator)) * 2 - 1
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                mse, l1, kl = losses(pictures)
            # Pixels are in [-1, 1] here, hence the factor 2 on sigma.
            loss = mse / (2 * (2 * VAE_SIGMA) ** 2) + l1 + min(1.0, max(0.0, (step - 500) / 700)) * kl
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = VAE_RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / VAE_STEPS)))
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, note=f"mse {mse.item():.4f} l1 {l1.item():.4f}")
            if (step + 1) % 100 == 0:
                save(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                log(work, stage="vae", step=step + 1, mse=mse.item(), l1=l1.item(), kl=kl.item() * pictures[0].numel())
    save(path, model=vae.state_dict(), step=VAE_STEPS)


DECODER_STEPS, DECODER_BATCH, DECODER_RATE, DECODER_NOISE = 1600, 32, 6e-4, 0.25


def train_decoder(work: Path) -> None:
    """Trains the decoder on, on latents that are off by a little: a denoiser's latents are, and shapes should be crisp all the same.

    The encoder stays, so this may run before, beside or after the denoiser.
    """
    torch.manual_seed(5)
    vae = new_vae()
    vae.load_state_dict(torch.load(work / "vae.pt")["model"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=DECODER_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    path, start = work / "decoder.pt", 0
    if path.exists():
        state = torch.load(path)
        if "optimizer" not in state:
            return
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    with progress() as bar:
        task = bar.add_task("decoder", total=DECODER_STEPS, completed=start, note="")
        for step in range(start, DECODER_STEPS):
            generator = torch.Generator().manual_seed(5_000_000 + step)
            pictures = world.render(world.sample_scenes(DECODER_BATCH, generator)) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    latents = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mode().float()
                amount = DECODER_NOISE * torch.rand(DECODER_BATCH, 1, 1, 1, generator=generator)
                latents = latents + amount * latents.std() * torch.randn(latents.shape, generator=generator)
                out = vae.decode(latents).sample.float()
            loss = F.mse_loss(out, pictures) + 0.3 * F.l1_loss(out, pictures)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = (
                    DECODER_RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / DECODER_STEPS)))
                )
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, note=f"loss {loss.item():.4f}")
            if (step + 1) % 100 == 0:
                save(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                log(work, stage="decoder", step=step + 1, loss=loss.item())
    save(path, model=vae.state_dict(), step=DECODER_STEPS)


# -------------------------------------------------------------------------------------------------------------- text

TEXT_STEPS, TEXT_BATCH, TEXT_RATE, TEXT_WIDTH, TEXT_LENGTH = 500, 256, 2e-3, 128, 20


def new_tokenizer() -> T5Tokenizer:
    words = sorted({w for part in (world.SIZES, world.COLOURS, world.SHAPES, world.RELATIONS) for p in part for w in p.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -1.0) for word in ["a", "and", *words]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def parse_targets(scenes: world.Scenes, ids: Tensor, tokenizer: T5Tokenizer) -> tuple[Tensor, Tensor]:
    """What the encoder must know at every token: [B, length, 7] class indices and their mask.

    Classes: index, colour, shape and size (2 = unsaid) of the object the token speaks of, the number of objects, and
    both relations (4 = none).
    """
    shape_ids = torch.tensor([tokenizer.convert_tokens_to_ids("▁" + name) for name in world.SHAPES])
    ends = torch.isin(ids, shape_ids).int()
    index = (ends.cumsum(1) - ends).clamp(max=world.MAX_OBJECTS - 1)
    size = torch.where(scenes.size_said, scenes.size, 2)
    own = [index, scenes.colour.gather(1, index), scenes.shape.gather(1, index), size.gather(1, index)]
    none = torch.arange(2) + 2 > scenes.count[:, None]
    relation = scenes.relation.masked_fill(none, 4)
    whole = [(scenes.count - 1)[:, None].expand_as(ids), *(relation[:, i, None].expand_as(ids) for i in range(2))]
    return torch.stack([*own, *whole], -1), ids > 1


PARSE_CLASSES = (3, len(world.COLOURS), len(world.SHAPES), 3, 3, 5, 5)


def tokenise(tokenizer: T5Tokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text(work: Path) -> None:
    """Teaches the encoder to parse: the denoiser then finds colours bound to their objects and need not learn grammar."""
    torch.manual_seed(2)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    encoder = new_text_encoder(len(tokenizer))
    head = torch.nn.Linear(TEXT_WIDTH, sum(PARSE_CLASSES))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TEXT_RATE, weight_decay=0.01)
    path, start = work / "text.pt", 0
    if path.exists():
        state = torch.load(path)
        if "optimizer" not in state:
            return
        encoder.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    with progress() as bar:
        task = bar.add_task("text", total=TEXT_STEPS, completed=start, note="")
        for step in range(start, TEXT_STEPS):
            generator = torch.Generator().manual_seed(2_000_000 + step)
            scenes = world.sample_scenes(TEXT_BATCH, generator, placed=False)
            ids = tokenise(tokenizer, [str(caption) for caption in scenes.captions()])
            targets, mask = parse_targets(scenes, ids, tokenizer)
            with torch.autocast("cpu", torch.bfloat16):
                features = encoder(ids, attention_mask=(ids != 0).long()).last_hidden_state
            logits = head(features.float()).split(PARSE_CLASSES, -1)
            loss = sum(F.cross_entropy(out[mask], targets[..., i][mask]) for i, out in enumerate(logits))
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = TEXT_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / TEXT_STEPS))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, note=f"loss {loss.item():.4f}")
            if (step + 1) % 250 == 0:
                wrong = [(out.argmax(-1) != targets[..., i])[mask].float().mean().item() for i, out in enumerate(logits)]
                save(path, model=encoder.state_dict(), head=head.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                log(work, stage="text", step=step + 1, loss=loss.item(), wrong=wrong)
    save(path, model=encoder.state_dict(), step=TEXT_STEPS)
