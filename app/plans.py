"""`hasten plan`: makes plans and looks at plan files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.app import files
from hasten.app.errors import BadInput
from hasten.app.output import Outcome
from hasten.app.setup import Options, check, prepare

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
    lines = [
        str(plan),
        *(f"{name}: {value}" for name, value in sorted(plan.facts.items()) if name != "certificate"),
        *certificate_lines(plan),
    ]
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


def make(
    options: Options,
    captions: Sequence[str],
    out: Path,
    *,
    speedup: float | None,
    error: float | None,
    held_out: int | None,
    replays: int | None = None,
    dry_run: bool = False,
) -> Outcome:
    """Measures the model on the captions, solves for a plan and saves it.

    Args:
        replays: Most schedules to try; the planner's default unless told.
        dry_run: Only say how long that would take and what it would keep.

    Raises:
        BadInput: An option is not allowed, or the target cannot be met.
    """
    from hasten.accelerators.caching.repair import REPLAYS
    from hasten.app.drawing import check_number

    if (speedup is None) == (error is None):
        raise BadInput("give --speedup or --error, one of the two")
    check_number("--speedup", speedup, 1)
    if error is not None and not error > 0:
        raise BadInput(f"--error must be positive, not {error:g}")
    check_number("--held-out", held_out, 1, whole=True)
    check_number("--replays", replays, 1, whole=True)
    limit = REPLAYS if replays is None else replays
    if len(captions) < 2 or (held_out or 1) >= len(captions):
        raise BadInput(f"--prompts must hold more captions than are held out ({held_out or 1}), not {len(captions)}")
    files.check_target("--out", out)
    ready = prepare(check(options), captions)
    if dry_run:
        from hasten.pipelines.planning import expected

        told = expected(
            ready.model.pipe, captions, batch=ready.job.batch, num_inference_steps=ready.job.steps, replays=limit, **ready.job.arguments
        )
        return Outcome({"seconds": told.seconds, "bytes": told.bytes, "denoiser_calls": told.calls}, f"measuring would take {told}")
    from hasten.pipelines.planning import plan as solve

    try:
        plan = solve(
            ready.model.pipe,
            list(ready.job.captions),
            speedup=speedup,
            error=error,
            held_out=held_out,
            seed=ready.job.seed,
            batch=ready.job.batch,
            checkpoint=out.with_name(f"{out.name}.partial"),
            num_inference_steps=ready.job.steps,
            replays=limit,
            **ready.job.arguments,
        )
    except ValueError as why:
        raise BadInput(f"--{why}") from None  # its messages begin with the argument's name
    # Some schedulers execute other timesteps than they are asked for.
    plan = replace(plan, facts={**plan.facts, "num_inference_steps": ready.job.steps})
    out.parent.mkdir(parents=True, exist_ok=True)
    plan.save(out)
    lines = [str(plan), *certificate_lines(plan), str(out)]
    return Outcome(
        {"file": str(out), "hash": plan.hash, "computed_fraction": plan.computed_fraction, "facts": dict(plan.facts)}, "\n".join(lines)
    )


def verify(options: Options, path: Path, captions: Sequence[str]) -> Outcome:
    """Replays a plan on captions and holds its error against what the plan predicts; exit code 1 where it is over twice that.

    Raises:
        BadInput: An option is not allowed.
        PlanError: The file is no plan, or not one for this model.
    """
    from hasten.accelerators.caching.plan import Plan
    from hasten.pipelines.planning import FACTOR, replay

    plan = Plan.load(path)
    ready = prepare(check(replace(options, plan=path, method=None)), captions)
    job = ready.job
    found = replay(
        ready.model.pipe, plan, list(job.captions), seed=job.seed, batch=job.batch, num_inference_steps=job.steps, **job.arguments
    )
    predicted = (plan.facts.get("certificate") or {}).get("predicted")
    between = f" (95%: {found.low:.4f} to {found.high:.4f})" if found.high > found.low else ""
    lines = [f"error of the final latents on {len(captions)} captions: {found.error:.4f}{between}, mean {found.mean:.4f}"]
    holds = predicted is None or found.error <= FACTOR * predicted
    if predicted is None:
        lines.append("the plan carries no prediction to hold that against (`hasten plan make` writes one)")
    else:
        lines.append(f"predicted {predicted:.4f}: {'holds' if holds else 'does not hold'} (within {FACTOR:g} times)")
    data = {"file": str(path), "captions": len(captions), "predicted": predicted, "holds": holds, **vars(found)}
    return Outcome(data, "\n".join(lines), 0 if holds else 1)


def certificate_lines(plan: Plan) -> list[str]:
    """What a planned plan promises, and what it was seen to do."""
    found = plan.facts.get("certificate")
    if not found:
        return []
    interval = found["replayed_interval"]
    between = f" (95%: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    return [
        f"speed-up of the denoiser loop: {found['speedup']:.2f}x from measured step times",
        f"error of the final latents: predicted {found['predicted']:.4f}, replayed {found['replayed']:.4f}{between} on "
        f"{found['held_out']} held-out captions, mean {found['replayed_mean']:.4f} (relative L2; geometric mean unless said)",
    ]
