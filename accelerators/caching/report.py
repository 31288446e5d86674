"""What a run did: actions, times, state, and a reason for everything that was not reused although the plan said so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hasten.accelerators.caching.plan import MARKS, Plan
from hasten.accelerators.caching.trace import Trace, format_bytes


@dataclass
class RunReport:
    """One run of one denoiser. `print(report)` is for people, `to_json()` for machines.

    Attributes:
        plan: What was executed, as a plan that can be saved and replayed; None if the denoiser was never called.
        planned: What was asked for.
        trace: The denoiser's trace.
        step_seconds: Denoiser time of every step.
        seconds: From the first denoiser call to the end of the last, schedulers and callbacks between them included.
        call_seconds: The whole pipeline call (0 where there is no pipeline).
        state_bytes: Bytes of stored offsets at the end of the run (they are freed then).
        state_bytes_peak: Most bytes stored at once.
        baseline_seconds: `seconds` of a plain run with the same settings, where one was timed.
        reasons: Why sites were computed that the plan wanted reused, with how often.
        warnings: What does not fit quite.
    """

    plan: Plan | None = None
    planned: Plan | None = None
    trace: Trace | None = None
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    call_seconds: float = 0.0
    state_bytes: int = 0
    state_bytes_peak: int = 0
    baseline_seconds: float | None = None
    baseline_call_seconds: float | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    @property
    def computed_fraction(self) -> float:
        """Share of the cells that were computed."""
        return self.plan.computed_fraction if self.plan is not None else 1.0

    @property
    def bound(self) -> float | None:
        """The speed-up of the denoiser loop if reuse were free, from the trace's block times."""
        return self.plan.speedup_bound(self.trace) if self.plan is not None and self.trace is not None else None

    @property
    def speedup(self) -> float | None:
        """Measured speed-up of the denoiser loop, where a baseline was timed."""
        return self.baseline_seconds / self.seconds if self.baseline_seconds and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.planned.facts.get("method") if self.planned is not None else None,
            "plan_hash": self.plan.hash if self.plan is not None else None,
            "steps": len(self.step_seconds),
            "seconds": self.seconds,
            "call_seconds": self.call_seconds,
            "step_seconds": self.step_seconds,
            "computed_fraction": self.computed_fraction,
            "speedup": self.speedup,
            "bound": self.bound,
            "baseline_seconds": self.baseline_seconds,
            "baseline_call_seconds": self.baseline_call_seconds,
            "state_bytes_peak": self.state_bytes_peak,
            "reasons": dict(self.reasons),
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        if self.plan is None:
            return "nothing was run"
        steps, sites, branches = self.plan.actions.shape
        plural = "es" if branches > 1 else ""
        lines = [
            f"{self.plan.facts.get('method', 'plan')}: {steps} steps, {sites} sites, {branches} guidance branch{plural}"
            f" ({', '.join(self.plan.branches)}), {100 * self.computed_fraction:.1f}% computed",
            f"denoiser loop {self.seconds:.3f} s, whole call {self.call_seconds:.3f} s, stored offsets at most "
            f"{format_bytes(self.state_bytes_peak)}",
        ]
        if self.bound is not None:
            measured = f"{self.speedup:.2f}x measured, " if self.speedup else "not measured (time a baseline with `fast.baseline(...)`), "
            lines.append(f"speed-up of the loop: {measured}at most {self.bound:.2f}x")
        for k, seconds in enumerate(self.step_seconds):
            cells = ["".join(MARKS[a] for a in self.plan.actions[k, :, b]) for b in range(branches)]
            lines.append(f"{k:4d} {1e3 * seconds:9.2f} ms  " + "  ".join(cells))
        lines += [f"not reused: {reason} ({count}x)" if count > 1 else f"not reused: {reason}" for reason, count in self.reasons.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
