"""Trains a denoiser of the `shapes` world in latents of the shared VAE, and exports an unmodified diffusers pipeline.

A model is a subclass of `Denoising`: how the network is built, noised, called and put into a pipeline. Everything else is the same
for all of them: the pool of encoded scenes, two processes that share gradients, Muon and AdamW, averaged weights, checkpoints, the
verifier's score and the card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import shared
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel, T5Tokenizer

from hasten.pipelines.zoo.shapes import verify, world

DROP_CAPTION = 0.1
POOL, REUSE, REFILL = 65_536, 5, 256
"""Latents are kept in a ring and each is seen about REUSE times before it is overwritten: the encoder costs less."""

ZOO = Path(__file__).resolve().parents[1] / "pipelines" / "zoo" / "weights"


class Denoising(ABC):
    """One model: what differs between the three.

    Attributes:
        name: Of the model that ships; checkpoints lie in runs/NAME.
        steps, batch, rate: Of the optimiser.
        align_width: Channels of `watched`'s tokens.
        sampling: Arguments of the pipeline's call that the model is judged with.
        summary: One paragraph for the card, after the name.
    """

    name: ClassVar[str]
    steps: ClassVar[int] = 3_600
    batch: ClassVar[int] = 128
    rate: ClassVar[float] = 2e-3
    port: ClassVar[int] = 29_531
    align_width: ClassVar[int]
    sampling: ClassVar[dict[str, Any]]
    call: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def network(self) -> nn.Module:
        """The denoiser, untrained."""

    @abstractmethod
    def watched(self, network: nn.Module) -> nn.Module:
        """The inner layer whose output is aligned with the world's map."""

    @abstractmethod
    def tokens(self, out: Any) -> Tensor:
        """The 64 picture tokens [B, 64, align_width] in the output of `watched`."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, the times that the network is told, its target, and the weight [B] of each sample; u [B] is from 0 to 1."""

    @abstractmethod
    def predict(self, network: nn.Module, noisy: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The network's answer, of the shape of `noisy`."""

    @abstractmethod
    def pipeline(self, tokenizer: T5Tokenizer, text: T5EncoderModel, vae: AutoencoderKL, network: nn.Module) -> DiffusionPipeline:
        """The pipeline that ships."""

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Times [n] from 0 to 1: they crowd where places, colours and shapes are decided; a fifth is spread evenly."""
        crowded = torch.sigmoid(torch.randn(n, generator=generator) - 0.1)
        even = torch.rand(n, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < 0.2, even, crowded)

    def by_muon(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains it, and not AdamW: the matrices of the blocks."""
        return parameter.ndim == 2 and "blocks" in name and "table" not in name


# ------------------------------------------------------------------------------------------------------------- the data


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

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        vae = shared.new_vae()
        vae.load_state_dict(torch.load(shared.SHARED / "vae.pt")["model"])
        self.encode = lambda scenes: vae.encode(world.render(scenes) * 2 - 1).latent_dist.mode()
        self.tokenizer = T5Tokenizer.from_pretrained(shared.SHARED / "tokenizer")
        self.text = shared.new_text_encoder(len(self.tokenizer))
        self.text.load_state_dict(torch.load(shared.SHARED / "text.pt")["model"])
        self.size, self.at = 0, 0
        self.rows: list[Tensor] = []
        self.null = self.features([""])

    @torch.no_grad()
    def features(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = shared.tokenise(self.tokenizer, captions)
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


# ------------------------------------------------------------------------------------------------------------- training


def train(recipe: Denoising) -> None:
    """Two processes of one thread each beat one process of two threads here, and share gradients by one reduction."""
    workers = max(1, len(os.sched_getaffinity(0)))
    if workers == 1:
        worker(0, 1, recipe)
    else:
        torch.multiprocessing.spawn(worker, args=(workers, recipe), nprocs=workers)


def worker(rank: int, workers: int, recipe: Denoising) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(recipe.port))
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    torch.manual_seed(3)
    work = Path("runs") / recipe.name
    model = recipe.network()
    head = torch.nn.Linear(recipe.align_width, sum(MAP_CLASSES) + 3)
    hidden = [p for name, p in model.named_parameters() if recipe.by_muon(name, p)]
    training = shared.Training(
        work / "denoiser.pt", {"model": model, "head": head}, hidden, steps=recipe.steps, rate=recipe.rate, falling=0.3, warmup=200
    )
    if training.finished:
        return
    parameters, start, scale = training.hidden + training.rest, training.start, training.state.get("scale")
    noise = torch.Generator().manual_seed(4_000_000 + 10 * start + rank)
    pool = Pool(3_000_000 + 10 * start + rank)
    size = recipe.batch // workers
    for _ in range(8192 // REFILL):
        pool.add(REFILL)
    if scale is None:
        scale = 1.0 / pool.rows[0][: pool.size].std()
        if workers > 1:
            dist.all_reduce(scale)
            scale /= workers
        scale = round(scale.item(), 4)
    middle: list[Any] = []
    recipe.watched(model).register_forward_hook(lambda module, args, out: middle.append(out))

    def losses(noisy: Tensor, times: Tensor, target: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        middle.clear()
        out = recipe.predict(model, noisy, times, text, mask)
        error = (out.float() - target).square().flatten(1).mean(1)
        return error, head(recipe.tokens(middle[0]))

    compiled = torch.compile(losses)
    began = time.time()
    with shared.progress() if rank == 0 else contextlib.nullcontext() as bar:
        task = bar.add_task(recipe.name, total=recipe.steps, completed=start, note="") if bar else None
        for step in range(start, recipe.steps):
            if step % (REFILL * REUSE // size) == 0:
                pool.add(REFILL)
            latents, text, mask, classes, values = pool.batch(size)
            u = recipe.times(size, noise)
            noisy, times, target, weight = recipe.noised(latents * scale, torch.randn(latents.shape, generator=noise), u)
            # Plain products: the fused kernel's backward is slow on short sequences.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                error, read = compiled(noisy, times, target, text, mask)
            denoising = (error * weight).mean()
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
            training.step(step)
            if rank == 0:
                bar.update(task, advance=1, note=f"denoising {denoising.item():.4f} align {align.item():.4f}")
                if (step + 1) % 50 == 0:
                    per_step = (time.time() - began) / (step + 1 - start)
                    shared.log(work, stage="denoiser", step=step + 1, denoising=denoising.item(), align=align.item(), seconds=per_step)
                if (step + 1) % 250 == 0 or step + 1 == recipe.steps:
                    training.save(step + 1, scale=scale)


# --------------------------------------------------------------------------------------------------------------- export


def assemble(recipe: Denoising) -> DiffusionPipeline:
    """The pipeline of the newest checkpoints, with averaged denoiser weights, in fp32."""
    work = shared.SHARED
    tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer")
    text = shared.new_text_encoder(len(tokenizer))
    text.load_state_dict(torch.load(work / "text.pt")["model"])
    state = torch.load(Path("runs") / recipe.name / "denoiser.pt")
    vae = shared.new_vae()
    vae.load_state_dict(torch.load(work / ("decoder.pt" if (work / "decoder.pt").exists() else "vae.pt"))["model"])
    vae.register_to_config(scaling_factor=state["scale"])
    network = recipe.network()
    network.load_state_dict(state["average"])
    return recipe.pipeline(tokenizer, text.eval(), vae.eval(), network.eval())


def score(recipe: Denoising, pipe: DiffusionPipeline, captions: list[world.Caption], seed: int = 0, batch: int = 64) -> Tensor:
    """Pictures [N, 3, 64, 64] of the captions: a noise of its own for each, bf16 autocast."""
    pictures = []
    for at in range(0, len(captions), batch):
        part = captions[at : at + batch]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed + at + i)) for i in range(len(part))])
        with torch.autocast("cpu", torch.bfloat16):
            out = pipe([str(c) for c in part], latents=noise, output_type="pt", **recipe.sampling).images
        pictures.append(out.float())
    return torch.cat(pictures)


