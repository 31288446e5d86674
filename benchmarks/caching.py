"""`hasten bench caching`: plans against the plain pipeline and against fewer steps, for time and for quality.

Two models. `shapes` is the trained pipeline that ships, whose pictures can be checked exactly: time and quality. `xl` has the size
of PixArt-alpha-XL/2 at 256x256 pixels and random weights: time only. All variants take turns in one process on the same noise.

    python -m hasten.benchmarks.caching --quick
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.runtime import compute_all
from hasten.benchmarks.caching_page import page, rows_table
from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Ratios,
    Results,
    Timing,
    Variant,
    bars_table,
    command_line,
    conduct,
    interleave,
    median_interval,
    paired_difference,
    paired_ratios,
    results_page,
    spread,
    steady_memory,
    surroundings,
    unnoted,
    wilson,
)
from hasten.benchmarks.subjects import SIZES, Costs, Output, RandomSubject, ShapesSubject, Subject
from hasten.pipelines.zoo.loading import path_of
from hasten.pipelines.zoo.shapes import verify

ALL_COMPUTE_LIMIT, FORCE_STORE_LIMIT, BOUND_LIMIT = 1.01, 1.03, 0.95
"""The bars: time over plain of a plan that computes everything, the same with every offset stored, and speed-up over its bound."""

CONTROL_ROUNDS = 2
"""Rounds in which the plans that reuse nothing take part: those show bit-identity, their cost is told from short runs."""

NAME = "caching"
PAGE = results_page(NAME)


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        parts: "shapes", "xl", or both.
        captions, batch: Captions in all, and how many make one call. A round is one call of every variant.
        steps: DDIM steps on `shapes`.
        converged, converged_rounds: Steps of the converged reference, and in how many rounds it is computed.
        methods: Delta-DiT settings on `shapes`.
        xl_size, xl_steps, xl_rounds, xl_methods: The same for the random denoiser (batch 2: one picture under guidance).
        overhead_rounds: Most rounds of short paired runs from which the cost of a plan that reuses nothing is told.
        overhead_width: They end early when the 95% intervals are this narrow.
        minutes: After this no further optional round begins; None for no limit.
    """

    captions: int
    batch: int
    xl_rounds: int
    xl_steps: int
    methods: tuple[DeltaDiT, ...]
    xl_methods: tuple[DeltaDiT, ...]
    overhead_rounds: int
    parts: tuple[str, ...] = ("shapes", "xl")
    steps: int = 50
    converged: int = 500
    converged_rounds: int = 0
    xl_size: str = "xl"
    overhead_width: float = 0.004
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.xl_size not in SIZES:
            raise BenchError(f"size must be one of {', '.join(SIZES)}, not {self.xl_size!r}")
        if not self.parts or not set(self.parts) <= {"shapes", "xl"}:
            raise BenchError(f"parts must be of shapes and xl, not {self.parts}")
        if self.captions % self.batch:
            raise BenchError(f"captions must be a multiple of batch, not {self.captions} and {self.batch}")


_FEW = (DeltaDiT(interval=2, cached=0.5), DeltaDiT(interval=2, cached=0.75), DeltaDiT(interval=3, cached=0.75))
_MANY = (
    DeltaDiT(interval=2, cached=0.25),
    *_FEW,
    DeltaDiT(interval=2, cached=1.0),
    DeltaDiT(interval=4, cached=0.75),
    DeltaDiT(interval=2, cached=0.75, boundary=0.0),
    DeltaDiT(interval=2, cached=0.75, boundary=1.0),
    DeltaDiT(interval=2, cached=0.75, start=0.25),
)
QUICK = Settings(captions=64, batch=16, xl_rounds=6, xl_steps=8, methods=_FEW, xl_methods=_FEW, overhead_rounds=48, minutes=8.0)
"""Within ten minutes on two cores."""
FULL = Settings(
    captions=2048, batch=64, xl_rounds=9, xl_steps=20, methods=_MANY, xl_methods=_MANY[:6], overhead_rounds=120, converged_rounds=4
)


def fewer_steps(steps: int, computed: float) -> int:
    """Steps of a plain run that computes the same fraction, rounded to the nearest."""
    return max(1, math.floor(steps * computed + 0.5))


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Entry:
    """A line of the results: what is run, at how many steps, under which method."""

    variant: str
    kind: str
    steps: int
    method: DeltaDiT | Plan | None = None
    force_store: bool = False
    rounds: int | None = None


