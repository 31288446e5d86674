"""Caching in a robot's policy: block-wise adaptive caching on `reach`, for time and for success.

    hasten bench caching-policy

A policy call is 100 DDPM steps of a transformer on 32 observations. Success is that of whole episodes in the simulator, the same scenes and
noise for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.accelerators.caching.bac import BAC
from hasten.accelerators.caching.fora import FORA
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import Session
from hasten.accelerators.caching.trace import Trace
from hasten.benchmarks.harness import (
    Bar,
    Note,
    Results,
    bars_last,
    command_line,
    conduct,
    median_interval,
    paired_difference,
    results_page,
    run_from_command_line,
    steady_memory,
    table,
    wilson,
)
from hasten.pipelines.calibration import calibrate
from hasten.pipelines.planning import front
from hasten.pipelines.zoo.reach.policy import Sampler, load_policy, sample_actions
from hasten.pipelines.zoo.reach.simulator import observe, run_episodes, scenes_of, stream_of

NAME = "caching-policy"
STEPS, BATCH = 100, 32
SPEEDUP, POINTS, IDLE_SHARE = 3.4, 1.0, 0.03
"""The bars: the paper's speed-up, success within a point of full compute, and what a step that reuses everything may cost."""
SCENES = 32
"""That the planner and weighed schedules are measured on; BAC as published sees one."""
COMPUTED = (18, 14, 11, 9)
"""Steps that the planner computes in full."""
PLANNER = "planner"
FIRST_SEED, CALIBRATION_SEED = 10_000_000, 20_000_000
FULL: dict[str, Any] = {"episodes": 1000, "rounds": 7, "updates": (7, 10, 14, 17)}
QUICK: dict[str, Any] = {"episodes": 200, "rounds": 3, "updates": (10, 17)}


@dataclass(frozen=True)
class Variant:
    """A way to run the policy."""

    name: str
    plan: Plan | None


