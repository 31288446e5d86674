"""Distils the shipped `shapes` model into 1, 2, 4 and 8 steps: `python recipes/shapes_steps.py`. See recipes/README.md.

    pool      scenes encoded by the model's own VAE and text encoder
    segments  trajectory-segmented consistency in 8, 4, 2 and 1 segments
    match     distribution matching on what the student makes in 1, 2, 4 and 8 steps
    export    one LoRA in bf16, scored on unseen captions beside its teacher, and the card

One core is enough. `--minutes` ends a run early; give the same command again to go on. Checkpoints lie in runs/shapes-steps.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import shared
import torch
from denoising import ZOO, git_hash
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.accelerators.distillation.adapters import layers_of
from hasten.accelerators.distillation.dmd import DistributionMatching, rollout
from hasten.accelerators.distillation.grid import Conditions, Grid
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.pipelines.step_lora import StepLoRA, facts_of, few_steps
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import Caption, verify, world

RANK, BATCH, GUIDANCE = 28, 64, 3.0
GRID, TOP = 16, 649
"""Steps of the teacher's solver, and the timestep where sampling begins. With pure noise there the teacher is as good as from 999 (89.1%
against 90.6% of 64 captions in 16 steps), and what bf16 rounds away in a noise prediction is multiplied by 8 and not by 157."""
COUNTS = (1, 2, 4, 8)
SEGMENTS = {8: 50, 4: 50, 2: 100, 1: 150}
"""Optimiser steps of each stage."""
RATE, FALLING, AVERAGE = 2e-3, 0.3, 0.99
MATCHES, MATCH_RATE, SCORE_RATE, WARMUP, MATCH_AVERAGE = 900, 5e-4, 1e-3, 10, 0.98
SHARES = (0.45, 0.25, 0.2, 0.1)
"""How often the student is matched in 1, 2, 4 and 8 steps."""
SCENES, CHUNK = 12_288, 256
CHECKED = 128
"""Captions of the check at the end of a stage."""


class Model:
    """The shipped pipeline with its denoiser as a compiled function of the weights that are adapted."""

    def __init__(self) -> None:
        self.pipe = load("shapes")
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.requires_grad_(False)
        self.network = self.pipe.transformer.requires_grad_(False).eval()
        self.scale = self.pipe.vae.config.scaling_factor
        self.alphas = self.pipe.scheduler.alphas_cumprod
        self.grid = Grid.variance_preserving(self.alphas, GRID, "epsilon", TOP)
        self.scores = Grid.variance_preserving(self.alphas, 45, "epsilon", 899)
        self.base = {layer: self.network.get_submodule(layer).weight.detach() for layer in layers_of(self.network)}
        self.plain = {f"{layer}.weight": weight.bfloat16() for layer, weight in self.base.items()}
        self.empty = self.encoded([""])
        self.compiled = torch.compile(self._answer, dynamic=False)

    @torch.no_grad()
    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features [N, 20, 128] in bf16 and their mask."""
        text, mask, _, _ = self.pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=shared.TEXT_LENGTH)
        return text.bfloat16(), mask

    def new_factors(self, seed: int) -> dict[str, Tensor]:
        """Both factors of every layer, the second at zero."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for layer, weight in self.base.items():
            first = torch.rand(RANK, weight.shape[1], generator=generator) * 2 - 1
            made[f"{layer}.lora_A.weight"] = (first / math.sqrt(weight.shape[1])).requires_grad_()
            made[f"{layer}.lora_B.weight"] = torch.zeros(len(weight), RANK).requires_grad_()
        return made

    def merged(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapted weights in bf16: one product a step is cheaper than two at every call."""
        return {
            f"{layer}.weight": (weight + factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]).bfloat16()
            for layer, weight in self.base.items()
        }

    def _answer(self, weights: Mapping[str, Tensor], latents: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        named = {
            "encoder_hidden_states": text,
            "timestep": times,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
        answer: Tensor = functional_call(self.network, dict(weights), (latents,), named)[0]
        return answer

    def denoiser(self, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def call(latents: Tensor, timesteps: Tensor, conditions: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                answer: Tensor = self.compiled(weights, latents.float(), timesteps, *conditions)
                return answer

        return call

    @torch.no_grad()
    def drawn(self, factors: Mapping[str, Tensor], captions: Sequence[Caption], steps: int) -> Tensor:
        """Pictures [N, 3, 64, 64], a noise of its own for each, all noise anew at each step."""
        student, pictures = self.denoiser(self.merged(factors)), []
        text, mask = self.encoded([str(caption) for caption in captions])
        for at in range(0, len(captions), BATCH):
            told = text[at : at + BATCH], mask[at : at + BATCH]
            rows = len(told[0])
            noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(at + i)) for i in range(rows)])
            generator = torch.Generator().manual_seed(10_000 + at)
            x0 = rollout(student, noise, told, self.grid, nodes(steps), generator).x0
            with torch.autocast("cpu", torch.bfloat16):
                out = self.pipe.vae.decode(x0 / self.scale).sample
            pictures.append((out.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(pictures)

    def check(self, factors: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of fully correct pictures for each number of steps, on captions that no export is judged by."""
        captions = world.sample_scenes(CHECKED, torch.Generator().manual_seed(6_000_002), placed=False).captions()
        return {str(n): verify(self.drawn(factors, captions, n), captions).correct.float().mean().item() for n in COUNTS}


def nodes(steps: int) -> list[int]:
    """Of the grid, falling."""
    return [GRID * k // steps for k in range(steps, 0, -1)]


# ------------------------------------------------------------------------------------------------------------------ pool


def fill_pool(args: argparse.Namespace) -> None:
    """Encodes the scenes."""
    path = args.work / "pool.pt"
    if path.exists():
        return
    model, generator = Model(), torch.Generator().manual_seed(77)
    rows: list[list[Tensor]] = [[], [], []]
    with shared.progress() as bar, torch.no_grad():
        task = bar.add_task("pool", total=SCENES, note="")
        for _ in range(0, SCENES, CHUNK):
            scenes = world.sample_scenes(CHUNK, generator)
            with torch.autocast("cpu", torch.bfloat16):
                latents = model.pipe.vae.encode(world.render(scenes) * 2 - 1).latent_dist.mode().float() * model.scale
            for row, value in zip(rows, (latents, *model.encoded([str(caption) for caption in scenes.captions()])), strict=True):
                row.append(value)
            bar.update(task, advance=CHUNK)
    scratch = path.with_suffix(".partial")
    torch.save([torch.cat(row) for row in rows], scratch)
    scratch.replace(path)


class Pool:
    """Latents and features of the scenes; a batch depends on its generator alone."""

    def __init__(self, work: Path, model: Model) -> None:
        self.latents, self.text, self.mask = torch.load(work / "pool.pt")
        self.empty = tuple(row.expand(BATCH, *row.shape[1:]) for row in model.empty)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Conditions]:
        index = torch.randint(len(self.latents), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *self.latents.shape[1:], generator=generator)
        return self.latents[index], noise, Conditions((self.text[index], self.mask[index]), self.empty)


# -------------------------------------------------------------------------------------------------------------- training


class Trained:
    """Factors, their optimiser and their average over time."""

    def __init__(self, factors: dict[str, Tensor], rate: float, betas: tuple[float, float]) -> None:
        self.factors, self.rate = factors, rate
        self.optimizer = torch.optim.AdamW(factors.values(), rate, betas=betas, weight_decay=0.0)
        self.average = {name: factor.detach().clone() for name, factor in factors.items()}

    def step(self, share: float, keep: float) -> float:
        """Along the gradients that are there, with a share of the rate; gives their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.rate
        norm = torch.nn.utils.clip_grad_norm_(self.factors.values(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, factor in self.factors.items():
            self.average[name].lerp_(factor.detach(), 1 - keep)
        return norm

    def state(self) -> dict[str, Any]:
        factors = {name: factor.detach() for name, factor in self.factors.items()}
        return {"factors": factors, "optimizer": self.optimizer.state_dict(), "average": self.average}

    def load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(state["factors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]


def share_of(step: int, steps: int, warmup: int = 30) -> float:
    """Of the rate: rising, constant, falling to zero."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (steps - step) / (FALLING * steps))


def averaging(step: int, keep: float) -> float:
    return min(keep, (step + 1) / (step + 11))


class Clock:
    """Ends a run after so many minutes, with a checkpoint."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def train_segments(args: argparse.Namespace) -> None:
    """Trajectory-segmented consistency, stage by stage."""
    path, total = args.work / "segments.pt", sum(SEGMENTS.values())
    state = torch.load(path) if path.exists() else None
    if state is not None and state["step"] == total:
        return
    model = Model()
    pool, method = Pool(args.work, model), TrajectoryConsistency(tuple(SEGMENTS), (GUIDANCE, GUIDANCE))
    student = Trained(model.new_factors(0), RATE, (0.9, 0.98))
    start = 0
    if state is not None:
        student.load(state["student"])
        start = state["step"]
    schedule = [segments for segments, steps in SEGMENTS.items() for _ in range(steps)]
    teacher, began = model.denoiser(model.plain), time.monotonic()
    losses: list[float] = []
    with shared.progress() as bar:
        task = bar.add_task("segments", total=total, completed=start, note="")
        for step in range(start, total):
            generator = torch.Generator().manual_seed(1_000 + step)
            x0, noise, conditions = pool.batch(generator)
            weights = model.merged(student.factors)
            target = model.denoiser({name: weight.detach() for name, weight in weights.items()})
            given = Task(model.denoiser(weights), teacher, x0, noise, conditions, model.grid, generator, target)
            loss = method.loss(given, schedule[step])
            loss.backward()
            student.step(share_of(step, total), averaging(step, AVERAGE))
            losses.append(loss.item())
            done = step + 1
            bar.update(task, advance=1, note=f"{schedule[step]} segments, loss {losses[-1]:.4f}")
            ended = done == total or schedule[done] != schedule[step]
            if done % 50 == 0 or ended or args.clock.over:
                shared.save(path, student=student.state(), step=done)
                seconds = (time.monotonic() - began) / (done - start)
                mean = sum(losses) / len(losses)
                shared.log(args.work, stage="segments", step=done, segments=schedule[step], loss=mean, seconds=seconds)
                losses.clear()
            if ended:
                shared.log(args.work, stage="segments", step=done, correct=model.check(student.average))
            if args.clock.over:
                raise SystemExit(f"{args.minutes:g} minutes are over after {done} of {total} steps: give the same command again to go on")


def train_match(args: argparse.Namespace) -> None:
    """Distribution matching, from the averaged student of the stage before."""
    path = args.work / "match.pt"
    state = torch.load(path) if path.exists() else None
    if state is not None and state["step"] == MATCHES:
        return
    model = Model()
    pool, method = Pool(args.work, model), DistributionMatching((GUIDANCE, GUIDANCE), updates=2)
    begun = torch.load(args.work / "segments.pt")["student"]["average"]
    student = Trained({name: factor.clone().requires_grad_() for name, factor in begun.items()}, MATCH_RATE, (0.0, 0.99))
    score = Trained(model.new_factors(1), SCORE_RATE, (0.0, 0.99))
    start = -WARMUP
    if state is not None:
        student.load(state["student"])
        score.load(state["score"])
        start = state["step"]
    teacher, began = model.denoiser(model.plain), time.monotonic()
    with shared.progress() as bar:
        task = bar.add_task("match", total=MATCHES, completed=max(0, start), note="")
        for step in range(start, MATCHES):
            generator, rng = torch.Generator().manual_seed(8_200_000 + step), random.Random(step)
            _, noise, conditions = pool.batch(generator)
            count = rng.choices(COUNTS, SHARES)[0]
            walked = nodes(count)[: rng.randint(1, count)]
            weights = model.merged(student.factors)
            made = rollout(model.denoiser(weights), noise, conditions.told, model.grid, walked, generator).x0
            if step >= 0:  # before, the score learns what the student makes
                fake = model.denoiser({name: weight.detach() for name, weight in model.merged(score.factors).items()})
                loss = method.student_loss(made, fake, teacher, conditions, model.scores, generator)
                loss.backward()
                student.step(share_of(step, MATCHES, 20), averaging(step, MATCH_AVERAGE))
            for _ in range(method.updates):
                off = method.score_loss(made.detach(), model.denoiser(model.merged(score.factors)), conditions, model.scores, generator)
                off.backward()
                score.step(1.0, AVERAGE)
            done = step + 1
            if step < 0:
                continue
            bar.update(task, advance=1, note=f"loss {loss.item():.3f}, score {off.item():.4f}")
            if done % 25 == 0 or done == MATCHES or args.clock.over:
                shared.save(path, student=student.state(), score=score.state(), step=done)
                row = {"loss": loss.item(), "score": off.item(), "seconds": (time.monotonic() - began) / (done - start)}
                shared.log(args.work, stage="match", step=done, **row)
            if done % 100 == 0 or done == MATCHES:
                shared.log(args.work, stage="match", step=done, correct=model.check(student.average))
            if args.clock.over:
                raise SystemExit(f"{args.minutes:g} minutes are over after {done} of {MATCHES} steps: give the same command again to go on")


# ---------------------------------------------------------------------------------------------------------------- export


def pictures_of(pipe: Any, captions: Sequence[Caption], **call: Any) -> Tensor:
    """Pictures [N, 3, 64, 64] of the captions, bf16 autocast, each from a noise of its own."""
    made = []
    for at in range(0, len(captions), BATCH):
        part = [str(caption) for caption in captions[at : at + BATCH]]
        generators = [torch.Generator().manual_seed(at + i) for i in range(len(part))]
        with torch.autocast("cpu", torch.bfloat16):
            made.append(pipe(part, generator=generators, output_type="pt", **call).images.float())
    return torch.cat(made)


def export(args: argparse.Namespace) -> None:
    """Saves the LoRA of the newest checkpoint in bf16, and scores what was saved."""
    newest = next(path for name in ("match.pt", "segments.pt") if (path := args.work / name).exists())
    state = torch.load(newest)
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    grid = Grid.variance_preserving(pipe.scheduler.alphas_cumprod, GRID, "epsilon", TOP)
    timesteps = {count: few_steps(grid, count) for count in COUNTS}
    facts = facts_of(pipe.transformer, RANK, "TrajectoryConsistency, DistributionMatching", (GUIDANCE, GUIDANCE), timesteps, 1.0)
    captions = world.sample_scenes(args.samples, torch.Generator().manual_seed(6_000_000), placed=False).captions()
    call = {**call_defaults(path_of("shapes")), "use_resolution_binning": False, "clean_caption": False}
    with shared.replacing(ZOO / "shapes-steps") as scratch:
        saved = StepLoRA("transformer", state["student"]["average"], facts).save(scratch, torch.bfloat16)
        lora = StepLoRA.load(saved)
        results: dict[str, Any] = {"captions": args.samples, "stage": newest.stem, "step": state["step"], "git": git_hash(), "correct": {}}
        results["bytes"] = saved.stat().st_size
        results["teacher"] = verify(pictures_of(pipe, captions, **call), captions).correct.float().mean().item()
        for count in COUNTS:
            with lora.applied(pipe, count) as few:
                drawn = pictures_of(pipe, captions, **{**call, **few})
            results["correct"][str(count)] = verify(drawn, captions).correct.float().mean().item()
            print(count, results["correct"][str(count)], flush=True)
        shared.describe(scratch, args.work, results, card(results))


CARD = """# shapes-steps

A LoRA of {kilobytes} kB that lets the `shapes` model draw in 1, 2, 4 or 8 steps, trained by `recipes/shapes_steps.py`: trajectory-segmented
consistency (Hyper-SD, arXiv 2404.13686), then distribution matching (DMD2, arXiv 2405.14867). Guidance {guidance:g} is folded in.

```python
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.zoo.loading import load

pipe = load("shapes")
lora = StepLoRA.load("pipelines/zoo/weights/shapes-steps")
with lora.applied(pipe, 4) as call:
    image = pipe("a small red circle left of a blue square", use_resolution_binning=False, **call).images[0]
```

Fully correct pictures of {captions} captions that training never saw, under bf16 autocast, judged by `hasten.pipelines.zoo.shapes.verify`:

| teacher, 50 steps, guidance {guidance:g} | 8 steps | 4 steps | 2 steps | 1 step |
|---|---|---|---|---|
| {teacher} | {eight} | {four} | {two} | {one} |

The training log is `training_log.jsonl`; the figures are in `results.json`. Git {git}.
"""


def card(results: Mapping[str, Any]) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    shares = {name: f"{100 * results['correct'][str(n)]:.1f}%" for name, n in (("one", 1), ("two", 2), ("four", 4), ("eight", 8))}
    return CARD.format(
        kilobytes=results["bytes"] // 1000,
        guidance=GUIDANCE,
        captions=results["captions"],
        teacher=f"{100 * results['teacher']:.1f}%",
        git=results["git"],
        **shares,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shapes-steps"), help="folder of checkpoints (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="ends training after so many (default: when it is done)")
    parser.add_argument("--samples", type=int, default=512, help="captions that the export is scored on (default: %(default)s)")
    known, _ = parser.parse_known_args()
    parser.set_defaults(clock=Clock(known.minutes))
    stages = {"pool": fill_pool, "segments": train_segments, "match": train_match, "export": export}
    shared.run_stages(parser, stages, [known.work])


if __name__ == "__main__":
    main()