def entries(subject: Subject, methods: Sequence[DeltaDiT]) -> list[Entry]:
    """Plain, the two controls that reuse nothing, every method, and for each the plain run of the same computed fraction."""
    steps, everything = subject.steps, compute_all(subject.trace, subject.steps)
    found = [
        Entry("plain", "plain", steps),
        Entry("all-compute plan", "all-compute", steps, everything, rounds=CONTROL_ROUNDS),
        Entry("all-compute plan, force_store", "force-store", steps, everything, force_store=True, rounds=CONTROL_ROUNDS),
    ]
    fewer = []
    for method in methods:
        found.append(Entry(str(method), "delta-dit", steps, method))
        fewer.append(fewer_steps(steps, method.plan(subject.trace, steps).computed_fraction))
    found += [Entry(f"plain, {n} steps", "fewer-steps", n) for n in sorted(set(fewer), reverse=True) if n < steps]
    return found


@dataclass
class Measured:
    """Everything that was seen of one model."""

    subject: Subject
    entries: list[Entry]
    timings: dict[str, list[Timing]]
    outputs: dict[str, list[Output]]
    costs: Costs
    overhead: dict[str, Ratios]
    converged: list[Tensor]


def measure(
    subject: Subject,
    methods: Sequence[DeltaDiT],
    settings: Settings,
    *,
    rounds: int,
    least: int,
    short_steps: int,
    converged_rounds: int,
    deadline: float | None,
    note: Note,
) -> Measured:
    """Runs every entry in turns, with a plain run of timed blocks in every round, then the short paired runs.

    Args:
        least: Rounds that are made whatever the deadline.
        short_steps: Steps of the short runs.
    """
    chosen = entries(subject, methods)
    outputs: dict[str, list[Output]] = {entry.variant: [] for entry in chosen}
    costs = Costs.empty(subject.trace.sites)

    def runner(entry: Entry) -> Callable[[int], Timing]:
        def run(r: int) -> Timing:
            timing, output = subject.run(r, entry.steps, entry.method, force_store=entry.force_store)
            outputs[entry.variant].append(output)
            return timing

        return run

    def timed_blocks(r: int) -> Timing:
        spent, seconds = subject.run_timed_blocks(r, min(8, subject.steps))
        costs.add(spent, seconds)
        return Timing(seconds, seconds)

    variants = [Variant(entry.variant, runner(entry), entry.rounds) for entry in chosen]
    variants.insert(1, Variant("block times", timed_blocks))
    subject.run(0, min(2, subject.steps))
    total = sum(min(rounds, v.rounds or rounds) for v in variants)
    timings = interleave(
        variants, rounds, least=least, deadline=_share(deadline, 0.6), done=note(f"{subject.name}: variants in turns", total)
    )

    short = compute_all(subject.trace, short_steps)
    overhead = paired_ratios(
        lambda: subject.run(0, short_steps)[0],
        {
            "all-compute": lambda: subject.run(0, short_steps, short)[0],
            "force-store": lambda: subject.run(0, short_steps, short, force_store=True)[0],
        },
        rounds=settings.overhead_rounds,
        width=settings.overhead_width,
        deadline=deadline,
        done=note(f"{subject.name}: cost of a plan that reuses nothing", settings.overhead_rounds),
    )
    tick = note(f"{subject.name}: {settings.converged} steps", converged_rounds) if converged_rounds else lambda: None
    converged = []
    for r in range(converged_rounds):
        converged.append(subject.run(r, settings.converged)[1].latents)
        tick()
    return Measured(subject, chosen, timings, outputs, costs, overhead, converged)


