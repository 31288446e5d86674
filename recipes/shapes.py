"""Trains the `shapes` model from nothing: `python recipes/shapes.py`. See recipes/README.md for what was tried.

Five stages, each resumable (run the same command again), each writing to --work:

    vae       an AutoencoderKL that draws 64x64 pictures from 8x8x4 latents
    text      a T5 encoder with its own word tokenizer, taught to parse captions
    decoder   its decoder once more, on slightly wrong latents
    denoiser  a PixArtTransformer2DModel on those latents, epsilon prediction
    export    an unmodified PixArtAlphaPipeline in bf16, scored on unseen captions, and its card

Held-out combinations (`world.HELD_OUT_PAIRS`, `world.HELD_OUT_TRIPLES`) never occur in any stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import verify, world

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


# ---------------------------------------------------------------------------------------------------------- denoiser

STEPS, BATCH, RATE, EMA = 3_600, 128, 2e-3, 0.999
WIDTH, HEADS, LAYERS, ALIGN_AT = 192, 4, 7, 3
DROP_CAPTION = 0.1
POOL, REUSE, REFILL = 65_536, 5, 256
"""Latents are kept in a ring and each is seen about REUSE times before it is overwritten: the encoder costs less."""


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", prediction_type="epsilon"
    )


def new_denoiser() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=world.RESOLUTION // 8,
        patch_size=1,
        interpolation_scale=1,
        use_additional_conditions=False,
    )


def map_targets(scenes: world.Scenes) -> tuple[Tensor, Tensor]:
    """What stands at each of the 8x8 tokens: [B, 64, 3] classes (colour, shape, size; the last class is background)
    and [B, 64, 3] values (how much of the token is covered, offset to the object's centre).

    An inner layer of the denoiser is aligned with them while it trains (in the manner of REPA, arXiv 2410.06940, with
    the world's own truth in place of a vision model's features); the head that reads them is thrown away.
    """
    b = len(scenes.count)
    radius = torch.tensor(world.RADIUS)[scenes.size]
    cover = world.coverage(scenes.shape.flatten(), radius.flatten() / 4, scenes.centre.flatten(0, 1) / 4, 16)
    cover = F.avg_pool2d(cover.view(b, world.MAX_OBJECTS, 16, 16), 2).flatten(2)
    cover = cover * (torch.arange(world.MAX_OBJECTS) < scenes.count[:, None])[..., None]
    amount, owner = cover.max(1)
    empty = amount < 0.1

    def of_owner(values: Tensor, nothing: int) -> Tensor:
        return values.gather(1, owner).masked_fill(empty, nothing)

    classes = torch.stack(
        [of_owner(scenes.colour, len(world.COLOURS)), of_owner(scenes.shape, len(world.SHAPES)), of_owner(scenes.size, 2)], -1
    )
    axis = (torch.arange(8) + 0.5) * 8
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    offset = (scenes.centre.gather(1, owner[..., None].expand(-1, -1, 2)) - grid) / 8
    return classes, torch.cat([amount[..., None], offset.masked_fill(empty[..., None], 0.0)], -1)


MAP_CLASSES = (len(world.COLOURS) + 1, len(world.SHAPES) + 1, 3)


class Pool:
    """A ring of encoded scenes: latents, caption features and the map that goes with them."""

    def __init__(self, work: Path, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        vae = new_vae()
        vae.load_state_dict(torch.load(work / "vae.pt")["model"])
        self.encode = lambda scenes: vae.encode(world.render(scenes) * 2 - 1).latent_dist.mode()
        self.tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
        self.text = new_text_encoder(len(self.tokenizer))
        self.text.load_state_dict(torch.load(work / "text.pt")["model"])
        self.size, self.at = 0, 0
        self.rows: list[Tensor] = []
        self.null = self.features([""])
        self.scale = 1.0

    @torch.no_grad()
    def features(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenise(self.tokenizer, captions)
        mask = ids != 0
        return self.text(ids, attention_mask=mask.long()).last_hidden_state.bfloat16(), mask

    @torch.no_grad()
    def add(self, n: int) -> None:
        scenes = world.sample_scenes(n, self.generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.encode(scenes).float()
        rows = [latents, *self.features([str(c) for c in scenes.captions()]), *map_targets(scenes)]
        if not self.rows:
            self.rows = [torch.empty(POOL, *row.shape[1:], dtype=row.dtype) for row in rows]
        where = torch.arange(self.at, self.at + n) % POOL
        for ring, row in zip(self.rows, rows, strict=True):
            ring[where] = row
        self.at = (self.at + n) % POOL
        self.size = min(POOL, self.size + n)

    def batch(self, n: int) -> list[Tensor]:
        index = torch.randint(self.size, (n,), generator=self.generator)
        rows = [ring[index] for ring in self.rows]
        drop = torch.rand(n, generator=self.generator) < DROP_CAPTION
        rows[1][drop], rows[2][drop] = self.null
        return rows


def train_denoiser(work: Path) -> None:
    """Two processes of one thread each beat one process of two threads here, and share gradients by one reduction."""
    workers = max(1, len(os.sched_getaffinity(0)))
    if workers == 1:
        denoiser_worker(0, 1, work)
    else:
        torch.multiprocessing.spawn(denoiser_worker, args=(workers, work), nprocs=workers)


def denoiser_worker(rank: int, workers: int, work: Path) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29531")
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    torch.manual_seed(3)
    path, start = work / "denoiser.pt", 0
    model = new_denoiser()
    model.set_attn_processor(AttnProcessor())  # plain products: the fused kernel's backward is slow on short sequences
    head = torch.nn.Linear(WIDTH, sum(MAP_CLASSES) + 3)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("transformer_blocks") and "table" not in name]
    ids = {id(p) for p in hidden}
    rest = [p for p in [*model.parameters(), *head.parameters()] if id(p) not in ids]
    optimizers = [
        torch.optim.Muon(hidden, lr=RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    parameters = hidden + rest
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    scale = None
    if path.exists():
        state = torch.load(path)
        if "optimizers" not in state:
            return
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, start, scale = state["average"], state["step"], state["scale"]
    noise = torch.Generator().manual_seed(4_000_000 + 10 * start + rank)
    pool = Pool(work, 3_000_000 + 10 * start + rank)
    size = BATCH // workers
    for _ in range(8192 // REFILL):
        pool.add(REFILL)
    if scale is None:
        scale = 1.0 / pool.rows[0][: pool.size].std()
        if workers > 1:
            dist.all_reduce(scale)
            scale /= workers
        scale = round(scale.item(), 4)
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod
    middle: list[Tensor] = []
    model.transformer_blocks[ALIGN_AT].register_forward_hook(lambda module, args, out: middle.append(out))

    def losses(noisy: Tensor, timestep: Tensor, target: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        middle.clear()
        out = model(
            noisy,
            encoder_hidden_states=text,
            timestep=timestep,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        error = (out.float() - target).square().flatten(1).mean(1)
        return error, head(middle[0])

    compiled = torch.compile(losses)
    began = time.time()
    with progress() if rank == 0 else contextlib.nullcontext() as bar:
        task = bar.add_task("denoiser", total=STEPS, completed=start, note="") if bar else None
        for step in range(start, STEPS):
            if step % (REFILL * REUSE // size) == 0:
                pool.add(REFILL)
            latents, text, mask, classes, values = pool.batch(size)
            # Timesteps crowd where places, colours and shapes are decided; a fifth is spread evenly.
            spread = torch.sigmoid(torch.randn(size, generator=noise) - 0.1)
            even = torch.rand(size, generator=noise)
            timestep = (1000 * torch.where(torch.rand(size, generator=noise) < 0.2, even, spread)).long().clamp(0, 999)
            target = torch.randn(latents.shape, generator=noise)
            alpha = alphas[timestep].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * latents * scale + (1 - alpha).sqrt() * target
            with torch.autocast("cpu", torch.bfloat16):
                error, read = compiled(noisy, timestep, target, text, mask)
            snr = (alpha / (1 - alpha)).flatten()
            denoising = (error * snr.clamp(max=5.0) / snr).mean()
            *logits, numbers = read.float().split((*MAP_CLASSES, 3), -1)
            align = sum(F.cross_entropy(out.flatten(0, 1), classes[..., i].flatten()) for i, out in enumerate(logits))
            align = align + F.mse_loss(numbers, values)
            (denoising + 0.1 * align).backward()
            if workers > 1:
                flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                dist.all_reduce(flat)
                at = 0
                for p in parameters:
                    if p.grad is not None:
                        p.grad.copy_(flat[at : at + p.numel()].view_as(p) / workers)
                        at += p.numel()
            decay = min(1.0, (STEPS - step) / (0.3 * STEPS))  # constant, then linear to zero over the last 30%
            for optimizer, rate in zip(optimizers, (RATE, RATE / 2), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 200) * decay
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                keep = min(EMA, (step + 1) / (step + 10))
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - keep)
            if rank == 0:
                bar.update(task, advance=1, note=f"denoising {denoising.item():.4f} align {align.item():.4f}")
                if (step + 1) % 50 == 0:
                    per_step = (time.time() - began) / (step + 1 - start)
                    log(work, stage="denoiser", step=step + 1, denoising=denoising.item(), align=align.item(), seconds=per_step)
                if (step + 1) % 250 == 0 or step + 1 == STEPS:
                    done = {} if step + 1 == STEPS else {
                        "model": model.state_dict(), "head": head.state_dict(), "optimizers": [o.state_dict() for o in optimizers]
                    }  # fmt: skip
                    save(path, average=average, step=step + 1, scale=scale, **done)


# ------------------------------------------------------------------------------------------------------------ export

SAMPLING = {"num_inference_steps": 50, "guidance_scale": 3.0, "use_resolution_binning": False, "max_sequence_length": TEXT_LENGTH}
WEIGHTS = Path(__file__).resolve().parents[1] / "pipelines" / "zoo" / "weights" / "shapes"


def assemble(work: Path) -> PixArtAlphaPipeline:
    """The pipeline of the newest checkpoints, with averaged denoiser weights, in fp32."""
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    text = new_text_encoder(len(tokenizer))
    text.load_state_dict(torch.load(work / "text.pt")["model"])
    state = torch.load(work / "denoiser.pt")
    vae = new_vae()
    vae.load_state_dict(torch.load(work / ("decoder.pt" if (work / "decoder.pt").exists() else "vae.pt"))["model"])
    vae.register_to_config(scaling_factor=state["scale"])
    denoiser = new_denoiser()
    denoiser.load_state_dict(state["average"])
    return PixArtAlphaPipeline(tokenizer, text.eval(), vae.eval(), denoiser.eval(), new_scheduler())


def score(pipe: PixArtAlphaPipeline, captions: list[world.Caption], seed: int = 0, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 64, 64] of the captions and which are fully correct [N]: a noise of its own for each, bf16 autocast."""
    pictures = []
    for at in range(0, len(captions), batch):
        part = captions[at : at + batch]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed + at + i)) for i in range(len(part))])
        with torch.autocast("cpu", torch.bfloat16):
            out = pipe([str(c) for c in part], latents=noise, output_type="pt", clean_caption=False, **SAMPLING).images
        pictures.append(out.float())
    images = torch.cat(pictures)
    return images, verify(images, captions).correct


