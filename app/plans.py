"""`hasten plan`: looks at plan files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.app import files
from hasten.app.output import Outcome

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan


def show(path: Path, png: Path | None = None) -> Outcome:
    """A plan's table, the facts it is bound to, and, in `png`, its heat map.

    Raises:
        BadInput: `png` cannot be written.
        PlanError: The file is no plan.
    """
    from hasten.accelerators.caching.plan import Plan

    if png is not None:
        files.check_target("--png", png)
    plan = Plan.load(path)
    lines = [str(plan), *(f"{name}: {value}" for name, value in sorted(plan.facts.items()))]
    if png is not None:
        files.write(png, heat_map(plan))
        lines.append(str(png))
    data = {
        "file": str(path),
        "hash": plan.hash,
        "steps": plan.steps,
        "sites": list(plan.sites),
        "branches": list(plan.branches),
        "computed_fraction": plan.computed_fraction,
        "facts": dict(plan.facts),
        "actions": plan.actions.tolist(),
        "png": str(png) if png is not None else None,
    }
    return Outcome(data, "\n".join(lines))


def heat_map(plan: Plan) -> bytes:
    """The plan as a PNG."""
    from matplotlib.figure import Figure

    rows = len(plan.sites) * len(plan.branches)
    figure = Figure(figsize=(max(5.0, 0.16 * plan.steps + 2), max(2.2, 0.14 * rows + 1.4)), layout="constrained")
    plan.plot(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def diff(first: Path, second: Path) -> Outcome:
    """What differs between two plans.

    Raises:
        PlanError: A file is no plan.
    """
    from hasten.accelerators.caching.plan import Plan

    one, other = Plan.load(first), Plan.load(second)
    lines = one.diff(other)
    return Outcome({"same": not lines, "first": one.hash, "second": other.hash, "differences": lines.splitlines()}, lines or "the same")