# ---------------------------------------------------------------------------------------------------------------- figures


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean over the samples of |other - reference| / |reference|, over as many rounds as both have."""
    errors = [((b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)) for a, b in zip(reference, other, strict=False)]
    return float(torch.cat(errors).mean())


def psnr(reference: Tensor, other: Tensor) -> float:
    """Of uint8 pictures, in dB, from the mean square over all of them; infinite where they are equal."""
    mse = float((other.float() - reference.float()).square().double().mean())
    return math.inf if mse == 0 else 10 * math.log10(255.0**2 / mse)


def rows_of(measured: Measured, captions: Sequence[str] | None) -> list[dict[str, Any]]:
    """One row for each entry; quality only where there are captions to verify."""
    base = measured.timings["plain"]
    plain = measured.outputs["plain"]
    correct: list[bool] | None = None
    rows = []
    for entry in measured.entries:
        timings, outputs = measured.timings[entry.variant], measured.outputs[entry.variant]
        loop = [t.seconds for t in timings]
        ratios = [b.seconds / t.seconds for b, t in zip(base, timings, strict=False)]
        low, high = median_interval(ratios)
        median, least, most = spread(loop)
        report = outputs[0].report
        if isinstance(entry.method, DeltaDiT):
            bound = measured.costs.of(entry.method.plan(measured.subject.trace, entry.steps))
        else:
            bound = measured.subject.steps / entry.steps
        speedup = statistics.median(ratios)
        row: dict[str, Any] = {
            "model": measured.subject.name,
            "variant": entry.variant,
            "kind": entry.kind,
            "steps": entry.steps,
            "rounds": len(timings),
            "computed_fraction": report.computed_fraction if report is not None else entry.steps / measured.subject.steps,
            "seconds": median,
            "seconds_min": least,
            "seconds_max": most,
            "call_seconds": statistics.median(t.call_seconds for t in timings),
            "speedup": speedup,
            "speedup_low": low,
            "speedup_high": high,
            "call_speedup": statistics.median(b.call_seconds / t.call_seconds for b, t in zip(base, timings, strict=False)),
            "bound": bound,
            "ratio": speedup / bound,
            "state_bytes": max(o.report.state_bytes_peak if o.report is not None else 0 for o in outputs),
            "identical": all(_same(a, b) for a, b in zip(plain, outputs, strict=False)),
            "not_reused": sorted({reason for o in outputs if o.report is not None for reason in o.report.reasons}),
        }
        if entry.kind in measured.overhead:
            found = measured.overhead[entry.kind]
            low, high = median_interval(found.clock)
            row |= {"overhead": statistics.median(found.clock), "overhead_low": low, "overhead_high": high}
            row |= {"overhead_processor": statistics.median(found.processor), "overhead_rounds": len(found.clock)}
        if captions is not None:
            row["error"] = relative_error([o.latents for o in plain], [o.latents for o in outputs])
            if measured.converged:
                row["error_converged"] = relative_error(measured.converged, [o.latents for o in outputs])
            pictures = torch.cat([o.pictures for o in outputs if o.pictures is not None])
            row["psnr"] = psnr(torch.cat([o.pictures for o in plain if o.pictures is not None])[: len(pictures)], pictures)
            if len(pictures) == len(captions):
                right = verify(pictures, captions).correct.tolist()
                correct = right if correct is None else correct
                row["accuracy"] = float(np.mean(right))
                row["accuracy_low"], row["accuracy_high"] = wilson(sum(right), len(right))
                difference = paired_difference(correct, right)
                row |= {
                    "accuracy_difference": difference.value,
                    "accuracy_difference_low": difference.low,
                    "accuracy_difference_high": difference.high,
                }
        rows.append(row)
    return rows


def _same(a: Output, b: Output) -> bool:
    pictures = a.pictures is None or (b.pictures is not None and torch.equal(a.pictures, b.pictures))
    return a.latents.shape == b.latents.shape and torch.equal(a.latents, b.latents) and pictures


def bars_of(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of the issue, for each model that was measured."""
    bars = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        for kind, title, limit in (
            ("all-compute", "all-compute plan", ALL_COMPUTE_LIMIT),
            ("force-store", "all-compute plan with force_store", FORCE_STORE_LIMIT),
        ):
            row = next(row for row in mine if row["kind"] == kind)
            low, high = row["overhead_low"], row["overhead_high"]
            note = f"{_interval(low, high, row['overhead_rounds'])} paired rounds{_doubt(low, high, limit)}"
            note += f"; in processor time {row['overhead_processor']:.4f}"
            bars.append(Bar.at_most(f"{model}: time of the {title} over plain", row["overhead"], limit, note))
            unlike = 0 if row["identical"] else 1
            what = "latents and pictures" if "psnr" in row else "latents"
            note = f"{what} of {row['rounds']} full runs equal plain's bit for bit" if row["identical"] else f"{what} differ from plain's"
            bars.append(Bar.at_most(f"{model}: {title} differs from plain", unlike, 0, note))
        cached = [row for row in mine if row["kind"] == "delta-dit"]
        if model != ShapesSubject.name and cached:
            worst = min(cached, key=lambda row: row["ratio"])
            low, high = worst["speedup_low"] / worst["bound"], worst["speedup_high"] / worst["bound"]
            note = f"the worst of {len(cached)} settings, {worst['variant']}; {_interval(low, high, worst['rounds'])} rounds"
            note += _doubt(low, high, BOUND_LIMIT)
            bars.append(Bar.at_least(f"{model}: speed-up over its bound", worst["ratio"], BOUND_LIMIT, note))
    return bars


def _interval(low: float, high: float, n: int) -> str:
    # Fewer than six values cannot bracket a median with 95%.
    return f"{'95% interval' if n >= 6 else 'range'} {low:.4f} to {high:.4f}, {n}"


