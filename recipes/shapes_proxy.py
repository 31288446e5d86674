"""Trains the differentiable stand-in for the shapes verifier: `python recipes/shapes_proxy.py`. See recipes/README.md.

    pool      pictures that the shipped `shapes` model draws, half drawn and after a way through its VAE
    train     a small convolutional network on them, on scenes drawn wrongly, and on pictures made to please it
    export    bf16 weights, agreement with the exact verifier on pictures that training never saw, gradient ascent, the card

Every label comes from the exact verifier. Checkpoints lie in runs/shapes-proxy; give the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import shared
import torch
import torch.nn.functional as F
from denoising import ZOO, git_hash
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.accelerators.steering.verifiers import ranks
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import ShapesVerdict, verify, world
from hasten.pipelines.zoo.shapes.proxy import COUNTS, GRID, Reading, ShapesProxy, agreement, load_proxy, question_of

WORK = Path("runs/shapes-proxy")
STEPS, BATCH, RATE, EMA = 5_000, 40, 1.5e-3, 0.998
ROUNDS, ROUND = 30, 64
"""Batches of captions in the pool; each gives four pictures a caption."""
SHARE_DRAWN, SHARE_MADE = 0.5, 0.125
"""Of a batch, from the pool and from the ring of pictures made to please the network; the rest is rendered."""
RING, EVERY = 2_048, 16
"""The newest pictures made to please the network, and how many steps lie between two batches of them."""


# ------------------------------------------------------------------------------------------------------------------ pool


def tensors(pictures: Tensor) -> Tensor:
    """[N, 3, 64, 64] as bytes."""
    return (pictures.clamp(0, 1) * 255).round().byte()


def model() -> DiffusionPipeline:
    """The shipped `shapes`."""
    pipe = load("shapes")
    pipe.vae.requires_grad_(False).to(memory_format=torch.channels_last)
    return pipe


def decoded(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures [N, 3, 64, 64] in 0 to 1."""
    with torch.autocast("cpu", torch.bfloat16):
        out = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (out.float() / 2 + 0.5).clamp(0, 1)


def encoded(pipe: DiffusionPipeline, pictures: Tensor) -> Tensor:
    """Latents [N, 4, 8, 8], scaled as the denoiser takes them."""
    with torch.autocast("cpu", torch.bfloat16):
        return pipe.vae.encode(pictures * 2 - 1).latent_dist.mode().float() * pipe.vae.config.scaling_factor


