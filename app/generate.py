"""`hasten generate`: pictures from captions, or one picture that compares plain with accelerated."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.app import files
from hasten.app.drawing import draw
from hasten.app.errors import BadInput
from hasten.app.output import Outcome, table
from hasten.app.setup import Options, check, prepare

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan
    from hasten.accelerators.caching.report import RunReport


def gather_captions(captions: Sequence[str], file: Path | None, option: str = "--captions") -> list[str]:
    """The captions of the command line and of the file.

    Raises:
        BadInput: There is none, one is empty, or the file cannot be read.
    """
    found = [caption.strip() for caption in captions]
    for number, caption in enumerate(found, 1):
        if not caption:
            raise BadInput(f"CAPTION {number} is empty; a caption must say what to draw")
    if file is not None:
        found += files.read_lines(option, file)
    if not found:
        raise BadInput('CAPTION is missing: say what to draw, such as "a small red circle", or name a file with --captions')
    return found


def file_name(index: int, caption: str, seed: int) -> str:
    """Of a picture: '00-a-small-red-circle-seed0.png'."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48].rstrip("-")
    return "-".join(part for part in (f"{index:02d}", words, f"seed{seed}") if part) + ".png"


def save_executed(report: RunReport | None, path: Path, steps: int) -> Plan | None:
    """Saves the plan that was executed, with the number of steps that the pipeline was asked for."""
    if report is None or report.plan is None:
        return None
    plan = replace(report.plan, facts={**report.plan.facts, "num_inference_steps": steps})
    plan.save(path)
    return plan


def _check_output(options: Options, out: Path, save_plan: Path | None) -> None:
    files.check_folder("--out", out)
    if save_plan is not None:
        if options.method == "none":
            raise BadInput("--save-plan needs a run with a plan, not --method none")
        files.check_target("--save-plan", save_plan)


def generate(options: Options, captions: Sequence[str], out: Path, save_plan: Path | None = None) -> Outcome:
    """Draws the captions into `out`, one PNG each.

    Raises:
        BadInput: Something that was asked for is not allowed; nothing was written.
        PlanError: The plan does not fit the run; nothing was written.
    """
    _check_output(options, out, save_plan)
    checked = check(options)
    ready = prepare(checked, captions)
    settings = ready.settings()
    began = time.perf_counter()
    written: list[dict[str, Any]] = []
    reports: list[RunReport] = []
    for drawn in draw(ready.model.pipe, ready.fast, ready.job):
        if drawn.report is not None:
            reports.append(drawn.report)
        for i, image in zip(drawn.pictures, drawn.images, strict=True):
            caption, seed = ready.job.captions[i], ready.job.seed + i
            path = out / file_name(i, caption, seed)
            files.write(path, files.png(image, caption, {**settings, "caption": caption, "seed": seed}))
            written.append({"file": str(path), "caption": caption, "seed": seed})
    seconds = time.perf_counter() - began
    if save_plan is not None:
        save_executed(reports[0] if reports else None, save_plan, ready.job.steps)
    data = {**settings, "seconds": seconds, "images": written, "reports": [report.to_json() for report in reports]}
    lines = [entry["file"] for entry in written]
    summary = f"{len(written)} picture{'s' if len(written) > 1 else ''} of {ready.job.steps} steps in {seconds:.1f} s"
    if reports:
        bound = f", at most {reports[0].bound:.2f}× faster than plain" if reports[0].bound is not None else ""
        name = reports[0].plan.facts.get("method", "plan") if reports[0].plan is not None else "plan"
        summary += f"; {name}: {100 * reports[0].computed_fraction:.0f}% of the blocks computed{bound} (--compare measures it)"
        lines += [f"not reused: {reason}" for reason in dict.fromkeys(reason for report in reports for reason in report.reasons)]
        lines += [f"warning: {warning}" for warning in dict.fromkeys(warning for report in reports for warning in report.warnings)]
    return Outcome(data, "\n".join([*lines, summary]))


def compare(options: Options, captions: Sequence[str], out: Path, save_plan: Path | None = None) -> Outcome:
    """Draws the captions plainly, accelerated and with fewer steps, and writes `compare.png` into `out`.

    Raises:
        BadInput: Something that was asked for is not allowed; nothing was written.
        PlanError: The plan does not fit the run; nothing was written.
    """
    from hasten.app.compare import MOST_ROWS, draw_comparison
    from hasten.app.measure import measure

    _check_output(options, out, save_plan)
    if options.method == "none":
        raise BadInput("--compare needs something to compare with: --method delta-dit or auto, or --plan, not none")
    if len(captions) > MOST_ROWS:
        raise BadInput(f"--compare shows at most {MOST_ROWS} captions, not {len(captions)}; `hasten verify` takes any number")
    ready = prepare(check(options), captions)
    assert ready.fast is not None
    comparison = measure(ready.fast, ready.job, shapes=ready.model.choice.shipped)
    settings = {**ready.settings(), "captions": list(captions)}
    path = out / "compare.png"
    files.write(path, draw_comparison(comparison, ready.model.choice.title, settings))
    if save_plan is not None:
        save_executed(comparison.report, save_plan, ready.job.steps)
    data = {**settings, "picture": str(path), **comparison.to_json()}
    return Outcome(data, f"{table(comparison.table())}\n{path}")