def _doubt(low: float, high: float, limit: float) -> str:
    return "; the limit lies inside: too noisy to tell" if low < limit < high else ""


# ------------------------------------------------------------------------------------------------------------------- run


def execute(settings: Settings, note: Note = unnoted, *, quick: bool, model: Path | None = None) -> Results:
    """Measures and returns the results, rows and bars filled in.

    Args:
        model: Folder of the `shapes` pipeline; the one that ships unless told.

    Raises:
        BenchError: The folder holds no pipeline.
    """
    if model is not None and not (model / "model_index.json").is_file():
        raise BenchError(f"--model: no diffusers pipeline in {model} (there is no model_index.json)")
    if "shapes" in settings.parts:
        try:
            folder = model if model is not None else path_of("shapes")
        except FileNotFoundError as error:
            raise BenchError(f"{error}; `python -m hasten.benchmarks.caching --only xl` runs without them") from None
    results = Results(NAME, quick, settings={**asdict(settings), "block_share": {}})
    results.settings["methods"] = [str(m) for m in settings.methods]
    results.settings["xl_methods"] = [str(m) for m in settings.xl_methods]
    steady_memory()
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes is not None else None
    if "shapes" in settings.parts:
        shapes = ShapesSubject(folder, captions=settings.captions, batch=settings.batch, steps=settings.steps)
        results.settings["guidance_scale"] = shapes.guidance_scale
        rounds = settings.captions // settings.batch
        measured = measure(
            shapes,
            settings.methods,
            settings,
            rounds=rounds,
            least=rounds,  # every caption is drawn, whatever the deadline
            short_steps=min(6, shapes.steps),
            converged_rounds=min(rounds, settings.converged_rounds),
            deadline=_share(deadline, 0.45),
            note=note,
        )
        results.rows += rows_of(measured, shapes.captions)
        results.settings["block_share"][shapes.name] = measured.costs.share
        del shapes, measured
    if "xl" in settings.parts:
        subject = RandomSubject(settings.xl_size, steps=settings.xl_steps)
        measured = measure(
            subject,
            settings.xl_methods,
            settings,
            rounds=settings.xl_rounds,
            least=min(3, settings.xl_rounds),
            short_steps=min(2, subject.steps),
            converged_rounds=0,
            deadline=deadline,
            note=note,
        )
        results.rows += rows_of(measured, None)
        results.settings["block_share"][subject.name] = measured.costs.share
    results.bars = bars_of(results.rows)
    return results


def _share(deadline: float | None, part: float) -> float | None:
    """The moment at which `part` of the time from now to the deadline is spent."""
    return None if deadline is None else time.monotonic() + part * (deadline - time.monotonic())


def run(
    quick: bool = False,
    json_path: Path | None = None,
    docs: Path | None = PAGE,
    *,
    settings: Settings | None = None,
    model: Path | None = None,
) -> int:
    """Runs the benchmark, prints the tables (bars last) and writes the results.

    Args:
        quick: Fewer captions, settings and steps; within ten minutes on two cores. Says so in what it writes.
        json_path: Where the JSON goes, or None.
        docs: Where the Markdown page goes; `docs/results/caching.md` in a source checkout, None where it is installed.
        settings: In place of the quick or full ones.
        model: Folder of the `shapes` pipeline; the one that ships unless told.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    chosen = {"settings": settings or (QUICK if quick else FULL), "quick": quick, "model": model}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs, shown=shown)


def shown(results: Results) -> str:
    """What is printed: a table for each model, the bars last."""
    parts = [surroundings(results)]
    for name in dict.fromkeys(row["model"] for row in results.rows):
        parts.append(f"{name}\n{rows_table([row for row in results.rows if row['model'] == name])}")
    return "\n\n".join([*parts, bars_table(results.bars)])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.caching`."""
    parser = command_line("caching", "Caching against plain and fewer steps.")
    parser.add_argument("--quick", action="store_true", help="within ten minutes on two cores")
    parser.add_argument("--only", choices=("shapes", "xl"), help="one of the two models; writes no page unless --docs is given")
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="xl", help="of the random denoiser; another than xl writes no page by itself"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another shapes pipeline; writes no page by itself")
    options = parser.parse_args(arguments)
    settings = replace(QUICK if options.quick else FULL, xl_size=options.size)
    if options.only:
        settings = replace(settings, parts=(options.only,))
    usual = options.only is None and options.size == "xl" and options.model is None
    docs = options.docs if options.docs is not None else PAGE if usual else None
    return run(options.quick, options.json, docs, settings=settings, model=options.model)


if __name__ == "__main__":
    raise SystemExit(main())
