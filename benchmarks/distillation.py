"""Step LoRAs, few-step solvers, tuning towards a preference, and few steps with caching and steering, on `shapes`.

    hasten bench distillation

Everything is judged by the exact verifier on captions that no training saw, in bfloat16, each picture from a noise of its own. Two short
trainings (segmented against plain consistency, and a preference) are run by the benchmark itself.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.distillation.adapters import LoRA
from hasten.accelerators.distillation.lcm import LCM
from hasten.accelerators.distillation.method import DistillationMethod
from hasten.accelerators.distillation.pso import OnlinePSO
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.accelerators.steering.fk import FKSteering
from hasten.benchmarks.distillation_page import page, pictures
from hasten.benchmarks.harness import (
    Bar,
    Note,
    Results,
    Timing,
    Variant,
    command_line,
    conduct,
    interleave,
    paired_difference,
    results_page,
    run_from_command_line,
    spread,
    steady_memory,
    wilson,
)
from hasten.pipelines.accelerated import accelerate
from hasten.pipelines.distilling import distill
from hasten.pipelines.solver_schedulers import EVODiffScheduler
from hasten.pipelines.steering import steer
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.tuning import tune
from hasten.pipelines.zoo.loading import call_defaults, load, path_of, step_loras
from hasten.pipelines.zoo.shapes import Caption, sample_scenes, verify
from hasten.pipelines.zoo.shapes.proxy import load_proxy
from hasten.pipelines.zoo.shapes.reward import ShapesReward
from hasten.pipelines.zoo.shapes.world import BACKGROUND

NAME = "distillation"
STEPS, COUNTS, BATCH = 50, (1, 2, 4, 8), 32
SEED, NOISE_SEED = 20_261_201, 20_261_202
TEACHER, STUDENT = "teacher, 50 steps", "step LoRA"
POINTS = {8: 1.0, 4: 3.0, 2: 8.0}
"""How many points below the teacher the student may be."""
ONE_STEP = 0.6
SOLVED = (5, 8, 10, 15, 20)
SOLVERS: dict[str, type[Any]] = {
    "DDIM": DDIMScheduler, "DPM++ 2M": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler, "EVODiff": EVODiffScheduler
}  # fmt: skip
REFERENCE = 1000
CACHED = {
    "one block in the middle": DeltaDiT(interval=2, cached=1, placement=2),
    "as published for LCM (b = 2), two blocks": DeltaDiT(interval=2, cached=2, boundary=2),
    "three front blocks in the last step": DeltaDiT(interval=2, cached=3, start=2, placement="front"),
}
"""Delta-DiT for four steps of seven blocks. The first has the least to lose; chosen on other captions."""
SEGMENTS = (4, 2, 1, 1, 1, 1, 1, 1)
"""Of equally long stages: most of a short training is spent on the segment that all steps share."""
PARTICLES, FEW, CALL = 4, 4, 8
LOST, CACHED_SPEED, TIME_SHARE = 1.0, 1.08, 1 / 3
PREFERENCE_LOST = 2.0
FULL: dict[str, Any] = {
    "captions": 512, "trained": 240, "judged": 128, "tuned": 60, "reference": 8, "solved": 64, "triples": 128, "rounds": 12
}  # fmt: skip
QUICK: dict[str, Any] = {
    "captions": 16, "trained": 2, "judged": 8, "tuned": 2, "reference": 2, "solved": 4, "triples": 4, "rounds": 2
}  # fmt: skip


@dataclass
class Bench:
    """The shipped model, its step LoRA, and how both are called."""

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.pipe: Any = load("shapes", self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = {**call_defaults(path_of("shapes")), "use_resolution_binning": False, "clean_caption": False}

    @cached_property
    def lora(self) -> StepLoRA:
        """What ships."""
        return StepLoRA.load(step_loras()["shapes-steps"])

    @staticmethod
    def captions(count: int, seed: int = SEED, objects: int | None = None) -> list[Caption]:
        """Of the whole world, or those that name so many things."""
        found: list[Caption] = []
        generator = torch.Generator().manual_seed(seed)
        while len(found) < count:
            drawn = sample_scenes(256, generator, placed=False).captions()
            found += [caption for caption in drawn if objects is None or len(caption.things) == objects]
        return found[:count]

    def draw(self, captions: Sequence[Caption], call: dict[str, Any], draw: Callable[..., Any] | None = None) -> Tensor:
        """Pictures [N, 3, 64, 64] in 0 to 1."""
        made = []
        for at in range(0, len(captions), BATCH):
            part = [str(caption) for caption in captions[at : at + BATCH]]
            generators = [torch.Generator().manual_seed(NOISE_SEED + at + i) for i in range(len(part))]
            with warnings.catch_warnings(action="ignore"):
                made.append((draw or self.pipe)(part, generator=generators, **{**self.call, "output_type": "pt", **call}).images.float())
        return torch.cat(made)

    def few(self, captions: Sequence[Caption], steps: int, lora: StepLoRA | None = None) -> Tensor:
        """What a student draws."""
        with (lora or self.lora).applied(self.pipe, steps) as call:
            return self.draw(captions, call)

    def solved(self, captions: Sequence[Caption], solver: str, steps: int, **call: Any) -> Tensor:
        """What the undistilled model draws with another solver."""
        before = self.pipe.scheduler
        self.pipe.scheduler = SOLVERS[solver].from_config(before.config, timestep_spacing="trailing")
        try:
            return self.draw(captions, {"num_inference_steps": steps, **call})
        finally:
            self.pipe.scheduler = before


def right(images: Tensor, captions: Sequence[Caption]) -> list[bool]:
    """Which pictures are fully correct."""
    found: list[bool] = verify(images, captions).correct.tolist()
    return found


def row_of(variant: str, steps: int, found: Sequence[bool], base: Sequence[bool] | None = None, **more: Any) -> dict[str, Any]:
    """A row with its interval; its change against `base` on the same captions."""
    low, high = wilson(sum(found), len(found))
    row = {
        "variant": variant,
        "steps": steps,
        "captions": len(found),
        "accuracy": sum(found) / len(found),
        "low": low,
        "high": high,
        **more,
    }
    if base is not None:
        change = paired_difference(list(base), list(found))
        row |= {"change": 100 * change.value, "change_low": 100 * change.low, "change_high": 100 * change.high}
    return row


# ------------------------------------------------------------------------------------------------------------ the student


def student_rows(bench: Bench, captions: int, note: Note) -> list[dict[str, Any]]:
    """The teacher, the student and the undistilled model in few steps, on the same captions."""
    texts, tick = bench.captions(captions), note("steps", 3 * len(COUNTS))
    base = right(bench.solved(texts, "DDIM", STEPS), texts)
    tick()
    rows = [row_of(TEACHER, STEPS, base)]
    for steps in COUNTS:
        rows.append(row_of(STUDENT, steps, right(bench.few(texts, steps), texts), base))
        tick()
        for solver in ("DDIM", "DPM++ 2M") if steps > 1 else ("DDIM",):  # one step of either is the same
            rows.append(row_of(f"undistilled, {solver}", steps, right(bench.solved(texts, solver, steps), texts), base))
            tick()
    return rows


def trained_rows(bench: Bench, steps: int, judged: int, note: Note) -> list[dict[str, Any]]:
    """Segmented and plain consistency training of the same adapters with equally many optimiser steps, on the teacher's own world."""
    texts, tick = bench.captions(judged, SEED + 1), note("trainings", 2)
    known = sample_scenes(1024 if steps > 10 else 16, torch.Generator().manual_seed(SEED + 2))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = [
            {"image": image, "text": str(caption)} for image, caption in zip(_pictures_of(known), known.captions(), strict=True)
        ]  # fmt: skip
        settings: dict[str, Any] = {
            "steps": steps, "lora": LoRA(28, merged=True), "call": {k: bench.call[k] for k in ("use_resolution_binning", "clean_caption")},
            "batch_size": 32, "learning_rate": 2e-3, "warmup": 20, "grid_steps": 16, "top": 649, "progress": False,
            "checkpoint_every": steps,
        }  # fmt: skip
        settings["call"]["max_sequence_length"] = bench.call.get("max_sequence_length", 20)
        rows = []
        methods: dict[str, DistillationMethod] = {
            "segmented": TrajectoryConsistency(SEGMENTS, (3.0, 3.0), huber=0.001),
            "LCM": LCM((3.0, 3.0), huber=0.001),
        }
        for name, method in methods.items():
            made = distill(bench.pipe, data, method, output=folder / name, **settings)
            for count in (1, 2, 4):
                images = bench.few(texts, count, made)
                share = float(ShapesReward(exact=1.0).score(images, [str(text) for text in texts]).mean())
                rows.append(row_of(name, count, right(images, texts), share=share))
            tick()
    return rows