class Bench:
    """The policy, with traces kept by the size of the batch."""

    def __init__(self, episodes: int) -> None:
        self.policy, self.scheduler = load_policy()
        self.seeds = range(FIRST_SEED, FIRST_SEED + episodes)
        self.traces: dict[Any, Trace] = {}
        scenes, _ = scenes_of(range(FIRST_SEED, FIRST_SEED + BATCH))
        self.observations = observe(scenes, scenes.start, torch.zeros_like(scenes.start))

    def session(self, plan: Plan) -> Session:
        return Session(self.policy, plan, STEPS, traces=self.traces)

    def call(self, plan: Plan | None) -> tuple[float, list[float]]:
        """Seconds of one policy call at batch 32, and of its denoiser's steps under a plan."""
        generators = [stream_of(seed, 2) for seed in range(FIRST_SEED, FIRST_SEED + BATCH)]
        began = time.perf_counter()
        if plan is None:
            sample_actions(self.policy, self.scheduler, self.observations, generators, STEPS)
            return time.perf_counter() - began, []
        with self.session(plan) as session:
            sample_actions(self.policy, self.scheduler, self.observations, generators, STEPS, session)
        return time.perf_counter() - began, session.report.step_seconds

    def success(self, plan: Plan | None) -> list[bool]:
        """Of every episode."""
        session = self.session(plan) if plan is not None else None
        with torch.no_grad():
            return run_episodes(Sampler(self.policy, self.scheduler, self.seeds, STEPS, session), self.seeds).success.tolist()

    def variants(self, updates: Sequence[int]) -> list[Variant]:
        """Full compute, BAC with and without its union, one schedule for all parts, and uniform reuse, calibrated on one scene."""
        scenes, _ = scenes_of([CALIBRATION_SEED])
        observation = observe(scenes, scenes.start, torch.zeros_like(scenes.start))

        def loop(session: Session) -> torch.Tensor:
            return sample_actions(self.policy, self.scheduler, observation, [stream_of(CALIBRATION_SEED, 2)], STEPS, session)

        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + SCENES)
        many, _ = scenes_of(seeds)
        observations = observe(many, many.start, torch.zeros_like(many.start))

        def loop_of_many(session: Session) -> torch.Tensor:
            return sample_actions(self.policy, self.scheduler, observations, [stream_of(seed, 2) for seed in seeds], STEPS, session)

        found = [Variant("full compute", None)]
        for count in updates:
            for name, method, scenes_seen in (
                ("BAC", BAC(count), loop),
                ("BAC without union", BAC(count, union=0), loop),
                ("one schedule for all parts", BAC(count, shared=True), loop),
                ("BAC weighed", BAC(count, sensitivity=True), loop_of_many),
                ("BAC weighed, one schedule", BAC(count, sensitivity=True, shared=True), loop_of_many),
            ):
                plan = calibrate(self.policy, scenes_seen, method, num_inference_steps=STEPS, progress=False)
                found.append(Variant(f"{name}, S={count}", plan))
            trace = next(iter(self.traces.values()), None)
            interval = -(-STEPS // count)
            if trace is not None:
                found.append(Variant(f"uniform (EfficientVLA), every {interval}", FORA(interval).plan(trace, STEPS)))
        plans = front(self.policy, loop_of_many, COMPUTED, num_inference_steps=STEPS)
        return found + [Variant(f"{PLANNER}, {count} of {STEPS}", made) for count, (made, _) in plans.items()]


def execute(episodes: int, rounds: int, updates: Sequence[int], note: Note) -> Results:
    """Measures time in turns, then success."""
    steady_memory()
    results = Results(NAME, False, settings={"episodes": episodes, "rounds": rounds, "updates": list(updates)})
    with torch.no_grad():
        bench = Bench(episodes)
        bench.call(None)
        with Session(bench.policy, FORA(1), STEPS, traces=bench.traces) as session:
            generators = [stream_of(seed, 2) for seed in range(BATCH)]
            sample_actions(bench.policy, bench.scheduler, bench.observations, generators, STEPS, session)
        chosen = bench.variants(updates)
        tick = note("policy calls in turns", rounds * len(chosen))
        seconds: dict[str, list[float]] = {v.name: [] for v in chosen}
        idle: dict[str, list[float]] = {v.name: [] for v in chosen}
        for r in range(rounds + 1):
            for variant in chosen:
                spent, steps = bench.call(variant.plan)
                if r:  # the first round warms up
                    seconds[variant.name].append(spent)
                    if variant.plan is not None:
                        resting = [k for k in range(STEPS) if (variant.plan.actions[k] != Action.COMPUTE).all()]
                        idle[variant.name] += [steps[k] for k in resting]
                    tick()
        tick = note("episodes", len(chosen))
        base: list[bool] = []
        for variant in chosen:
            right = bench.success(variant.plan)
            base = base or right
            change = paired_difference(base, right)
            ratios = [a / b for a, b in zip(seconds["full compute"], seconds[variant.name], strict=True)]
            low, high = wilson(sum(right), len(right))
            full_step = statistics.median(seconds["full compute"]) / STEPS
            computed = variant.plan.computed_fraction if variant.plan is not None else 1.0
            results.rows.append({
                "variant": variant.name,
                "computed_fraction": computed,
                "seconds": statistics.median(seconds[variant.name]),
                "speedup": statistics.median(ratios),
                "speedup_interval": median_interval(ratios),
                "idle_share": statistics.median(idle[variant.name]) / full_step if idle[variant.name] else None,
                "success": sum(right) / len(right),
                "success_low": low,
                "success_high": high,
                "change": 100 * change.value,
                "change_low": 100 * change.low,
                "change_high": 100 * change.high,
            })  # fmt: skip
            tick()
    results.bars = bars_of(results.rows)
    return results


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars, from the rows."""
    united = [row for row in rows if row["variant"].startswith(("BAC, ", "BAC weighed"))]
    fast = [row for row in united if row["speedup"] >= SPEEDUP]
    bars = []
    if fast:
        best = max(fast, key=lambda row: row["change"])
        note = f"{best['variant']}, {best['speedup']:.2f}x; 95% interval {best['change_low']:+.1f} to {best['change_high']:+.1f}"
        bars.append(Bar.at_least(f"change of success in points at {SPEEDUP}x or more", best["change"], -POINTS, note))
    quickest = max(united, key=lambda row: row["speedup"])
    bars.append(Bar.at_least("fastest setting of BAC", quickest["speedup"], SPEEDUP, quickest["variant"]))
    for name, chosen in (("BAC", united), ("the planner", [row for row in rows if row["variant"].startswith(PLANNER)])):
        holding = [row for row in chosen if row["change"] >= -POINTS]
        if holding:
            best = max(holding, key=lambda row: row["speedup"])
            note = f"{best['variant']}, change {best['change']:+.1f} points"
            bars.append(Bar.at_least(f"largest speed-up of {name} with success within a point", best["speedup"], SPEEDUP, note))
    shares = [row["idle_share"] for row in united if row["idle_share"] is not None]
    if shares:
        bars.append(
            Bar.at_most("a step that reuses everything over a full one, batch 32", min(shares), IDLE_SHARE, "median over such steps")
        )
    return bars


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    head = ["variant", "computed", "call s", "speed-up", "idle step", "success (95%)", "change in points (95%)"]
    lines = [
        [
            row["variant"],
            f"{100 * row['computed_fraction']:.1f}%",
            f"{row['seconds']:.3f}",
            f"{row['speedup']:.2f}x",
            f"{100 * row['idle_share']:.1f}%" if row["idle_share"] is not None else "",
            f"{100 * row['success']:.1f}% ({100 * row['success_low']:.1f} to {100 * row['success_high']:.1f})",
            f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})",
        ]
        for row in results.rows
    ]
    return bars_last(
        results,
        "Caching in a policy, measured",
        f"`reach`, {STEPS} DDPM steps, calls of {BATCH} observations timed in turns ({s['rounds']} rounds); success of {s['episodes']} "
        "episodes, the same scenes and noise for all. Schedules are calibrated on one scene. An idle step reuses everything.",
        table(head, lines),
    )


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, **settings: Any) -> int:
    """Runs the benchmark and writes its page.

    Args:
        quick: Small settings, within ten minutes on two cores; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/caching-policy.md, after a full run.
        settings: Of `execute`, in place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    chosen = {**(QUICK if quick else FULL), **settings}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs if docs is not None or quick else results_page(NAME))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.policy`."""
    meanings = {"episodes": "of which success is counted", "rounds": "timings of each variant", "updates": "of each part"}
    settings = {name: (FULL[name], meaning) for name, meaning in meanings.items()}
    return run_from_command_line(run, command_line("policy", __doc__), settings, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
