"""The page and the tables of `hasten bench caching`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.accelerators.caching.trace import format_bytes
from hasten.benchmarks.harness import Results, bars_table, surroundings, table
from hasten.benchmarks.subjects import SIZES, ShapesSubject


def _seconds(row: Mapping[str, Any]) -> str:
    return f"{row['seconds']:.3f} ({row['seconds_min']:.3f} to {row['seconds_max']:.3f})"


def _quality(row: Mapping[str, Any], converged: bool) -> list[str]:
    cells = [f"{row['error']:.3f}"]
    if converged:
        cells.append(f"{row['error_converged']:.3f}" if "error_converged" in row else "")
    cells.append("equal" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f}")
    if "accuracy" not in row:
        return [*cells, "", ""]
    change, low, high = (100 * row[f"accuracy_difference{end}"] for end in ("", "_low", "_high"))
    correct = f"{100 * row['accuracy']:.1f}% ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"
    return [*cells, correct, f"{change:+.1f} ({low:+.1f} to {high:+.1f})" if row["kind"] != "plain" else ""]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One model's rows as a Markdown table."""
    converged = any("error_converged" in row for row in rows)
    quality = any("error" in row for row in rows)
    head = ["variant", "computed", "loop seconds (min to max)", "call s", "speed-up", "call speed-up", "bound", "speed-up / bound", "state"]
    if quality:
        head += ["error", *(["error to converged"] if converged else []), "PSNR dB", "correct (95%)", "change in points (95%)"]
    lines = []
    for row in rows:
        cells = [
            row["variant"],
            f"{100 * row['computed_fraction']:.1f}%",
            _seconds(row),
            f"{row['call_seconds']:.3f}",
            f"{row['speedup']:.3f}x",
            f"{row['call_speedup']:.3f}x",
            f"{row['bound']:.3f}x",
            f"{row['ratio']:.3f}",
            format_bytes(row["state_bytes"]) if row["state_bytes"] else "",
        ]
        lines.append([*cells, *(_quality(row, converged) if quality else ())])
    return table(head, lines)


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    command = "hasten bench caching --quick" if results.quick else "hasten bench caching"
    lines = [
        "# Caching, measured",
        f"Written by `{command}`, never by hand. Quality on public checkpoints was not measured here: the quality figures are those of "
        "the small `shapes` model, whose pictures can be checked exactly.",
        surroundings(results),
        "## Bars",
        bars_table(results.bars),
    ]
    for model in dict.fromkeys(row["model"] for row in results.rows):
        rows = [row for row in results.rows if row["model"] == model]
        if model == ShapesSubject.name:
            few = " (a full run uses 2,048)" if s["captions"] < 2048 else ""
            text = (
                f"The pipeline that ships, loaded by plain diffusers in fp32, {s['steps']} DDIM steps, guidance {s['guidance_scale']:g}, "
                f"{s['captions']:,} captions{few} in calls of {s['batch']}, the same captions and noise for every variant. "
                f"{100 * s['block_share'][model]:.0f}% of the plain loop is spent in blocks. *correct*: pictures that the exact verifier "
                "finds right in every respect. *change*: against plain, paired. *error*: relative L2 of the final latents against plain "
                "with the same noise."
            )
            if s["converged_rounds"]:
                count = s["converged_rounds"] * s["batch"]
                text += f" *error to converged*: against {s['converged']} steps, on the first {count} captions."
        else:
            blocks, heads, width = SIZES[s["xl_size"]]
            text = (
                f"A `PixArtTransformer2DModel` of {blocks} blocks and {heads} heads of {width}, random weights in bf16, 256 tokens, batch "
                f"2 (one picture under guidance), {s['xl_steps']} DDIM steps: time only, its pictures mean nothing. "
                f"{100 * s['block_share'][model]:.0f}% of the plain loop is spent in blocks."
            )
        lines += [f"## `{model}`", text, rows_table(rows)]
        reasons = sorted({reason for row in rows for reason in row["not_reused"]})
        if reasons:
            lines.append("Computed although the plan said reuse: " + "; ".join(reasons) + ".")
    lines += [
        "## How it was measured",
        "All variants run in turns in one process, every other round in reverse. *Speed-up* is the median over the rounds of plain's "
        "time over the variant's in the same round, for the denoiser loop (network, scheduler and all that the runtime does); *call* is "
        "the whole call, with text encoder and decoder where there are any. *Bound* is the speed-up if reuse were free, from block times "
        "measured on the bare model in every round; for fewer steps it is the ratio of the steps. The cost of a plan that reuses nothing "
        "comes from short runs in the order A B C C B A: the median of the paired ratios, with a 95% interval from order statistics. "
        "Other jobs on the machine widen the intervals; processor time, which they hardly change, stands beside. "
        "The allocator is told to keep what is freed, since the page faults of handing it back come and go between equal runs. "
        "Absolute times mean something on this machine only.",
    ]
    return "\n\n".join(lines) + "\n"