def estimates(
    pipe: DiffusionPipeline, captions: Sequence[str], latents: Tensor, steps: int, guidance: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model would draw and where it is on its way there, latents [N, 4, 8, 8] each, after every step of DDIM."""
    texts = [*captions, *[""] * len(captions)] if guidance > 1 else [*captions]
    with torch.no_grad():
        text, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=shared.TEXT_LENGTH)
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            noise = pipe.transformer(
                torch.cat([latents] * (len(texts) // len(captions))),
                encoder_hidden_states=text,
                timestep=timestep.expand(len(texts)),
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample.float()
        if guidance > 1:
            told, untold = noise.chunk(2)
            noise = untold + guidance * (told - untold)
        step = pipe.scheduler.step(noise, timestep, latents)
        latents = step.prev_sample
        yield step.pred_original_sample, latents


def noise_of(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, shared.LATENT_CHANNELS, GRID, GRID, generator=generator)


@torch.no_grad()
def drawn(pipe: DiffusionPipeline, captions: Sequence[str], generator: torch.Generator, rng: random.Random) -> list[Tensor]:
    """The model's pictures of the captions in few steps with weak guidance, and its estimates of them at two earlier steps."""
    steps, guidance = rng.randint(4, 10), rng.choice((1.0, 1.0, 2.0, 3.0))
    all_of_them = [x0 for x0, _ in estimates(pipe, captions, noise_of(len(captions), generator), steps, guidance)]
    kept = rng.sample(range((steps - 1) // 2, steps - 1), 2)
    return [decoded(pipe, all_of_them[i]) for i in (*kept, -1)]


@torch.no_grad()
def fill_pool() -> None:
    path = WORK / "pool.pt"
    pictures: list[Tensor] = []
    captions: list[str] = []
    start = 0
    if path.exists():
        state = torch.load(path)
        pictures, captions, start = [state["pictures"]], state["captions"], state["round"]
    if start >= ROUNDS:
        return
    pipe = model()
    with shared.progress() as bar:
        task = bar.add_task("pool", total=ROUNDS, completed=start, note="")
        for at in range(start, ROUNDS):
            generator, rng = torch.Generator().manual_seed(8_000_000 + at), random.Random(at)
            said = [str(caption) for caption in world.sample_scenes(ROUND, generator, held_out=None, placed=False).captions()]
            parts = drawn(pipe, said, generator, rng)
            rendered, asked = distorted(ROUND, generator)
            latents = encoded(pipe, rendered)
            off = 0.4 * torch.rand(ROUND, 1, 1, 1, generator=generator) * latents.std()
            parts.append(decoded(pipe, latents + off * torch.randn(latents.shape, generator=generator)))
            pictures += [tensors(part) for part in parts]
            captions += [*said * (len(parts) - 1), *map(str, asked)]
            bar.update(task, advance=1)
            shared.log(WORK, stage="pool", round=at + 1)
            if (at + 1) % 10 == 0 or at + 1 == ROUNDS:
                pictures = [torch.cat(pictures)]
                shared.save(path, pictures=pictures[0], captions=captions, round=at + 1)


# --------------------------------------------------------------------------------------------------- scenes drawn wrongly


def some(share: float, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator) < share


def distorted(n: int, generator: torch.Generator) -> tuple[Tensor, list[world.Caption]]:
    """Pictures [n, 3, 64, 64] of scenes, most of them with something wrong, and what they should have shown.

    What a diffusion model gets wrong: shapes between two, colours between two or off the palette, sizes between, ghosts, objects that run
    into each other or have a bite taken out, one too many, debris, blur, noise, stains.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def chance(share: float, *shape: int) -> Tensor:
        return some(share, *shape, generator=generator)

    scenes = world.sample_scenes(n, generator, held_out=None)
    captions = scenes.captions()
    slots = 6  # the scene's three objects, one more, two specks
    wrong = chance(0.75, n, 1)
    exists = torch.cat([torch.arange(3) < scenes.count[:, None], wrong & chance(0.15, n, 1), wrong & chance(0.12, n, 2)], 1)
    shape = torch.cat([scenes.shape, torch.randint(4, (n, 3), generator=generator)], 1)
    colour = torch.cat([scenes.colour, torch.randint(6, (n, 3), generator=generator)], 1)
    nominal = torch.tensor(world.RADIUS)[torch.cat([scenes.size, torch.randint(2, (n, 1), generator=generator)], 1)]
    radius = torch.cat([nominal, uniform(1.0, 5.5, n, 2)], 1)
    anywhere = uniform(8.0, 56.0, n, slots, 2)
    centre = torch.cat([scenes.centre, anywhere[:, 3:]], 1)
    centre = torch.where((wrong & chance(0.12, n, slots))[..., None], anywhere, centre)

    def fault(share: float) -> Tensor:
        return wrong & chance(share, n, slots)

    radius = torch.where(fault(0.15), radius * uniform(0.7, 1.3, n, slots), radius)
    other = torch.randint(4, (n, slots), generator=generator)
    mix = torch.where(fault(0.2), uniform(0.0, 1.0, n, slots), 0.0)

    def cover(kind: Tensor, size: Tensor, place: Tensor) -> Tensor:
        drawn = world.coverage(kind.flatten(), size.flatten(), place.flatten(0, 1))
        return drawn.view(n, -1, world.RESOLUTION, world.RESOLUTION)

    alpha = torch.lerp(cover(shape, radius, centre), cover(other, radius, centre), mix[..., None, None])
    bitten = fault(0.12)
    bite = cover(other, radius * uniform(0.2, 0.6, n, slots), centre + radius[..., None] * uniform(-1.0, 1.0, n, slots, 2))
    alpha = alpha * (1 - bite * bitten[..., None, None])
    alpha = alpha * torch.where(fault(0.15), uniform(0.1, 1.0, n, slots), 1.0)[..., None, None] * exists[..., None, None]

    palette = torch.tensor(list(world.PALETTE.values()))
    paint = palette[colour]
    second = palette[torch.randint(6, (n, slots), generator=generator)]
    blended = fault(0.15)
    paint = torch.where(blended[..., None], torch.lerp(paint, second, uniform(0.0, 1.0, n, slots, 1)), paint)
    paint = paint + torch.where(fault(0.25), 1.0, 0.15)[..., None] * 0.1 * torch.randn(n, slots, 3, generator=generator)
    # Half one colour, half the other, along some direction and more or less sharply.
    axis = torch.arange(world.RESOLUTION) + 0.5
    angle = uniform(0.0, 6.29, n, slots)[..., None, None]
    x, y = axis[None, :] - centre[..., :1, None], axis[:, None] - centre[..., 1:, None]
    ramp = (
        (x * angle.cos() + y * angle.sin()) / uniform(0.5, 6.0, n, slots)[..., None, None] + uniform(-3, 3, n, slots)[..., None, None]
    ).sigmoid()
    ramp = (ramp * (fault(0.15) & ~blended)[..., None, None])[:, :, None]
    pictures = torch.tensor(world.BACKGROUND).view(1, 3, 1, 1).expand(n, 3, world.RESOLUTION, world.RESOLUTION)
    for i in range(slots):
        tint = torch.lerp(paint[:, i, :, None, None], second[:, i, :, None, None], ramp[:, i])
        pictures = torch.lerp(pictures, tint, alpha[:, i, None])

    pictures = blurred(pictures, torch.where(chance(0.5, n), uniform(0.2, 1.0, n) + wrong[:, 0] * uniform(0.0, 1.0, n), 0.01))
    pictures = pictures + torch.where(chance(0.4, n, 3), 0.03, 0.0)[..., None, None] * torch.randn(n, 3, 1, 1, generator=generator)
    stain = F.interpolate(torch.randn(n, 3, 5, 5, generator=generator), world.RESOLUTION, mode="bicubic")
    pictures = pictures + (wrong & chance(0.2, n, 1))[..., None, None] * uniform(0.0, 0.08, n, 1, 1, 1) * stain
    return grainy(pictures, generator), captions


def blurred(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Pictures [N, 3, 64, 64], each under a Gaussian of its own width [N] in pixels."""
    n, reach = len(pictures), 5
    kernel = (-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma[:, None] ** 2)).softmax(1).repeat_interleave(3, 0)
    flat = F.pad(pictures.reshape(1, 3 * n, *pictures.shape[2:]), (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None], groups=3 * n)
    return F.conv2d(flat, kernel[:, None, :, None], groups=3 * n).view_as(pictures)


def grainy(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with noise on some of them."""
    amount = torch.where(some(0.4, len(pictures), 1, 1, 1, generator=generator), 0.05, 0.0) * torch.rand(
        len(pictures), 1, 1, 1, generator=generator
    )
    return (pictures + amount * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def changed(caption: world.Caption, rng: random.Random) -> world.Caption:
    """The caption with one thing about it said otherwise."""
    while True:
        things, relations = list(caption.things), list(caption.relations)
        at = rng.randrange(len(things))
        what = rng.choice(("colour", "shape", "size", "relation", "swap", "fewer", "more"))
        if what == "colour":
            things[at] = replace(things[at], colour=rng.choice(world.COLOURS))
        elif what == "shape":
            things[at] = replace(things[at], shape=rng.choice(world.SHAPES))
        elif what == "size":
            things[at] = replace(things[at], size=rng.choice(world.SIZES))
        elif what == "relation" and relations:
            relations[rng.randrange(len(relations))] = rng.choice(world.RELATIONS)
        elif what == "swap" and at:
            things[0], things[at] = replace(things[0], colour=things[at].colour), replace(things[at], colour=things[0].colour)
        elif what == "fewer" and at:
            things, relations = things[:-1], relations[:-1]
        elif what == "more" and len(things) < world.MAX_OBJECTS:
            things.append(world.Thing(rng.choice(world.SHAPES), rng.choice(world.COLOURS), rng.choice((*world.SIZES, None))))
            relations.append(rng.choice(world.RELATIONS))
        alike = len({(thing.colour, thing.shape) for thing in things}) < len(things)
        if not alike and (tuple(things), tuple(relations)) != (caption.things, caption.relations):
            return world.Caption(tuple(things), tuple(relations))


# ----------------------------------------------------------------------------------------------------------------- train


def loss_of(reading: Reading, verdict: ShapesVerdict) -> tuple[Tensor, dict[str, float]]:
    """How far the network's reading is from the verifier's, and its score from the verdict."""
    found = verdict.found
    slots = found.colour.shape[1]
    real = torch.arange(slots) < found.count[:, None]
    cell = (found.centre * GRID / world.RESOLUTION).floor().clamp(0, GRID - 1).long()
    cell = cell[..., 1] * GRID + cell[..., 0]
    present = torch.zeros_like(reading.presence).scatter_reduce_(1, cell, real.float(), "amax")
    listed = (found.count <= slots).float()[:, None]  # of more pieces than that the verifier tells no places
    presence = F.binary_cross_entropy_with_logits(reading.presence, present, reduction="none")

    def named(log_probability: Tensor, index: Tensor, ok: Tensor) -> Tensor:
        classes = log_probability.shape[2]
        there = log_probability.gather(1, cell[..., None].expand(-1, -1, classes))[real]
        return F.nll_loss(there, torch.where(ok, index, classes - 1)[real])

    off = reading.centre.gather(1, cell[..., None].expand(-1, -1, 2)) - found.centre
    score = agreement(reading, question_of(verdict.captions)).clamp(max=-1e-4)
    right = verdict.correct.float()
    parts = {
        "presence": (presence * listed).sum(1).mean(),
        "colour": named(reading.colour, found.colour, found.colour_ok),
        "shape": named(reading.shape, found.shape, found.shape_ok),
        "size": named(reading.size, found.size, found.size_ok),
        "centre": 0.2 * F.smooth_l1_loss(off[real], torch.zeros_like(off[real])),
        "number": F.nll_loss(reading.number, found.count.clamp(max=COUNTS - 1)),
        "clean": F.binary_cross_entropy_with_logits(reading.clean, found.clean.float()),
        "correct": -(right * score + (1 - right) * torch.log(-torch.expm1(score))).mean(),
    }
    return torch.stack(list(parts.values())).sum(), {name: round(part.item(), 4) for name, part in parts.items()}


def ascend(
    network: ShapesProxy, start: Tensor, captions: Sequence[world.Caption], steps: int, rate: float, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Pictures `decode(x)` after Adam's steps on x that raise the network's score."""
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    question = question_of(captions)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            reading = network(decode(x))
        (x.grad,) = torch.autograd.grad(-agreement(reading, question).sum(), x)
        optimizer.step()
    with torch.no_grad():
        return decode(x).clamp(0, 1)


class Samples:
    """Batches: rendered scenes, the pool, and the ring of pictures made to please the network."""

    def __init__(self, seed: int) -> None:
        self.generator, self.rng = torch.Generator().manual_seed(seed), random.Random(seed)
        state = torch.load(WORK / "pool.pt")
        self.pool, self.captions = state["pictures"], [world.parse(caption) for caption in state["captions"]]
        self.made: list[tuple[Tensor, world.Caption]] = []
        self.pipe = model()

    def from_pool(self, n: int) -> tuple[Tensor, list[world.Caption]]:
        rows = torch.randint(len(self.pool), (n,), generator=self.generator)
        return self.pool[rows].float() / 255, [self.captions[row] for row in rows.tolist()]

    def batch(self) -> tuple[Tensor, ShapesVerdict]:
        n = int(SHARE_DRAWN * BATCH)
        pictures, captions = self.from_pool(n)
        pictures = torch.where(some(0.3, n, 1, 1, 1, generator=self.generator), grainy(pictures, self.generator), pictures)
        if self.made:
            chosen = [self.rng.choice(self.made) for _ in range(int(SHARE_MADE * BATCH))]
            pictures = torch.cat([pictures, torch.stack([picture for picture, _ in chosen]).float() / 255])
            captions += [caption for _, caption in chosen]
        rendered, asked = distorted(BATCH - len(captions), self.generator)
        captions = [changed(caption, self.rng) if self.rng.random() < 0.35 else caption for caption in captions + asked]
        pictures = torch.cat([pictures, rendered])
        return pictures, verify(pictures, captions)

    def make(self, network: ShapesProxy, latent: bool) -> None:
        """Adds pictures made to please the network to the ring: what it scores high for no good reason, it must learn to score low."""
        pictures, captions = self.from_pool(12 if latent else 32)
        captions = [changed(caption, self.rng) if self.rng.random() < 0.5 else caption for caption in captions]
        steps, rate = self.rng.randint(2, 12), 10 ** self.rng.uniform(-2.5, -1.2)
        if latent:
            with torch.no_grad():
                start = encoded(self.pipe, pictures)
            out = ascend(network, start, captions, steps, 3 * rate, lambda latents: decoded(self.pipe, latents))
        else:
            out = ascend(network, pictures, captions, steps, rate, lambda x: x.clamp(0, 1))
        self.made = [*self.made, *zip(tensors(out), captions, strict=True)][-RING:]


def train(steps: int) -> None:
    torch.manual_seed(8)
    path, start, seen = WORK / "model.pt", 0, 0
    network = ShapesProxy().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    if path.exists():
        state = torch.load(path)
        if state["step"] >= steps:
            return
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seen = state["average"], state["step"], state["samples"]
    samples = Samples(9_000_000 + start)
    began = time.time()
    with shared.progress() as bar:
        task = bar.add_task("train", total=steps, completed=start, note="")
        for step in range(start, steps):
            if step >= 300 and step % EVERY == 0:
                samples.make(network, latent=step % (4 * EVERY) == 0)
            pictures, verdict = samples.batch()
            with torch.autocast("cpu", torch.bfloat16):
                reading = network(pictures)
            loss, parts = loss_of(reading, verdict)
            loss.backward()
            seen += len(pictures)
            decay = min(1.0, (steps - step) / (0.6 * steps))  # constant, then linear to zero over the last 60%
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 100) * decay
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                keep = min(EMA, (step + 1) / (step + 10))
                for name, value in network.state_dict().items():
                    average[name].lerp_(value, 1 - keep)
            if (step + 1) % 10 == 0:
                bar.update(task, completed=step + 1, note=f"loss {loss.item():.3f}")
            if (step + 1) % 50 == 0:
                per_step = (time.time() - began) / (step + 1 - start)
                rate = verdict.correct.float().mean().item()
                shared.log(WORK, stage="train", step=step + 1, loss=round(loss.item(), 4), **parts, right=rate, seconds=round(per_step, 3))
            if (step + 1) % 250 == 0 or step + 1 == steps:
                # The optimiser's state is kept at the end too: with a larger --steps the run goes on.
                shared.save(
                    path, model=network.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step + 1, samples=seen
                )


# ---------------------------------------------------------------------------------------------------------------- export

SETS = (("shapes", 6, 1), ("shapes-flow", 8, 4), ("shapes-unet", 8, 4))
"""Whose pictures the proxy is judged on, their steps, and which part of the asked number; training saw pictures of the first alone."""
OWN_CALL = {"shapes": {"use_resolution_binning": False, "clean_caption": False}, "shapes-flow": {}, "shapes-unet": {}}
ASCENT_STEPS = 24


def pictures_of(name: str, captions: Sequence[str], steps: int) -> Tensor:
    """Pictures [N, 3, 64, 64] by the model's own pipeline, a noise of its own for each."""
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(path_of(name)), **OWN_CALL[name], "num_inference_steps": steps, "output_type": "pt"}
    out = []
    for at in range(0, len(captions), 64):
        noise = torch.cat([noise_of(1, torch.Generator().manual_seed(70_000 + at + i)) for i in range(len(captions[at : at + 64]))])
        with torch.autocast("cpu", torch.bfloat16):
            out.append(pipe(captions[at : at + 64], latents=noise, **call).images.float())
    return torch.cat(out)


def auc(scores: Tensor, right: Tensor) -> float:
    """Share of pairs, one right and one wrong, in which the right one scores higher; ties count half."""
    n = int(right.sum())
    return float((ranks(scores)[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n)))


def judged(proxy: ShapesProxy, pictures: Tensor, captions: Sequence[str | world.Caption]) -> tuple[dict[str, Any], ShapesVerdict]:
    """How well the proxy's scores agree with the exact verdict, and the verdict."""
    verdict = verify(pictures, captions)
    with torch.no_grad():
        scores = torch.cat([
            proxy.score(pictures[at : at + 64], [str(caption) for caption in captions[at : at + 64]]) for at in range(0, len(captions), 64)
        ])  # fmt: skip
    right = verdict.correct
    return {
        "pictures": len(pictures),
        "right": right.float().mean().item(),
        "auc": auc(scores, right),
        "agree": ((scores.exp() > 0.5) == right).float().mean().item(),
    }, verdict


def climbed(proxy: ShapesProxy, wrong: Tensor, captions: list[world.Caption]) -> dict[str, dict[str, float]]:
    """The share that the exact verifier finds right before and after gradient ascent on wrong pictures, in pixels, in the VAE's latents,
    and in the noise from which the model draws them in four unguided steps."""
    pipe = model()
    pipe.transformer.requires_grad_(False)
    said = [str(caption) for caption in captions]
    noise = noise_of(len(captions), torch.Generator().manual_seed(8))
    radius = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def from_noise(x: Tensor) -> Tensor:
        x = x * radius / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # noise of another norm is none that the model knows
        *_, (x0, _) = estimates(pipe, said, x, 4, 1.0)
        return decoded(pipe, x0)

    with torch.no_grad():
        latents = encoded(pipe, wrong)
    ways: dict[str, tuple[Tensor, float, Callable[[Tensor], Tensor]]] = {
        "pixels": (wrong, 0.02, lambda x: x.clamp(0, 1)),
        "latents": (latents, 0.05, lambda x: decoded(pipe, x)),
        "noise": (noise, 0.1, from_noise),
    }
    out = {}
    for name, (start, rate, decode) in ways.items():
        with torch.no_grad():
            before = decode(start)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slow on short sequences
            after = ascend(proxy, start, captions, ASCENT_STEPS, rate, decode)
        out[name] = {key: verify(x, captions).correct.float().mean().item() for key, x in (("before", before), ("after", after))}
        print(name, json.dumps(out[name]), flush=True)
    return out


def export(number: int) -> None:
    """Saves the averaged weights in bf16, judges what was saved, and writes the card."""
    weights = ZOO / "shapes-proxy"
    state = torch.load(WORK / "model.pt")
    network = ShapesProxy()
    network.load_state_dict(state["average"])
    scratch = weights.with_name(".shapes-proxy.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    network.to(torch.bfloat16).save_pretrained(scratch)
    proxy = load_proxy(scratch)
    results: dict[str, Any] = {"step": state["step"], "samples": state["samples"], "git": git_hash(), "drawn": []}
    wrong: list[tuple[Tensor, world.Caption]] = []
    for i, (name, steps, part) in enumerate(SETS):
        n = number // part
        captions = world.sample_scenes(n, torch.Generator().manual_seed(6_100_000 + i), held_out=None, placed=False).captions()
        kept = WORK / f"{name}-{steps}-{n}.pt"  # an interrupted export draws them once
        if not kept.exists():
            shared.save(kept, pictures=pictures_of(name, [str(caption) for caption in captions], steps))
        pictures = torch.load(kept)["pictures"]
        figures, verdict = judged(proxy, pictures, captions)
        results["drawn"].append({"model": name, "steps": steps, **figures})
        print(json.dumps(results["drawn"][-1]), flush=True)
        wrong += [(pictures[row], captions[row]) for row in (~verdict.correct).nonzero()[:, 0].tolist()]
    generator, rng = torch.Generator().manual_seed(6_200_000), random.Random(6_200_000)
    scenes = world.sample_scenes(number, generator, held_out=None)
    captions = scenes.captions()
    asked = [*captions, *(changed(caption, rng) for caption in captions)]
    results["rendered"], _ = judged(proxy, world.render(scenes).repeat(2, 1, 1, 1), asked)
    print("rendered", json.dumps(results["rendered"]), flush=True)
    wrong = wrong[: number // 16]
    results["ascents"] = len(wrong)
    results["ascent"] = climbed(proxy, torch.stack([picture for picture, _ in wrong]), [caption for _, caption in wrong])
    shared.log(WORK, **{"stage": "export", **results})
    (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shutil.copy(WORK / "log.jsonl", scratch / "training_log.jsonl")
    (scratch / "README.md").write_text(card(results, sum(p.numel() for p in proxy.parameters())))
    shutil.rmtree(weights, ignore_errors=True)
    scratch.rename(weights)


CARD = """# shapes-proxy

A differentiable stand-in for the exact verifier of the `shapes` world: a convolutional network of {parameters:,} parameters that reads a
picture (pieces, their colours, shapes and sizes, debris), and a closed-form comparison with a parsed caption. Trained from nothing by
`recipes/shapes_proxy.py`; all labels come from the exact verifier.

```python
from hasten.pipelines.zoo.shapes.proxy import load_proxy

proxy = load_proxy()
score = proxy.score(images, ["a small red circle left of a blue square"])  # [N] log-probability that all is right
```

Trained for {step:,} steps, {samples:,} pictures in all, git {git}: half are
pictures that the shipped `shapes` draws in few steps, its estimates on the way, and scenes after a way through its VAE; an eighth was made
by gradient ascent to please the network; the rest are rendered scenes, most of them with something wrong.

Agreement with the exact verifier (AUC: share of pairs, one right and one wrong, in which the right one scores higher), on captions and
noises that training never saw:

| pictures | number | right | AUC | same verdict at probability .5 |
|---|---|---|---|---|
{rows}

Gradient ascent of the score, {ascent_steps} steps of Adam on {ascents} captions whose picture was wrong; right by the exact verifier:

| ascent in | before | after |
|---|---|---|
{ascent}

The training log is `training_log.jsonl`; the figures are in `results.json`.
"""


def card(results: dict[str, Any], parameters: int) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    sets = [(f"`{row['model']}`, {row['steps']} steps", row) for row in results["drawn"]]
    sets.append(("rendered scenes, the caption as it was or changed in one thing", results["rendered"]))
    places = {"pixels": "pixels", "latents": "latents of the VAE", "noise": "noise of `shapes`, four unguided steps"}
    return CARD.format(
        step=results["step"],
        samples=results["samples"],
        git=results["git"],
        parameters=parameters,
        ascent_steps=ASCENT_STEPS,
        ascents=results["ascents"],
        rows="\n".join(
            f"| {name} | {row['pictures']:,} | {100 * row['right']:.1f}% | {row['auc']:.4f} | {100 * row['agree']:.1f}% |"
            for name, row in sets
        ),
        ascent="\n".join(
            f"| {places[name]} | {100 * row['before']:.1f}% | {100 * row['after']:.1f}% |" for name, row in results["ascent"].items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("pool", "train", "export"), help="only this stage")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=1_024, help="pictures that the export is judged by (default: %(default)s)")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], None]] = {"pool": fill_pool, "train": lambda: train(args.steps), "export": lambda: export(args.pictures)}
    for name in [args.stage] if args.stage else stages:
        stages[name]()


if __name__ == "__main__":
    main()