def export(work: Path, samples: int) -> None:
    """Saves the pipeline in bf16, scores what was saved, and writes its card."""
    state = torch.load(work / "denoiser.pt")
    pipe = assemble(work)
    scratch = WEIGHTS.with_name(".shapes.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    pipe.to(torch.bfloat16).save_pretrained(scratch)
    # transformers loads in the dtype that the config names, diffusers in fp32: they must agree when neither is told.
    config = json.loads((scratch / "text_encoder" / "config.json").read_text())
    (scratch / "text_encoder" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    recommended = {"steps": SAMPLING["num_inference_steps"], **{k: SAMPLING[k] for k in ("guidance_scale", "max_sequence_length")}}
    (scratch / "hasten.json").write_text(json.dumps(recommended, indent=2) + "\n")
    pipe = DiffusionPipeline.from_pretrained(scratch)
    pipe.set_progress_bar_config(disable=True)
    results: dict[str, Any] = {"step": state["step"], "samples": state["step"] * BATCH, "git": git_hash()}
    for name, held_out in (("unseen", False), ("held_out", True)):
        generator = torch.Generator().manual_seed(6_000_000 + held_out)
        captions = world.sample_scenes(samples, generator, held_out=held_out, placed=False).captions()
        images, correct = score(pipe, captions)
        verdict = verify(images, captions)
        counts = torch.tensor([len(caption.things) for caption in captions])
        results[name] = {
            "captions": samples,
            "correct": correct.float().mean().item(),
            "by_count": {str(n): correct[counts == n].float().mean().item() for n in (1, 2, 3)},
            "by_attribute": verdict.rates(),
        }
        log(work, stage="export", set=name, **results[name])
        print(name, json.dumps(results[name]))
    (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shutil.copy(work / "log.jsonl", scratch / "training_log.jsonl")
    (scratch / "README.md").write_text(card(results))
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    scratch.rename(WEIGHTS)


def git_hash() -> str:
    return (
        subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    )


CARD = """# shapes

A text-to-image diffusion transformer for a world whose truth can be checked exactly: an unmodified `PixArtAlphaPipeline`
(epsilon prediction, 8x8x4 latents of its own VAE, T5 encoder and tokenizer of its own), trained from nothing by
`recipes/shapes.py`.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("pipelines/zoo/weights/shapes")
caption = "a small red circle left of a blue square"
image = pipe(caption, num_inference_steps={steps}, guidance_scale={guidance}, use_resolution_binning=False).images[0]
```

Denoiser: {layers} blocks of width {width}, {trained} steps of {batch} pictures ({samples:,} in all), git {git}.
Figures: {steps}-step DDIM, guidance {guidance}, under bf16 autocast, judged by `hasten.pipelines.zoo.shapes.verify`.

| captions | number | fully correct | one object | two | three | objects | colour | shape | size | relation |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

The training log is `training_log.jsonl`; the figures are in `results.json`.
"""


def card(results: dict[str, Any]) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    rows = []
    for name, title in (("unseen", "never seen in training"), ("held_out", "held-out combinations")):
        row = results[name]
        attributes = [row["by_attribute"][key] for key in ("objects", "colour", "shape", "size", "relation")]
        cells = [row["correct"], *row["by_count"].values(), *attributes]
        rows.append(f"| {title} | {row['captions']} | " + " | ".join(f"{100 * cell:.1f}%" for cell in cells) + " |")
    return CARD.format(
        steps=SAMPLING["num_inference_steps"],
        guidance=SAMPLING["guidance_scale"],
        layers=LAYERS,
        width=WIDTH,
        trained=results["step"],
        batch=BATCH,
        samples=results["samples"],
        git=results["git"],
        rows="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints and log (default: %(default)s)")
    parser.add_argument("--stage", choices=("vae", "text", "decoder", "denoiser", "export"), help="only this stage")
    parser.add_argument("--samples", type=int, default=2048, help="captions that the export is scored on (default: %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[Path], None]] = {
        "vae": train_vae,
        "text": train_text,
        "decoder": train_decoder,
        "denoiser": train_denoiser,
        "export": lambda work: export(work, args.samples),
    }
    for name in [args.stage] if args.stage else stages:
        stages[name](args.work)


if __name__ == "__main__":
    main()