def export(recipe: Denoising, samples: int) -> None:
    """Saves the pipeline in bf16, scores what was saved, and writes its card."""
    work = Path("runs") / recipe.name
    state = torch.load(work / "denoiser.pt")
    pipe = assemble(recipe)
    with shared.replacing(ZOO / recipe.name) as scratch:
        pipe.to(torch.bfloat16).save_pretrained(scratch)
        # transformers loads in the dtype that the config names, diffusers in fp32: they must agree when neither is told.
        config = json.loads((scratch / "text_encoder" / "config.json").read_text())
        (scratch / "text_encoder" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        known = ("guidance_scale", "max_sequence_length", "height", "width")
        recommended = {"steps": recipe.sampling["num_inference_steps"], **{k: recipe.sampling[k] for k in known if k in recipe.sampling}}
        (scratch / "hasten.json").write_text(json.dumps(recommended, indent=2) + "\n")
        pipe = DiffusionPipeline.from_pretrained(scratch)
        pipe.set_progress_bar_config(disable=True)
        results: dict[str, Any] = {"step": state["step"], "samples": state["step"] * recipe.batch, "git": git_hash()}
        for name, held_out in (("unseen", False), ("held_out", True)):
            generator = torch.Generator().manual_seed(6_000_000 + held_out)
            captions = world.sample_scenes(samples, generator, held_out=held_out, placed=False).captions()
            verdict = verify(score(recipe, pipe, captions), captions)
            counts = torch.tensor([len(caption.things) for caption in captions])
            results[name] = {
                "captions": samples,
                "correct": verdict.correct.float().mean().item(),
                "by_count": {str(n): verdict.correct[counts == n].float().mean().item() for n in (1, 2, 3)},
                "by_attribute": verdict.rates(),
            }
            shared.log(work, stage="export", set=name, **results[name])
            print(name, json.dumps(results[name]))
        shared.describe(scratch, work, results, card(recipe, results))


def git_hash() -> str:
    return (
        subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    )


CARD = """# {name}

A text-to-image diffusion model for a world whose truth can be checked exactly: {summary}, on 8x8x4 latents of its own VAE, with a
T5 encoder and tokenizer of its own, trained from nothing by `recipes/{file}`.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("pipelines/zoo/weights/{name}")
caption = "a small red circle left of a blue square"
image = pipe(caption, {call}).images[0]
```

Trained for {trained} steps of {batch} pictures ({samples:,} in all), git {git}.
Figures: {steps} steps of the pipeline's own scheduler, guidance {guidance}, under bf16 autocast, judged by
`hasten.pipelines.zoo.shapes.verify`.

| captions | number | fully correct | one object | two | three | objects | colour | shape | size | relation |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

The training log is `training_log.jsonl`; the figures are in `results.json`.
"""


def card(recipe: Denoising, results: dict[str, Any]) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    rows = []
    for name, title in (("unseen", "never seen in training"), ("held_out", "held-out combinations")):
        row = results[name]
        attributes = [row["by_attribute"][key] for key in ("objects", "colour", "shape", "size", "relation")]
        cells = [row["correct"], *row["by_count"].values(), *attributes]
        rows.append(f"| {title} | {row['captions']} | " + " | ".join(f"{100 * cell:.1f}%" for cell in cells) + " |")
    return CARD.format(
        name=recipe.name,
        file=recipe.name.replace("-", "_") + ".py",
        summary=recipe.summary,
        call=recipe.call,
        steps=recipe.sampling["num_inference_steps"],
        guidance=recipe.sampling["guidance_scale"],
        trained=results["step"],
        batch=recipe.batch,
        samples=results["samples"],
        git=results["git"],
        rows="\n".join(rows),
    )


def main(recipe: Denoising, description: str) -> None:
    """The command line of a recipe."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048, help="captions that the export is scored on (default: %(default)s)")
    stages = {
        "vae": lambda args: shared.train_vae(shared.SHARED),
        "text": lambda args: shared.train_text(shared.SHARED),
        "decoder": lambda args: shared.train_decoder(shared.SHARED),
        "denoiser": lambda args: train(recipe),
        "export": lambda args: export(recipe, args.samples),
    }
    shared.run_stages(parser, stages, [shared.SHARED, Path("runs") / recipe.name])
