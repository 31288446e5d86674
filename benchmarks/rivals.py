"""The planner against every other way to save the same time: other projects' caches, simpler methods, and fewer steps.

    hasten bench caching-rivals

On the trained models, with a first-order and a second-order solver each, on the same captions and noise. A rival's error at a speed-up is
read off its own front of measured time and error, between settings and never beyond them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.first_block import FirstBlock
from hasten.accelerators.caching.forecast import Forecast, forecast_plan
from hasten.accelerators.caching.magcache import MagCache
from hasten.accelerators.caching.teacache import TeaCache
from hasten.accelerators.caching.trace import Trace
from hasten.accelerators.scheduler_hook import hooked
from hasten.benchmarks import peers
from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Results,
    bars_last,
    command_line,
    conduct,
    paired_difference,
    publish,
    read_results,
    refused,
    results_page,
    steady_memory,
    table,
)
from hasten.benchmarks.subjects import NOISE_SEED, LoopClock
from hasten.pipelines.accelerated import AcceleratedPipeline, accelerate, trace
from hasten.pipelines.calibration import calibrate
from hasten.pipelines.planning import front
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import sample_scenes, verify

NAME, PICTURE = "caching-rivals", "caching-rivals.png"
STEPS = 50
CONVERGED_STEPS = 500
"""Of the second reference: what the same solver ends in when its steps are no limit."""
SPEEDUPS = (1.5, 2.0, 3.0)
"""At which the bars are read."""
SHARE_OF_BEST_PEER = 0.7
PREDICTION_FACTOR = 2.0
CALIBRATION_SEED, HELD_OUT_SEED, ACCURACY_SEED = 20_260_201, 20_260_202, 20_260_203
"""Fixed before the first measurement."""
ACCURACY = "change of accuracy at 2x, points"
PLAIN, PLANNER, FEWER, HAND = "plain", "planner", "fewer steps", "hand-made schedule"


def _ddim(config: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config)


def _dpm(config: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(config)


def _euler(config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


def _flow_dpm(config: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.get("shift", 1.0))


CASES: dict[str, tuple[str, Callable[[Any], Any], int]] = {
    "shapes, DDIM": ("shapes", _ddim, 1),
    "shapes, DPM++ 2M": ("shapes", _dpm, 2),
    "shapes-flow, Euler": ("shapes-flow", _euler, 1),
    "shapes-flow, DPM++ 2M": ("shapes-flow", _flow_dpm, 2),
}
"""By name: the model, its scheduler made from the shipped one's config, and the solver's order."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        cases: Of `CASES`.
        captions: Held-out captions, drawn in one timed call by each variant in each round.
        more: Further batches of as many captions, not timed, for the settings that are on their family's front.
        rounds: Times that every variant is timed.
        between: Variants between two plain runs; a variant is compared with the mean of the two around it.
        calibration: Captions that calibrated methods are calibrated on.
        accuracy: Captions for the verifier's verdict at 2x; 0 for none.
        counts: Steps that the planner computes in full.
        families: The only ways to save time that are run; all of them where none is named.
    """

    cases: tuple[str, ...] = tuple(CASES)
    captions: int = 8
    more: int = 5
    rounds: int = 1
    between: int = 5
    calibration: int = 16
    accuracy: int = 256
    counts: tuple[int, ...] = (37, 31, 26, 23, 19, 16, 14, 11)
    families: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.cases or not set(self.cases) <= set(CASES):
            raise BenchError(f"cases must be of {', '.join(CASES)}, not {self.cases}")
        if self.captions < 2 or self.rounds < 1 or self.calibration < 2 or self.more < 0:
            raise BenchError("captions and calibration must be at least 2, rounds at least 1, more at least 0")


@dataclass(frozen=True)
class Variant:
    """One setting of one way to save time."""

    family: str
    text: str
    method: Any = None
    steps: int = STEPS
    predicted: float | None = None


class Drawer:
    """A pipeline with a solver, drawing fixed captions on fixed noise to the final latents, a batch in a call."""

    def __init__(self, case: str, captions: Sequence[str], seed: int, batch: int | None = None) -> None:
        model, scheduler, self.order = CASES[case]
        self.case, self.model, self.captions = case, model, list(captions)
        self.batch = batch or len(self.captions)
        self.pipe: Any = load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = scheduler(self.pipe.scheduler.config)
        own = {"clean_caption": False, "use_resolution_binning": False} if model == "shapes" else {}
        self.call = {**call_defaults(path_of(model)), **own}
        self.call.pop("num_inference_steps", None)
        config = self.pipe.transformer.config
        shape = (len(self.captions), config.in_channels, config.sample_size, config.sample_size)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.trace: Trace = trace(self.pipe, **self.arguments(2))
        self._wrappers: dict[int, AcceleratedPipeline] = {}

    def arguments(self, steps: int, part: int = 0) -> dict[str, Any]:
        at = slice(part * self.batch, (part + 1) * self.batch)
        return {
            **self.call, "prompt": self.captions[at], "latents": self.noise[at], "num_inference_steps": steps, "output_type": "latent",
            "return_dict": False,
        }  # fmt: skip

    def draw(self, target: Any, steps: int, parts: Sequence[int] = (0,)) -> tuple[float, Tensor]:
        """Seconds of the sampling loop of the last batch, and the final latents of all."""
        made = []
        for part in parts:
            clock = LoopClock()
            with hooked(self.pipe.scheduler, clock), torch.no_grad():
                made.append(torch.as_tensor(target(**self.arguments(steps, part))[0]).float())
        return clock.timing(0.0).seconds, torch.cat(made)

    def run(self, variant: Variant, parts: Sequence[int] = (0,)) -> tuple[float, Tensor]:
        """As `draw`, under a variant.

        Raises:
            Exception: A peer's own error.
        """
        if variant.method is None:
            return self.draw(self.pipe, variant.steps, parts)
        if isinstance(variant.method, peers.Peer):
            with variant.method.on(self.pipe, steps=STEPS, calibration=lambda pipe: self.draw(pipe, STEPS)) as pipe:
                return self.draw(pipe, STEPS, parts)
        key = id(variant.method)
        if key not in self._wrappers:
            self._wrappers[key] = accelerate(self.pipe, variant.method)
            self._wrappers[key].traces["transformer"] = self.trace
        return self.draw(self._wrappers[key], STEPS, parts)

    def pictures(self, latents: Tensor) -> Tensor:
        """uint8 [N, 3, 64, 64]."""
        with torch.no_grad():
            images = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def captions(count: int, seed: int) -> list[str]:
    """Captions never seen in training."""
    return [str(caption) for caption in sample_scenes(count, torch.Generator().manual_seed(seed), held_out=False, placed=False).captions()]


def hand_made(found: Trace, steps: int, dense: int, interval: int, order: int) -> Any:
    """The same compute spent densely on the first steps and then at an interval, with a forecast."""
    computed = [k < dense or (k - dense) % interval == interval - 1 for k in range(steps)]
    return forecast_plan(found, computed, order=order, method=f"first {dense}, then every {interval}, order {order}")


def variants(drawer: Drawer, settings: Settings) -> list[Variant]:
    """All that is compared."""
    known = captions(settings.calibration, CALIBRATION_SEED)
    call = {**drawer.call, "num_inference_steps": STEPS}

    def planned() -> list[Variant]:
        plans = front(drawer.pipe, known, settings.counts, batch=drawer.batch, seed=NOISE_SEED, **call)
        return [Variant(PLANNER, plan.facts["method"], plan, predicted=predicted) for plan, predicted in plans.values()]

    def fewer() -> list[Variant]:
        return [Variant(FEWER, f"{steps} steps", steps=steps) for steps in (40, 33, 29, 25, 22, 19, 16, 14, 12, 10)]

    def by_hand() -> list[Variant]:
        grid = ((24, 2, 1), (18, 2, 1), (12, 3, 1), (12, 3, 2), (8, 3, 1), (10, 4, 1), (6, 4, 1), (4, 5, 1))
        plans = [hand_made(drawer.trace, STEPS, dense, interval, order) for dense, interval, order in grid]
        return [Variant(HAND, str(plan.facts["method"]), plan) for plan in plans]

    def delta() -> list[Variant]:
        grid = ((2, 0.5), (2, 0.75), (2, 1.0), (3, 0.75), (3, 1.0), (4, 1.0))
        return [Variant("Delta-DiT", str(m), m) for n, c in grid for m in [DeltaDiT(interval=n, cached=c)]]

    def forecast() -> list[Variant]:
        return [Variant("forecast", str(m), m) for n in (2, 3, 4) for o in (1, 2) for m in [Forecast(interval=n, order=o)]]

    def first_block() -> list[Variant]:
        return [Variant("first-block", str(m), m) for t in (0.03, 0.05, 0.08, 0.12, 0.2, 0.3) for m in [FirstBlock(threshold=t, warmup=4)]]

    def teacache() -> list[Variant]:
        tea = calibrate(drawer.pipe, known, TeaCache(), batch=drawer.batch, progress=False, **call)
        return [Variant("TeaCache", str(m), m) for t in (0.07, 0.1, 0.15, 0.2, 0.25, 0.3) for m in [replace(tea, threshold=t)]]

    def magcache() -> list[Variant]:
        grid = ((0.02, 1, 0.3), (0.03, 2, 0.2), (0.06, 3, 0.2), (0.12, 3, 0.2), (0.24, 4, 0.1), (0.3, 5, 0.1))
        plans = [calibrate(drawer.pipe, known[:1], MagCache(*values), progress=False, **call) for values in grid]
        return [Variant("MagCache", str(plan.facts["method"]), plan) for plan in plans]

    own = {
        PLANNER: planned, FEWER: fewer, HAND: by_hand, "Delta-DiT": delta, "forecast": forecast, "first-block": first_block,
        "TeaCache": teacache, "MagCache": magcache,
    }  # fmt: skip
    there = peers.installed()
    others = {name: f"{name} {there[name]}" for name in peers.families_for(drawer.pipe) if there[name] is not None}
    wanted = settings.families or (*own, *others)
    found = [variant for name, make in own.items() if name in wanted for variant in make()]
    found += [Variant(text, str(peer), peer) for name, text in others.items() if name in wanted for peer in peers.grid(name)]
    if not found:
        raise BenchError(f"families must be of {', '.join((*own, *others))}, not {', '.join(wanted)}")
    return found


def relative_errors(reference: Tensor, other: Tensor) -> np.ndarray:
    """[samples] |other - reference| / |reference|."""
    return np.asarray((other - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1))


def typical(errors: np.ndarray) -> float:
    """Geometric mean."""
    return float(np.exp(np.log(np.maximum(errors, 1e-9)).mean()))


def _errors(reference: Tensor, other: Tensor, converged: Tensor) -> dict[str, Any]:
    errors, from_converged = relative_errors(reference, other), relative_errors(converged, other)
    return {
        "errors": [float(error) for error in errors],
        "error": float(errors.mean()),
        "error_typical": typical(errors),
        "error_high": float(errors.max()),
        "error_converged": float(from_converged.mean()),
        "error_converged_typical": typical(from_converged),
    }


def measure(case: str, settings: Settings, tick: Callable[[], None]) -> tuple[list[dict[str, Any]], list[Bar]]:
    """All variants of one case in turns, each beside a plain run."""
    parts = range(settings.more + 1)
    drawer = Drawer(case, captions(settings.captions * len(parts), HELD_OUT_SEED), NOISE_SEED, settings.captions)
    plain = Variant("plain", f"{STEPS} steps")
    _, reference = drawer.run(plain, parts)
    _, converged = drawer.draw(drawer.pipe, CONVERGED_STEPS, parts)
    chosen = variants(drawer, settings)
    seconds: dict[int, list[tuple[float, int]]] = {i: [] for i in range(len(chosen))}
    latents: dict[int, Tensor] = {}
    failed: dict[int, str] = {}
    plains = [drawer.run(plain)[0]]
    for number, i in enumerate(i for _ in range(settings.rounds) for i in range(len(chosen))):
        try:
            if isinstance(chosen[i].method, peers.Peer) and i not in latents and i not in failed:
                with chosen[i].method.on(drawer.pipe, steps=STEPS, calibration=lambda pipe: drawer.draw(pipe, STEPS)):
                    pass  # imports and calibration are not timed
            spent, latents[i] = drawer.run(chosen[i])
            seconds[i].append((spent, len(plains)))
        except Exception as error:  # the peer's own failure is its result
            if not isinstance(chosen[i].method, peers.Peer):
                raise
            failed[i] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if number % settings.between == settings.between - 1:
            plains.append(drawer.run(plain)[0])
        tick()
    plains.append(drawer.run(plain)[0])

    def row(i: int) -> dict[str, Any]:
        head = {"case": case, "family": chosen[i].family, "variant": chosen[i].text}
        if i in failed:
            return {**head, "failed": failed[i]}
        speedup = statistics.median((plains[at - 1] + plains[at]) / 2 / spent for spent, at in seconds[i])
        so_far = slice(len(latents[i]))
        found = _errors(reference[so_far], latents[i], converged[so_far])
        return {**head, "speedup": speedup, **found, "predicted": chosen[i].predicted}

    for i in contenders([row(i) for i in range(len(chosen))]):
        latents[i] = torch.cat([latents[i], drawer.run(chosen[i], parts[1:])[1]]) if settings.more else latents[i]
        tick()
    first = {"case": case, "family": PLAIN, "variant": plain.text, "speedup": 1.0, **_errors(reference, reference, converged)}
    rows = [first, *(row(i) for i in range(len(chosen)))]
    bars = bars_of(case, rows)
    if settings.accuracy:
        bars += accuracy(case, chosen, rows[1:], settings)
    return rows, bars


# ------------------------------------------------------------------------------------------------------------------- fronts


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(speed-up, error) of the settings that no other beats in both, by speed-up."""
    best: list[tuple[float, float]] = []
    for speedup, error in sorted(points, reverse=True):
        if not best or error < best[-1][1]:
            best.append((speedup, error))
    return best[::-1]


