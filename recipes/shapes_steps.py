"""Distils a shipped shapes model into 1, 2, 4 and 8 steps: `python recipes/shapes_steps.py [--model shapes-flow]`. See recipes/README.md.

    pool      scenes encoded by the model's own VAE and text encoder
    segments  trajectory-segmented consistency in 8, 4, 2 and 1 segments
    match     distribution matching on what the student makes in 1, 2, 4 and 8 steps
    feedback  the same, with the gradient of the proxy verifier beside it
    single    the same, mostly in one step, at a lower rate
    last      once more, lower still; of shapes alone
    export    one LoRA in bf16, scored on unseen captions beside its teacher, and the card

One core is enough. `--minutes` ends a run early; give the same command again to go on. Checkpoints lie in runs/MODEL-steps.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import shared
import torch
from denoising import ZOO, git_hash
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.accelerators.distillation.adapters import layers_of
from hasten.accelerators.distillation.dmd import DistributionMatching, few_nodes, rollout
from hasten.accelerators.distillation.feedback import RewardFeedback
from hasten.accelerators.distillation.grid import Conditions, Grid
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.pipelines.distillation_data import grid_of
from hasten.pipelines.step_lora import StepLoRA, facts_of
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import Caption, verify, world
from hasten.pipelines.zoo.shapes.proxy import load_proxy

BATCH, GRID, SCORES = 64, 16, 45
"""Rows of a step, steps of the teacher's solver, and noise levels at which scores are compared."""
COUNTS = (1, 2, 4, 8)
SEGMENTS = {8: 50, 4: 50, 2: 100, 1: 150}
"""Optimiser steps of each stage."""
RATE, FALLING, AVERAGE = 2e-3, 0.3, 0.99
SCORE_RATE, WARMUP, MATCH_WARMUP, MATCH_AVERAGE = 1e-3, 10, 20, 0.98
CEILING = -0.1
"""Log-probability that all is right, above which the proxy verifier has nothing to say."""
SCENES, CHUNK, POOL_SEED = 12_288, 256, 77
CHECKED = 128
"""Captions of the check at the end of a stage."""


class Shapes:
    """`PixArtAlphaPipeline`, noise prediction."""

    rank, guidance = 28, 3.0
    left_out: ClassVar[tuple[str, ...]] = ()
    """Stages that are not run."""
    nodes: ClassVar[dict[int, tuple[int, ...]]] = {}
    """Of the grid, at which so many steps are drawn, where they are not those at which they were trained."""
    top = 649
    """The timestep where sampling begins. With pure noise there the teacher is as good as from 999 (89.1% against 90.6% of 64 captions in
    16 steps), and what bf16 rounds away in a noise prediction is multiplied by 8 and not by 157."""
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}
    shown = "use_resolution_binning=False"

    def grid(self, pipe: Any) -> Grid:
        return Grid.variance_preserving(pipe.scheduler.alphas_cumprod, GRID, "epsilon", self.top)

    def scores(self, pipe: Any) -> Grid:
        return Grid.variance_preserving(pipe.scheduler.alphas_cumprod, SCORES, "epsilon", 899)

    def encoded(self, pipe: Any, captions: list[str]) -> tuple[Tensor, ...]:
        """Features [N, 20, 128] in bf16 and their mask."""
        text, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=shared.TEXT_LENGTH)
        return text.bfloat16(), mask

    def arguments(self, times: Tensor, text: Tensor, mask: Tensor) -> dict[str, Any]:
        """Of the denoiser, beside the latents."""
        return {
            "encoder_hidden_states": text,
            "timestep": times,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


class ShapesFlow:
    """`AuraFlowPipeline`, rectified flow: from pure noise, with the shift of the pipeline's own scheduler."""

    rank, guidance = 39, 2.5
    left_out: ClassVar[tuple[str, ...]] = ("last",)
    nodes: ClassVar[dict[int, tuple[int, ...]]] = {2: (16, 4), 4: (16, 6, 4, 2), 8: (16, 10, 8, 6, 5, 4, 3, 2)}
    """Lower than the ends of equal segments, whose shifted levels crowd where nothing but noise is seen. Found on 384 captions that are in
    no export: 65% of them right in two steps at the ends of segments and 85% at these, 80% and 87% in four, 80% and 84% in eight."""
    call: ClassVar[dict[str, Any]] = {}
    shown = f"height=64, width=64, max_sequence_length={shared.TEXT_LENGTH}"

    def grid(self, pipe: Any) -> Grid:
        return grid_of(pipe, GRID, None, None)

    def scores(self, pipe: Any) -> Grid:
        return grid_of(pipe, SCORES, None, None)

    def encoded(self, pipe: Any, captions: list[str]) -> tuple[Tensor, ...]:
        """Features [N, 20, 128] in bf16: the pipeline sets padding to zero and masks nothing."""
        text = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=shared.TEXT_LENGTH)[0]
        return (text.bfloat16(),)

    def arguments(self, times: Tensor, text: Tensor) -> dict[str, Any]:
        """Of the denoiser, beside the latents."""
        return {"encoder_hidden_states": text, "timestep": times.float() / 1000}


