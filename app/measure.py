"""Plain, accelerated, and fewer steps for the same compute: the same noise, timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.app.drawing import Job, StepBar, pictures_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.accelerators.caching.plan import Plan
    from hasten.accelerators.caching.report import RunReport
    from hasten.pipelines.accelerated import AcceleratedPipeline

PATIENCE = 15.0
"""Seconds of one round up to which there are three rounds, so that the times are medians."""


@dataclass
class Variant:
    """One way to draw the captions.

    Attributes:
        name: "plain", "accelerated" or "fewer steps".
        steps: Denoising steps.
        images: One for each caption.
        rounds: (seconds in the denoiser loop, seconds of the whole calls) of every round, all captions together.
        correct: Verdicts of the shapes verifier; None where it cannot judge.
    """

    name: str
    steps: int
    images: list[Image] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    correct: list[bool | None] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Denoiser loop, median of the rounds."""
        return median(loop for loop, _ in self.rounds)

    @property
    def call_seconds(self) -> float:
        """Whole calls, median of the rounds."""
        return median(call for _, call in self.rounds)

    @property
    def verdict(self) -> str:
        """'4 of 5', or '' where the verifier cannot judge."""
        judged = [right for right in self.correct if right is not None]
        return f"{sum(judged)} of {len(judged)}" if judged else ""