def contenders(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The planner's settings, and of every other family those on its front that speed-ups are read from."""
    found = set()
    for family in {row["family"] for row in rows}:
        of = [i for i, row in enumerate(rows) if row["family"] == family and "speedup" in row]
        for key in ("error", "error_typical"):
            front = set(pareto([(rows[i]["speedup"], rows[i][key]) for i in of]))
            beyond = min((rows[i]["speedup"] for i in of if rows[i]["speedup"] >= SPEEDUPS[-1]), default=np.inf)
            found |= {
                i
                for i in of
                if family == PLANNER or ((rows[i]["speedup"], rows[i][key]) in front and 1.2 <= rows[i]["speedup"] <= max(beyond, 3.5))
            }
    return sorted(found)


def error_at(points: Sequence[tuple[float, float]], speedup: float) -> float | None:
    """Error at a speed-up on the front: straight between its settings in log error, None beyond them.

    A front that begins above the speed-up is read at its first setting: that one is faster and no worse.
    """
    line = pareto(points)
    if not line or speedup > line[-1][0]:
        return None
    if speedup <= line[0][0]:
        return line[0][1]
    x, y = (np.array(column) for column in zip(*line, strict=True))
    return float(np.exp(np.interp(speedup, x, np.log(np.maximum(y, 1e-12)))))


def points_of(rows: Sequence[Mapping[str, Any]], family: str, key: str = "error") -> list[tuple[float, float]]:
    """Measured (speed-up, error) of a family's settings, as far as they were drawn on all captions."""
    most = max((len(row.get("errors", ())) for row in rows), default=0)
    mine = [row for row in rows if row["family"] == family and "speedup" in row]
    return [(row["speedup"], row[key]) for row in mine if len(row.get("errors", ())) == most]


def ratio_interval(
    rows: Sequence[Mapping[str, Any]], rival: str, speedup: float, kind: str, draws: int = 400
) -> tuple[float, float] | None:
    """95% interval of the planner's error over a rival's, from captions drawn with replacement; None where too few can be read."""
    most = max((len(row.get("errors", ())) for row in rows), default=0)
    known = [row for row in rows if row["family"] in (PLANNER, rival) and "speedup" in row and len(row.get("errors", ())) == most]
    if not known or most < 2:
        return None
    table = np.array([row["errors"] for row in known])
    table = np.log(np.maximum(table, 1e-9)) if kind == "typical" else table
    random, found = np.random.default_rng(0), []
    for _ in range(draws):
        means = table[:, random.integers(0, most, most)].mean(1)
        means = np.exp(means) if kind == "typical" else means
        ends = [
            error_at([(row["speedup"], float(m)) for row, m in zip(known, means, strict=True) if row["family"] == family], speedup)
            for family in (PLANNER, rival)
        ]
        if ends[0] is not None and ends[1]:
            found.append(ends[0] / ends[1])
    if len(found) < draws // 2:
        return None
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def bars_of(case: str, rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The planner's error against each rival's at every speed-up, and against its own prediction."""
    bars = []
    families = [family for family in dict.fromkeys(row["family"] for row in rows) if family not in (PLAIN, PLANNER)]
    others = {family for family in families if any(family.startswith(name) for name in peers.installed())}
    for key, kind in (("error", "mean"), ("error_typical", "typical")):
        for speedup in SPEEDUPS:
            mine = error_at(points_of(rows, PLANNER, key), speedup)
            found = {family: error_at(points_of(rows, family, key), speedup) for family in families}
            rivals = {family: error for family, error in found.items() if error is not None}
            head = f"{case}, {kind} error at {speedup:g}x: planner over"
            if mine is None:
                bars.append(Bar.at_most(f"{head} its rivals", float("inf"), 1.0, "the planner is not that fast here"))
                continue
            groups = {
                "the best of peers and fewer steps": {f: e for f, e in rivals.items() if f in others or f == FEWER},
                "the best of our other methods": {f: e for f, e in rivals.items() if f not in others and f != FEWER},
                "the best peer (half is the aim)": {f: e for f, e in rivals.items() if f in others and speedup == 2.0},
            }
            for title, group in groups.items():
                if group:
                    best = min(group, key=lambda family: group[family])
                    limit = SHARE_OF_BEST_PEER if "half" in title else 1.0
                    note = f"planner {mine:.4f}, {best} {group[best]:.4f}"
                    interval = ratio_interval(rows, best, speedup, kind)
                    if interval is not None:
                        note += f"; 95% interval of the ratio over captions {interval[0]:.2f} to {interval[1]:.2f}"
                    bars.append(Bar.at_most(f"{head} {title}", mine / group[best], limit, note))
    factors = [max(a / b, b / a) for row in rows if (a := row.get("predicted")) and (b := row.get("error_typical"))]
    if factors:
        note = f"the worst of {len(factors)} plans; geometric means over captions on both sides"
        bars.append(Bar.at_most(f"{case}: replayed over predicted error, either way", max(factors), PREDICTION_FACTOR, note))
    return bars


def accuracy(case: str, chosen: Sequence[Variant], rows: Sequence[Mapping[str, Any]], settings: Settings) -> list[Bar]:
    """The verifier's verdict on plain and on the planner's slowest plan of at least 2x, on captions and noise of their own."""
    fast = [(row["speedup"], v) for row, v in zip(rows, chosen, strict=True) if v.family == PLANNER and row.get("speedup", 0) >= 2.0]
    if not fast:
        return []
    _, variant = min(fast, key=lambda pair: pair[0])
    words = captions(settings.accuracy, ACCURACY_SEED)
    drawer = Drawer(case, words, ACCURACY_SEED)
    verdicts = []
    for each in (Variant("plain", ""), variant):
        _, latents = drawer.run(each)
        verdicts.append(verify(drawer.pictures(latents), words).correct.tolist())
    change = paired_difference(*verdicts)
    interval = f"95% interval of the change {100 * change.low:+.1f} to {100 * change.high:+.1f}"
    note = f"{variant.text}; plain {100 * np.mean(verdicts[0]):.1f}%, {interval}"
    return [Bar.at_least(f"{case}: {ACCURACY} ({settings.accuracy} captions)", 100 * change.value, -1.0, note)]


# --------------------------------------------------------------------------------------------------------------------- page


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against measured speed-up, a panel for each case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    across = min(2, len(cases))
    figure = Figure(figsize=(7 * across, 5 * -(-len(cases) // across)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-len(cases) // across), across, squeeze=False)).ravel()
    families = list(dict.fromkeys(row["family"] for row in rows if "speedup" in row and row["family"] != PLAIN))
    from matplotlib import colormaps

    colours = {family: colormaps["tab20"](i % 20) for i, family in enumerate(families)}
    for axis, case in zip(axes, cases, strict=False):
        for family in families:
            points = points_of([row for row in rows if row["case"] == case], family)
            if not points:
                continue
            strong = family in (PLANNER, FEWER)
            colour = {PLANNER: "black", FEWER: "red"}.get(family, colours[family])
            axis.scatter(*zip(*points, strict=True), s=14 if strong else 8, color=colour, alpha=0.5)
            axis.plot(*zip(*pareto(points), strict=True), color=colour, linewidth=2.5 if strong else 1, label=family)
        axis.set(title=case, xlabel="measured speed-up of the loop", ylabel="relative L2 error of the latents", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    lines = [
        f"{STEPS} steps, the same noise for all. Times: {s['captions']} held-out captions in one call; variants take turns, with a plain "
        f"run after every {s['between']} of them ({s['rounds']} rounds). Errors: {s['captions'] * (s['more'] + 1)} captions for the "
        f"settings that speed-ups are read from, {s['captions']} for the others. Calibrated methods saw {s['calibration']} other captions.",
        "Error: mean over captions of |latents - plain| / |plain| with the same solver. A caption that ends in another picture altogether "
        "has an error near 1 and decides a mean; the typical error is the geometric mean.",
        f"![Error against measured speed-up](../pictures/{PICTURE})",
    ]  # fmt: skip
    for case in dict.fromkeys(row["case"] for row in results.rows):
        mine = [row for row in results.rows if row["case"] == case]
        head = ["method", *(f"error at {speedup:g}x" for speedup in SPEEDUPS), *(f"typical at {speedup:g}x" for speedup in SPEEDUPS)]
        cells = []
        for family in dict.fromkeys(row["family"] for row in mine if row["family"] != PLAIN):
            values = [error_at(points_of(mine, family, key), speedup) for key in ("error", "error_typical") for speedup in SPEEDUPS]
            failed = next((row["failed"] for row in mine if row["family"] == family and "failed" in row), None)
            if failed is not None and not points_of(mine, family):
                cells.append([family, f"fails: {failed}", *[""] * 5])
            else:
                cells.append([family, *(f"{value:.4f}" if value is not None else "not reached" for value in values)])
        lines += [f"## {case}", table(head, cells), *_against_converged(mine), "<details><summary>every setting</summary>", ""]
        every = [
            [row["family"], row["variant"], *(["fails", "", "", ""] if "failed" in row else _figures(row))]
            for row in sorted(mine, key=lambda row: (row["family"], row.get("speedup", 0)))
        ]
        lines += [table(["method", "setting", "speed-up", "error", "typical", "converged"], every), "</details>"]
    return bars_last(results, "The planner against its rivals, measured", *lines)


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['speedup']:.2f}x", f"{row['error']:.4f}", f"{row['error_typical']:.4f}", f"{row['error_converged_typical']:.4f}"]


def _against_converged(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where what is saved is compared with what the solver would end in, not with what its steps ended in."""
    plain = next(row["error_converged_typical"] for row in rows if row["family"] == PLAIN)
    cells, winners = [], []
    families = [family for family in dict.fromkeys(row["family"] for row in rows) if points_of(rows, family) and family != PLAIN]
    found = {family: [error_at(points_of(rows, family, "error_converged_typical"), at) for at in SPEEDUPS] for family in families}
    for i, at in enumerate(SPEEDUPS):
        ranked = sorted((errors[i], family) for family, errors in found.items() if errors[i] is not None)
        if ranked:
            winners.append(f"{ranked[0][1]} at {at:g}x")
    for family in (PLANNER, FEWER):
        if family in found:
            cells.append([family, *(f"{value:.4f}" if value is not None else "not reached" for value in found[family])])
    text = (
        f"Against {CONVERGED_STEPS} steps of the same solver from the same noise (typical error): plain itself {plain:.4f}. "
        f"Least: {', '.join(winners)}."
    )
    return [text, table(["", *(f"{at:g}x" for at in SPEEDUPS)], cells)]


def draw(results: Results, folder: Path) -> None:
    """The page's picture."""
    plot(results.rows, folder / PICTURE)


QUICK = Settings(("shapes-flow, DPM++ 2M",), captions=4, more=1, calibration=4, accuracy=64)


def execute(settings: Settings, note: Note, *, quick: bool = False, json_path: Path | None = None) -> Results:
    """Measures case by case.

    Args:
        quick: Only for what the results say of themselves.
        json_path: Written after every case: what is done stays, whatever comes.
    """
    steady_memory()
    results = Results(NAME, quick, settings={**vars(settings), "cases": list(settings.cases)})
    for case in settings.cases:
        rows, bars = measure(case, settings, note(case, None))
        results.rows += rows
        results.bars += bars
        if json_path is not None:
            results.write_json(json_path)
    return results


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, *, settings: Settings | None = None) -> int:
    """Runs the benchmark and writes its page.

    Args:
        quick: One case and few captions, within ten minutes on two cores; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/caching-rivals.md, after a full run.
        settings: In place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    docs = docs if docs is not None or quick or settings is not None else results_page(NAME)
    chosen = {"settings": settings or (QUICK if quick else Settings()), "quick": quick, "json_path": json_path}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs, pictures=draw)


def assemble(files: Sequence[Path], docs: Path) -> None:
    """Writes the page and its picture from the JSON of cases that were run one by one.

    Where two files have a case, the families of the later one take the place of the earlier one's: what was improved is measured again
    without the rest. Bars are computed anew from what is then there.

    Raises:
        BenchError: A file is no result of this benchmark.
    """
    parts = [read_results(file, NAME) for file in files]
    results = Results(NAME, False, settings=parts[0]["settings"])
    results.machine, results.versions = parts[0]["machine"], parts[0]["versions"]
    rows: dict[str, list[dict[str, Any]]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    for part in parts:
        for case in dict.fromkeys(row["case"] for row in part["rows"]):
            again = [row for row in part["rows"] if row["case"] == case]
            if case in rows:
                again = [row for row in again if row["family"] != PLAIN]
            named = {row["family"] for row in again}
            rows[case] = [row for row in rows.get(case, []) if row["family"] not in named] + again
            for bar in part["bars"]:
                if bar["name"].startswith(f"{case}: {ACCURACY}"):
                    verdicts[case] = bar
    for case, of in rows.items():
        results.rows += of
        results.bars += [*bars_of(case, of), *([Bar(**verdicts[case])] if case in verdicts else [])]
    publish(results, docs, page, draw)


def _where(docs: Path | None) -> Path:
    """The page's place.

    Raises:
        BenchError: This is no source checkout, so there is none unless it is named.
    """
    found = docs if docs is not None else results_page(NAME)
    if found is None:
        raise BenchError("--docs must name a file: there is no docs folder beside an installed package")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.rivals`."""
    parser = command_line("rivals", __doc__)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only this one (may be repeated); writes no page by itself")
    parser.add_argument("--family", action="append", default=[], help="only this way to save time (may be repeated), such as planner")
    parser.add_argument("--captions", type=int, default=Settings.captions, help="held-out captions (default: %(default)s)")
    parser.add_argument("--more", type=int, default=Settings.more, help="further batches of captions, not timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="timings of each variant (default: %(default)s)")
    parser.add_argument(
        "--calibration", type=int, default=Settings.calibration, help="captions that methods are calibrated on (default: %(default)s)"
    )
    parser.add_argument("--accuracy", type=int, default=Settings.accuracy, help="captions for the verifier, 0: none (default: %(default)s)")
    parser.add_argument(
        "--assemble",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing: the page from the JSON of single cases; later files' families replace earlier ones'",
    )
    options = parser.parse_args(arguments)
    try:
        if options.assemble:
            assemble(options.assemble, _where(options.docs))
            return 0
        settings = Settings(
            tuple(options.case or CASES), options.captions, options.more, options.rounds, calibration=options.calibration,
            accuracy=options.accuracy, families=tuple(options.family),
        )  # fmt: skip
    except BenchError as error:
        return refused(NAME, error)
    return run(False, options.json, options.docs or (results_page(NAME) if options.case is None else None), settings=settings)


if __name__ == "__main__":
    raise SystemExit(main())