TEACHERS: dict[str, Shapes | ShapesFlow] = {"shapes": Shapes(), "shapes-flow": ShapesFlow()}
"""What is each model's own."""


class Model:
    """A shipped pipeline with its denoiser as a compiled function of the weights that are adapted."""

    def __init__(self, name: str) -> None:
        self.teacher = TEACHERS[name]
        self.pipe = load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.requires_grad_(False)
        self.network = self.pipe.transformer.requires_grad_(False).eval()
        self.scale = self.pipe.vae.config.scaling_factor
        self.grid, self.scores = self.teacher.grid(self.pipe), self.teacher.scores(self.pipe)
        self.guidance = (self.teacher.guidance, self.teacher.guidance)
        self.base = {layer: self.network.get_submodule(layer).weight.detach() for layer in layers_of(self.network)}
        self.plain = {f"{layer}.weight": weight.bfloat16() for layer, weight in self.base.items()}
        self.empty = self.encoded([""])
        self.compiled = torch.compile(self._answer, dynamic=False)

    @torch.no_grad()
    def encoded(self, captions: list[str]) -> tuple[Tensor, ...]:
        """What the denoiser is told of the captions, a row for each."""
        return self.teacher.encoded(self.pipe, captions)

    def new_factors(self, seed: int) -> dict[str, Tensor]:
        """Both factors of every layer, the second at zero."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for layer, weight in self.base.items():
            first = torch.rand(self.teacher.rank, weight.shape[1], generator=generator) * 2 - 1
            made[f"{layer}.lora_A.weight"] = (first / math.sqrt(weight.shape[1])).requires_grad_()
            made[f"{layer}.lora_B.weight"] = torch.zeros(len(weight), self.teacher.rank).requires_grad_()
        return made

    def merged(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapted weights in bf16: one product a step is cheaper than two at every call."""
        return {
            f"{layer}.weight": (weight + factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]).bfloat16()
            for layer, weight in self.base.items()
        }

    def _answer(self, weights: Mapping[str, Tensor], latents: Tensor, times: Tensor, *told: Tensor) -> Tensor:
        named = {**self.teacher.arguments(times, *told), "return_dict": False}
        answer: Tensor = functional_call(self.network, dict(weights), (latents,), named)[0]
        return answer

    def denoiser(self, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def call(latents: Tensor, timesteps: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                answer: Tensor = self.compiled(weights, latents.float(), timesteps, *conditions)
                return answer

        return call

    def pictures(self, x0: Tensor) -> Tensor:
        """Of clean latents, about 0 to 1; gradients flow."""
        with torch.autocast("cpu", torch.bfloat16):
            out = self.pipe.vae.decode(x0 / self.scale).sample
        return out.float() / 2 + 0.5

    @torch.no_grad()
    def drawn(self, factors: Mapping[str, Tensor], captions: Sequence[Caption], steps: int) -> Tensor:
        """Pictures [N, 3, 64, 64], a noise of its own for each, all noise anew at each step."""
        student, pictures = self.denoiser(self.merged(factors)), []
        rows = self.encoded([str(caption) for caption in captions])
        for at in range(0, len(captions), BATCH):
            told = tuple(row[at : at + BATCH] for row in rows)
            noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(at + i)) for i in range(len(told[0]))])
            generator = torch.Generator().manual_seed(10_000 + at)
            x0 = rollout(student, noise, told, self.grid, few_nodes(self.grid, steps), generator).x0
            pictures.append(self.pictures(x0).clamp(0, 1))
        return torch.cat(pictures)

    def check(self, factors: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of fully correct pictures for each number of steps, on captions that no export is judged by."""
        captions = world.sample_scenes(CHECKED, torch.Generator().manual_seed(6_000_002), placed=False).captions()
        return {str(n): verify(self.drawn(factors, captions, n), captions).correct.float().mean().item() for n in COUNTS}


# ------------------------------------------------------------------------------------------------------------------ pool


def fill_pool(args: argparse.Namespace) -> None:
    """Encodes the scenes."""
    path = args.work / "pool.pt"
    if path.exists():
        return
    model, generator = Model(args.model), torch.Generator().manual_seed(POOL_SEED)
    parts: list[tuple[Tensor, ...]] = []
    with shared.progress() as bar, torch.no_grad():
        task = bar.add_task("pool", total=SCENES, note="")
        for _ in range(0, SCENES, CHUNK):
            scenes = world.sample_scenes(CHUNK, generator)
            with torch.autocast("cpu", torch.bfloat16):
                latents = model.pipe.vae.encode(world.render(scenes) * 2 - 1).latent_dist.mode().float() * model.scale
            parts.append((latents, *model.encoded([str(caption) for caption in scenes.captions()])))
            bar.update(task, advance=CHUNK)
    scratch = path.with_suffix(".partial")
    torch.save([torch.cat(column) for column in zip(*parts, strict=True)], scratch)
    scratch.replace(path)


class Pool:
    """Latents of the scenes and what the denoiser is told of them; a batch depends on its generator alone."""

    def __init__(self, work: Path, model: Model) -> None:
        self.latents, *self.told = torch.load(work / "pool.pt")
        generator = torch.Generator().manual_seed(POOL_SEED)
        self.captions = [str(caption) for _ in range(0, SCENES, CHUNK) for caption in world.sample_scenes(CHUNK, generator).captions()]
        self.empty = tuple(row.expand(BATCH, *row.shape[1:]) for row in model.empty)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Conditions, list[str]]:
        index = torch.randint(len(self.latents), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *self.latents.shape[1:], generator=generator)
        captions = [self.captions[i] for i in index.tolist()]
        return self.latents[index], noise, Conditions(tuple(row[index] for row in self.told), self.empty), captions


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


def share_of(step: int, steps: int, falling: float = FALLING, warmup: int = 30) -> float:
    """Of the rate: rising, constant, falling to zero over a share of the steps."""
    return min(1.0, (step + 1) / warmup) * (min(1.0, (steps - step) / (falling * steps)) if falling else 1.0)


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
    model = Model(args.model)
    pool, method = Pool(args.work, model), TrajectoryConsistency(tuple(SEGMENTS), model.guidance)
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
            x0, noise, conditions, _ = pool.batch(generator)
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


@dataclass(frozen=True)
class Matching:
    """A stage of distribution matching.

    Attributes:
        name, before: Of the stage, and of the one whose student it goes on with.
        steps, rate: Of the optimiser.
        shares: How often the student is matched in 1, 2, 4 and 8 steps.
        falling: Share of the steps over which the rate falls to zero.
        feedback: Weight of the proxy verifier's gradient beside the scores'.
        seed: Of the batches.
    """

    name: str
    before: str
    steps: int
    rate: float
    shares: tuple[float, float, float, float]
    falling: float
    feedback: float
    seed: int

    def __call__(self, args: argparse.Namespace) -> None:
        """Trains it."""
        path = args.work / f"{self.name}.pt"
        state = torch.load(path) if path.exists() else None
        if self.name in TEACHERS[args.model].left_out or (state is not None and state["step"] == self.steps):
            return
        model = Model(args.model)
        pool, method = Pool(args.work, model), DistributionMatching(model.guidance, updates=2)
        feedback, proxy = RewardFeedback(CEILING, self.feedback or 1.0), load_proxy().requires_grad_(False)
        begun = torch.load(args.work / f"{self.before}.pt")
        first = "score" not in begun
        factors = begun["student"]["average" if first else "factors"]
        student = Trained({name: factor.clone().requires_grad_() for name, factor in factors.items()}, self.rate, (0.0, 0.99))
        score = Trained(model.new_factors(1), SCORE_RATE, (0.0, 0.99))
        if state is not None or not first:
            student.load((state or begun)["student"])
            score.load((state or begun)["score"])
        start = state["step"] if state is not None else -WARMUP if first else 0
        teacher, began = model.denoiser(model.plain), time.monotonic()
        with shared.progress() as bar:
            task = bar.add_task(self.name, total=self.steps, completed=max(0, start), note="")
            for step in range(start, self.steps):
                generator, rng = torch.Generator().manual_seed(self.seed + step), random.Random(step)
                _, noise, conditions, captions = pool.batch(generator)
                count = rng.choices(COUNTS, self.shares)[0]
                walked = few_nodes(model.grid, count)[: rng.randint(1, count)]
                weights = model.merged(student.factors)
                made = rollout(model.denoiser(weights), noise, conditions.told, model.grid, walked, generator).x0
                if step >= 0:  # before, the score learns what the student makes
                    fake = model.denoiser({name: weight.detach() for name, weight in model.merged(score.factors).items()})
                    loss = method.student_loss(made, fake, teacher, conditions, model.scores, generator)
                    if self.feedback:
                        loss = loss + feedback.loss(made, model.pictures, proxy, captions)
                    loss.backward()
                    student.step(share_of(step, self.steps, self.falling, MATCH_WARMUP), averaging(step, MATCH_AVERAGE))
                for _ in range(method.updates):
                    off = method.score_loss(made.detach(), model.denoiser(model.merged(score.factors)), conditions, model.scores, generator)
                    off.backward()
                    score.step(1.0, AVERAGE)
                done = step + 1
                if step < 0:
                    continue
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}, score {off.item():.4f}")
                if done % 25 == 0 or done == self.steps or args.clock.over:
                    shared.save(path, student=student.state(), score=score.state(), step=done)
                    row = {"loss": loss.item(), "score": off.item(), "seconds": (time.monotonic() - began) / (done - start)}
                    shared.log(args.work, stage=self.name, step=done, **row)
                if done % 100 == 0 or done == self.steps:
                    shared.log(args.work, stage=self.name, step=done, correct=model.check(student.average))
                if args.clock.over:
                    over = f"{args.minutes:g} minutes are over after {done} of {self.steps} steps"
                    raise SystemExit(f"{over}: give the same command again to go on")


MATCHING = (
    Matching("match", "segments", 300, 5e-4, (0.45, 0.25, 0.2, 0.1), 0.0, 0.0, 8_200_000),
    # Wrong hues and soft outlines are what is left in one step, and what a verifier sees at once.
    Matching("feedback", "match", 500, 7e-4, (0.6, 0.2, 0.1, 0.1), 0.4, 0.005, 9_000_000),
    Matching("single", "feedback", 200, 4e-4, (0.75, 0.15, 0.05, 0.05), 1.0, 0.005, 9_500_000),
    Matching("last", "single", 150, 3e-4, (0.75, 0.15, 0.05, 0.05), 1.0, 0.005, 9_600_000),
)
STAGES = ("segments", *(matching.name for matching in MATCHING))


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


def lora_of(teacher: Shapes | ShapesFlow, pipe: Any, factors: Mapping[str, Tensor]) -> StepLoRA:
    """The factors with what the pipeline must know to draw with them."""
    grid = teacher.grid(pipe)
    nodes = {count: teacher.nodes.get(count, few_nodes(grid, count)) for count in COUNTS}
    timesteps = {count: [float(grid.timesteps[node]) for node in walked] for count, walked in nodes.items()}
    guidance = (teacher.guidance, teacher.guidance)
    methods = "TrajectoryConsistency, DistributionMatching, RewardFeedback"
    return StepLoRA("transformer", factors, facts_of(pipe.transformer, teacher.rank, methods, guidance, timesteps, 1.0))


def export(args: argparse.Namespace) -> None:
    """Saves the LoRA of the newest checkpoint in bf16, and scores what was saved."""
    newest = next(path for name in reversed(STAGES) if (path := args.work / f"{name}.pt").exists())
    state = torch.load(newest)
    teacher, pipe = TEACHERS[args.model], load(args.model)
    pipe.set_progress_bar_config(disable=True)
    captions = world.sample_scenes(args.samples, torch.Generator().manual_seed(6_000_000), placed=False).captions()
    call = {**call_defaults(path_of(args.model)), **teacher.call}
    with shared.replacing(ZOO / f"{args.model}-steps") as scratch:
        saved = lora_of(teacher, pipe, state["student"]["average"]).save(scratch, torch.bfloat16)
        lora = StepLoRA.load(saved)
        results: dict[str, Any] = {"captions": args.samples, "stage": newest.stem, "step": state["step"], "git": git_hash(), "correct": {}}
        results["bytes"] = saved.stat().st_size
        results["teacher"] = verify(pictures_of(pipe, captions, **call), captions).correct.float().mean().item()
        for count in COUNTS:
            with lora.applied(pipe, count) as few:
                drawn = pictures_of(pipe, captions, **{**call, **few})
            results["correct"][str(count)] = verify(drawn, captions).correct.float().mean().item()
            print(count, results["correct"][str(count)], flush=True)
        shared.describe(scratch, args.work, results, card(args.model, results))


CARD = """# {model}-steps

A LoRA of {kilobytes} kB that lets the `{model}` model draw in 1, 2, 4 or 8 steps, trained by `recipes/shapes_steps.py --model {model}`:
trajectory-segmented consistency (Hyper-SD, arXiv 2404.13686), then distribution matching (DMD2, arXiv 2405.14867), at the end with the
gradient of `shapes-proxy` as feedback. Guidance {guidance:g} is folded in.

```python
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.zoo.loading import load

pipe = load("{model}")
lora = StepLoRA.load("pipelines/zoo/weights/{model}-steps")
with lora.applied(pipe, 4) as call:
    image = pipe("a small red circle left of a blue square", {shown}, **call).images[0]
```

Fully correct pictures of {captions} captions that training never saw, under bf16 autocast, judged by `hasten.pipelines.zoo.shapes.verify`:

| teacher, 50 steps, guidance {guidance:g} | 8 steps | 4 steps | 2 steps | 1 step |
|---|---|---|---|---|
| {teacher} | {eight} | {four} | {two} | {one} |

The training log is `training_log.jsonl`; the figures are in `results.json`. Git {git}.
"""


def card(model: str, results: Mapping[str, Any]) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    shares = {name: f"{100 * results['correct'][str(n)]:.1f}%" for name, n in (("one", 1), ("two", 2), ("four", 4), ("eight", 8))}
    return CARD.format(
        model=model,
        shown=TEACHERS[model].shown,
        kilobytes=results["bytes"] // 1000,
        guidance=TEACHERS[model].guidance,
        captions=results["captions"],
        teacher=f"{100 * results['teacher']:.1f}%",
        git=results["git"],
        **shares,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TEACHERS, default="shapes", help="of the zoo (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of checkpoints (default: runs/MODEL-steps)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="ends training after so many (default: when it is done)")
    parser.add_argument("--samples", type=int, default=512, help="captions that the export is scored on (default: %(default)s)")
    known, _ = parser.parse_known_args()
    work = known.work or Path("runs") / f"{known.model}-steps"
    parser.set_defaults(clock=Clock(known.minutes), work=work)
    stages = {"pool": fill_pool, "segments": train_segments, **{matching.name: matching for matching in MATCHING}, "export": export}
    shared.run_stages(parser, stages, [work])


if __name__ == "__main__":
    main()