@dataclass(frozen=True)
class Comparison:
    """Three variants of the same pictures, and what the accelerated one did."""

    job: Job
    plain: Variant
    accelerated: Variant
    fewer: Variant
    report: RunReport
    plan: Plan

    @property
    def variants(self) -> tuple[Variant, Variant, Variant]:
        return self.plain, self.accelerated, self.fewer

    @property
    def method(self) -> str:
        """The method's name, for headings."""
        return str(self.plan.facts.get("method", "plan"))

    def speedup(self, variant: Variant) -> float:
        """Of the denoiser loop, against plain."""
        return self.plain.seconds / variant.seconds if variant.seconds else math.nan

    def psnr(self, variant: Variant, picture: int | None = None) -> float:
        """Peak signal-to-noise ratio against plain in dB, of one picture or of all together; infinite where they are the same."""
        pairs = self._pairs(variant, picture)
        error = float(np.mean([np.mean((a - b) ** 2) for a, b in pairs]))
        return -10 * math.log10(error) if error > 0 else math.inf

    def error(self, variant: Variant, picture: int | None = None) -> float:
        """Relative L2 error of the pictures' values in [0, 1] against plain, of one picture or of all together."""
        pairs = self._pairs(variant, picture)
        norm = sum(float(np.sum(b**2)) for _, b in pairs)
        return math.sqrt(sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / norm) if norm else math.nan

    def _pairs(self, variant: Variant, picture: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        which = range(len(self.job)) if picture is None else [picture]
        return [(values(variant.images[i]), values(self.plain.images[i])) for i in which]

    def to_json(self) -> dict[str, Any]:
        """Plain data. PSNR is null where pictures are the same."""
        rows = []
        for variant in self.variants:
            pictures = [
                {"psnr": finite(self.psnr(variant, i)), "relative_l2": self.error(variant, i), "correct": right}
                for i, right in enumerate(variant.correct)
            ]
            rows.append(
                {
                    "variant": variant.name,
                    "steps": variant.steps,
                    "seconds": variant.seconds,
                    "seconds_min": min(loop for loop, _ in variant.rounds),
                    "seconds_max": max(loop for loop, _ in variant.rounds),
                    "call_seconds": variant.call_seconds,
                    "speedup": self.speedup(variant),
                    "psnr": finite(self.psnr(variant)),
                    "relative_l2": self.error(variant),
                    "correct": variant.verdict or None,
                    "pictures": pictures,
                }
            )
        return {"rounds": len(self.plain.rounds), "bound": self.report.bound, "variants": rows, "report": self.report.to_json()}

    def table(self) -> list[tuple[str, ...]]:
        """The figures as words, a heading first."""
        judged = bool(self.plain.verdict)
        heading = ("", "steps", "denoiser loop", "whole call", "speed-up", "at most", "PSNR", "relative L2 error", "correct")
        rows: list[tuple[str, ...]] = [heading]
        for variant in self.variants:
            same = variant is self.plain
            rows.append(
                (
                    variant.name,
                    str(variant.steps),
                    f"{variant.seconds:.2f} s",
                    f"{variant.call_seconds:.2f} s",
                    f"{self.speedup(variant):.2f}×",
                    f"{self.report.bound:.2f}×" if variant is self.accelerated and self.report.bound is not None else "–",
                    "–" if same else decibels(self.psnr(variant)),
                    "–" if same else f"{self.error(variant):.3f}",
                    variant.verdict,
                )
            )
        return rows if judged else [row[:-1] for row in rows]


def values(image: Image) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    return np.asarray(image, dtype=np.float64) / 255


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def decibels(value: float) -> str:
    """'31.4 dB', or 'identical'."""
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def judge(images: Sequence[Image], captions: Sequence[str], shapes: bool) -> list[bool | None]:
    """The shapes verifier's verdicts; None for captions outside its world, and for other models' pictures."""
    from hasten.pipelines.zoo.shapes import RESOLUTION, parse, verify

    known: dict[int, Any] = {}
    for i, caption in enumerate(captions):
        if shapes and images[i].size == (RESOLUTION, RESOLUTION):
            try:
                known[i] = parse(caption)
            except ValueError:
                continue  # not a sentence of that world: nothing to check it by
    verdict = verify([images[i] for i in known], list(known.values())) if known else None
    right = dict(zip(known, verdict.correct.tolist(), strict=True)) if verdict is not None else {}
    return [right.get(i) for i in range(len(captions))]


def measure(fast: AcceleratedPipeline, job: Job, *, shapes: bool = False, rounds: int | None = None) -> Comparison:
    """Draws the job plainly, accelerated, and plainly with so few steps that the same fraction is computed, in turns.

    Args:
        fast: The accelerated pipeline; its plain runs are timed through the same wrapper.
        job: What to draw.
        shapes: Whether the shapes verifier is to judge.
        rounds: How often; three where a round takes no longer than `PATIENCE`, else once.

    Raises:
        PlanError: The plan does not fit.
    """
    variants: dict[str, Variant] = {}
    first: RunReport | None = None
    with StepBar(3 * len(job.batches), "warming up") as bar:

        def run(name: str, steps: int, call: Callable[..., Any], pictures: range, keep: bool) -> tuple[float, float]:
            with bar.call(fast.pipe.scheduler, name):
                output = call(**job.call(pictures, steps))
            images = pictures_of(fast.pipe, output)
            variant = variants.setdefault(name, Variant(name, steps))
            if keep:
                variant.images += images
            return fast.report.seconds, fast.report.call_seconds

        # The first call of every batch size traces the denoiser and warms caches; it is not timed.
        for pictures in {len(pictures): pictures for pictures in job.batches}.values():
            fast.baseline(**job.call(pictures, min(2, job.steps)))
        fewer = job.steps
        done = 0
        while rounds is None or done < rounds:
            times: dict[str, tuple[float, float]] = {}
            for pictures in job.batches:
                for name in ("accelerated", "plain", "fewer steps"):
                    steps = fewer if name == "fewer steps" else job.steps
                    loop, whole = run(name, steps, fast if name == "accelerated" else fast.baseline, pictures, keep=done == 0)
                    if name == "accelerated" and first is None:
                        first = fast.report
                        fewer = max(1, round(job.steps * first.computed_fraction))
                    before = times.get(name, (0.0, 0.0))
                    times[name] = (before[0] + loop, before[1] + whole)
            for name, time in times.items():
                variants[name].rounds.append(time)
            done += 1
            if rounds is None:
                rounds = 3 if sum(whole for _, whole in times.values()) < PATIENCE else 1
                bar.expect(3 * rounds * len(job.batches))
    for variant in variants.values():
        variant.correct = judge(variant.images, job.captions, shapes)
    assert first is not None and first.plan is not None
    return Comparison(job, variants["plain"], variants["accelerated"], variants["fewer steps"], first, first.plan)