def _pictures_of(scenes: Any) -> list[Any]:
    from PIL import Image

    from hasten.pipelines.zoo.shapes.world import render

    pixels = (render(scenes).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in pixels]


# -------------------------------------------------------------------------------------------------------------- preference


def painted(images: Tensor) -> Tensor:
    """[N] share of the picture that is no background."""
    background = torch.tensor(BACKGROUND, dtype=images.dtype).view(1, 3, 1, 1)
    return ((images - background).abs().amax(1) > 0.25).double().mean((1, 2))


def larger(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The preference: larger things, and nothing that the caption says the worse for it."""
    return 20 * ShapesReward(exact=1.0).score(images, prompts) + 20 * painted(images.float().clamp(0, 1))


def preference_rows(bench: Bench, steps: int, judged: int, note: Note) -> list[dict[str, Any]]:
    """The student of four steps, tuned towards larger things."""
    texts, tick = bench.captions(2 * judged, SEED + 3), note("preference", 1)
    prompts = [str(caption) for caption in bench.captions(512 if steps > 10 else 8, SEED + 4)]
    call = {name: bench.call[name] for name in ("use_resolution_binning", "clean_caption")}
    with tempfile.TemporaryDirectory() as scratch:
        tuned = tune(
            bench.pipe, bench.lora, prompts, OnlinePSO(), reward=larger, steps=steps, output=scratch, sampled_in=FEW, batch_size=32,
            learning_rate=2e-4, warmup=5, checkpoint_every=steps, merged=True, call=call, progress=False,
        )  # fmt: skip
    rows, base = [], None
    for name, lora in (("step LoRA", bench.lora), ("tuned towards larger things", tuned)):
        images = bench.few(texts, FEW, lora)
        found = right(images, texts)
        rows.append(row_of(name, FEW, found, base, painted=float(painted(images).mean())))
        base = found
    tick()
    return rows


# ----------------------------------------------------------------------------------------------------------------- solvers


def solver_rows(bench: Bench, reference: int, solved: int, note: Note) -> list[dict[str, Any]]:
    """Solvers by steps: their error against a run of a thousand steps, and their accuracy."""
    texts, tick = bench.captions(solved, SEED + 5), note("solvers", 1 + len(SOLVED) * len(SOLVERS))
    # In bfloat16 what a solver that predicts the clean sample loses to rounding in its first step is as large as what is measured.
    precise = Bench(torch.float32)
    exact = precise.solved(texts[:reference], "DDIM", REFERENCE, output_type="latent")
    tick()
    found: dict[tuple[str, int], list[float]] = {}
    for steps in SOLVED:
        for solver in SOLVERS:
            latents = precise.solved(texts[:reference], solver, steps, output_type="latent")
            found[solver, steps] = ((latents - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()
    rows = []
    for steps in SOLVED:
        for solver in SOLVERS:
            error, judged = found[solver, steps], right(precise.solved(texts, solver, steps), texts)
            rows.append(row_of(solver, steps, judged, error=sum(error) / len(error), errors=error))
            tick()
    return rows


# ------------------------------------------------------------------------------------- few steps with caching and steering


def combined_rows(bench: Bench, triples: int, note: Note) -> list[dict[str, Any]]:
    """Four steps with Delta-DiT and FK steering, in turns with the teacher, on captions of three things."""
    texts = bench.captions(triples, SEED + 6, objects=3)
    parts = [texts[at : at + CALL] for at in range(0, len(texts), CALL)]
    found: dict[str, list[bool]] = {}
    seconds: dict[str, float] = {}
    tick = note("few steps, steered, in turns", 3 * len(parts))
    quick = Bench()  # with the student applied once: what is timed is drawing
    with quick.lora.applied(quick.pipe, FEW) as call:
        fast = accelerate(quick.pipe, next(iter(CACHED.values())))
        # One look halfway, by the small proxy, and the exact verifier's choice at the end: judging costs as much as two of these steps.
        method = FKSteering(PARTICLES, start=0.5, end=0.5, ess=None)
        target = steer(fast, ShapesReward(), method, estimates=load_proxy(), kernel="scheduler")

        def steered(part: Sequence[Caption], number: int) -> Tensor:
            generator = torch.Generator().manual_seed(NOISE_SEED + number)
            arguments = {**quick.call, "output_type": "pt", **call, "generator": generator}
            with warnings.catch_warnings(action="ignore"):
                images: Tensor = target([str(caption) for caption in part], **arguments).images.float()
            return images

        ways: dict[str, Callable[[Sequence[Caption], int], Tensor]] = {
            TEACHER: lambda part, _: bench.solved(part, "DDIM", STEPS),
            f"step LoRA, {FEW} steps": lambda part, _: quick.draw(part, call),
            f"step LoRA, {FEW} steps, Delta-DiT, FK with {PARTICLES}": steered,
        }
        for way in ways.values():
            way(parts[0], 0)  # traced, and everything touched once
        for number, part in enumerate(parts):
            for name in ways if number % 2 == 0 else list(ways)[::-1]:
                began = time.perf_counter()
                images = ways[name](part, number)
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
                found.setdefault(name, []).extend(right(images, part))
                tick()
    base = found[TEACHER]
    return [
        row_of(name, STEPS if name == TEACHER else FEW, found[name], None if name == TEACHER else base, seconds=seconds[name] / len(texts))
        for name in ways
    ]


def cached_rows(bench: Bench, captions: int, rounds: int, note: Note) -> list[dict[str, Any]]:
    """Four steps with and without Delta-DiT: accuracy on the same captions, and time in turns."""
    texts = bench.captions(captions, SEED + 7)
    tick = note("few steps, cached, in turns", (1 + len(CACHED)) * rounds)
    with bench.lora.applied(bench.pipe, FEW) as call:
        ways = {"plain": bench.pipe, **{name: accelerate(bench.pipe, method) for name, method in CACHED.items()}}
        found = {name: right(bench.draw(texts, call, draw), texts) for name, draw in ways.items()}

        def timing(draw: Callable[..., Any]) -> Timing:
            began, spent = time.perf_counter(), time.process_time()
            bench.draw(texts[:BATCH], {**call, "output_type": "latent"}, draw)
            seconds = time.perf_counter() - began
            return Timing(seconds, seconds, time.process_time() - spent)

        variants = [Variant(name, lambda _, draw=draw: timing(draw)) for name, draw in ways.items()]  # type: ignore[misc]
        timings = interleave(variants, rounds, done=tick)
    rows = [row_of("plain", FEW, found["plain"], speedup=1.0)]
    for name in CACHED:
        ratios = [a.seconds / b.seconds for a, b in zip(timings["plain"], timings[name], strict=True)]
        middle, low, high = spread(ratios)
        more = {"speedup": middle, "speedup_low": low, "speedup_high": high, "computed": ways[name].report.computed_fraction}
        rows.append(row_of(name, FEW, found[name], found["plain"], **more))
    return rows


# -------------------------------------------------------------------------------------------------------------- everything


def execute(
    captions: int, trained: int, judged: int, tuned: int, reference: int, solved: int, triples: int, rounds: int, note: Note
) -> Results:
    """Measures all sections."""
    steady_memory()
    sizes = {"captions": captions, "trained": trained, "judged": judged, "tuned": tuned, "reference": reference, "solved": solved}
    results = Results(NAME, False, settings={**sizes, "triples": triples, "rounds": rounds})
    bench = Bench()
    results.settings["solvers"] = solver_rows(bench, reference, solved, note)
    results.settings["trained_rows"] = trained_rows(bench, trained, judged, note)
    results.settings["lora"] = {"method": bench.lora.facts["method"], "rank": bench.lora.rank, "hash": bench.lora.hash}
    results.rows = student_rows(bench, captions, note)
    results.settings["combined"] = combined_rows(bench, triples, note)
    results.settings["cached"] = cached_rows(bench, 2 * judged, rounds, note)
    results.settings["preference"] = preference_rows(bench, tuned, judged, note)
    results.bars = bars_of(results)
    return results


def bars_of(results: Results) -> list[Bar]:
    """The bars, from the rows."""
    settings = results.settings
    student = {row["steps"]: row for row in results.rows if row["variant"] == STUDENT}

    def interval(row: dict[str, Any]) -> str:
        return f"95% interval {row['change_low']:+.1f} to {row['change_high']:+.1f}; {100 * row['accuracy']:.1f}%"

    bars = [
        Bar.at_least(f"{steps} steps: points against the teacher's {STEPS}", student[steps]["change"], -points, interval(student[steps]))
        for steps, points in POINTS.items()
    ]
    bars.append(Bar.at_least("1 step: fully correct", student[1]["accuracy"], ONE_STEP))
    trained = {(row["variant"], row["steps"]): row for row in settings["trained_rows"]}
    for steps in (1, 2, 4):
        ours, theirs = trained["segmented", steps], trained["LCM", steps]
        note = f"fully correct {100 * ours['accuracy']:.1f}% and {100 * theirs['accuracy']:.1f}%"
        bars.append(Bar.at_least(f"segmented over LCM, {steps} steps: share of what is right", ours["share"] - theirs["share"], 0.0, note))
    before, after = settings["preference"]
    bars.append(Bar.at_least("preference: painted share, ratio", after["painted"] / before["painted"], 1.0))
    bars.append(Bar.at_least("preference: points", after["change"], -PREFERENCE_LOST, interval(after)))
    solvers = {(row["variant"], row["steps"]): row for row in settings["solvers"]}
    for steps in (8, 10):
        best = min(solvers[name, steps]["error"] for name in ("DPM++ 2M", "UniPC"))
        over = solvers["EVODiff", steps]["error"] / best
        bars.append(Bar.at_most(f"EVODiff, {steps} steps: error over the better of DPM++ 2M and UniPC", over, 1.0))
    teacher, _, steered = settings["combined"]
    bars.append(Bar.at_least("4 steps, Delta-DiT, FK with 4: points against the teacher's 50", steered["change"], 0.0, interval(steered)))
    bars.append(Bar.at_most("its time over the teacher's", steered["seconds"] / teacher["seconds"], TIME_SHARE))
    fast = [row for row in settings["cached"][1:] if row["speedup"] >= CACHED_SPEED] or settings["cached"][1:]
    cached = max(fast, key=lambda row: row["accuracy"])
    bars.append(Bar.at_least("4 steps with Delta-DiT: speed-up", cached["speedup"], CACHED_SPEED, cached["variant"]))
    bars.append(Bar.at_least("4 steps with Delta-DiT: points", cached["change"], -LOST, interval(cached)))
    return bars


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, **settings: Any) -> int:
    """Runs the benchmark and writes its page.

    Args:
        quick: Small settings; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/distillation.md, after a full run.
        settings: Of `execute`, in place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    chosen = {**(QUICK if quick else FULL), **settings}
    target = docs if docs is not None or quick else results_page(NAME)
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=target, pictures=pictures)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.distillation`."""
    meanings = {
        "captions": "captions for the table by steps",
        "trained": "optimiser steps of segmented and plain consistency training",
        "judged": "captions that those trainings and the preference are judged by",
        "tuned": "optimiser steps towards the preference",
        "reference": "captions with a run of a thousand steps",
        "solved": "captions that solvers are judged by",
        "triples": "captions of three things, for few steps with steering",
        "rounds": "timed rounds with and without caching",
    }
    settings = {name: (FULL[name], meaning) for name, meaning in meanings.items()}
    return run_from_command_line(run, command_line("distillation", __doc__), settings, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
