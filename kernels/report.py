"""What the kernels take of a GPU and what was measured of them, as the page docs/results/kernels.md: `python -m hasten.kernels.report`.

The compiler tells the first, for every kernel and architecture, without a GPU. The second comes from what `hasten bench kernels --json`
wrote: `--measured FILE`. Without it, and on a machine without a GPU, tables say that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hasten._version import __version__
from hasten.kernels.cubins import SOURCES, Cubins, digest
from hasten.kernels.measure import bytes_per_entry
from hasten.kernels.nvrtc import Compiler, Resources
from hasten.kernels.trials import DECODING, TRIALS

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Turing, Ampere, Ada, Hopper and Blackwell."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "kernels.md"

Measured = Mapping[str, Any]
"""Results of the benchmark."""
Found = dict[str, dict[str, dict[str, Resources]]]
"""By source, kernel and architecture."""


def resources(compiler: Compiler, architectures: Sequence[str] = ARCHITECTURES) -> Found:
    """What every kernel takes of every architecture.

    Raises:
        CompileError: The compiler refuses a source.
    """
    found: Found = {}
    for source in SOURCES:
        for architecture in architectures:
            for name, taken in Cubins(architecture, compiler=compiler).compile(source).resources().items():
                found.setdefault(source, {}).setdefault(name, {})[architecture] = taken
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, all but the first column flush right."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def taken(found: Found) -> str:
    """Registers and shared memory, source by source."""
    parts = []
    for source, kernels in found.items():
        architectures = list(next(iter(kernels.values())))
        rows = []
        for name, by in sorted(kernels.items()):
            spilled = sum(resources.spilled for resources in by.values())
            rows.append([f"`{name}`", *(f"{by[a].registers} / {by[a].shared}" for a in architectures), str(spilled)])
        parts.append(f"### {source}.cu\n\n{table(['kernel', *architectures, 'spilled'], rows)}")
    return "\n\n".join(parts)


def summary(found: Found, version: tuple[int, int]) -> str:
    """The whole in two sentences."""
    every = [resources for kernels in found.values() for by in kernels.values() for resources in by.values()]
    names, spilling = sum(map(len, found.values())), sum(resources.spilled > 0 for resources in every)
    architectures = len(every) // names
    return (
        f"NVRTC {version[0]}.{version[1]} compiles {names} kernels for each of {architectures} architectures, {len(every)} in all: "
        f"{spilling or 'none'} spill{'s' if spilling < 2 else ''} registers to memory. Most registers of a thread: "
        f"{max(resources.registers for resources in every)}; most static shared memory of a block: "
        f"{max(resources.shared for resources in every):,} bytes."
    )


def moved() -> str:
    """Bytes of every op beside those of the chain it replaces, counted."""
    rows = []
    for trials, size in ((TRIALS, (1, 64, 3072)), (DECODING, (1, 8, 32_768))):
        for trial in trials:
            fused, chain = bytes_per_entry(trial, size, torch.bfloat16)
            rows.append([trial.name, f"{fused:.1f}", f"{chain:.1f}", f"{chain / fused:.1f}"])
    return table(["op", "by the kernel", "op by op", "times as much"], rows)


def on_cpu(measured: Sequence[Measured]) -> str:
    """The int8 layer beside float32, run by run, as the benchmark found it."""
    runs = [one for one in measured if any(row["part"] in ON_CPU for row in one["rows"])]
    return "\n\n".join(map(_of_cpu, runs)) or "Not measured."


ON_CPU = {"cpu": ["activations", "float32, ms", "int8, ms"], "cpu denoiser": ["one plan", "float32, s", "int8, s"]}
"""Of the benchmark's rows, part by part: headings."""


def _of_cpu(measured: Measured) -> str:
    load = measured["machine"].get("load_at_start")
    busy = "" if load is None else f"; load of the machine before: {load:.2g}"
    parts = [f"{measured['machine']['processor']}, one thread{busy}."]
    for part, head in ON_CPU.items():
        rows = [row for row in measured["rows"] if row["part"] == part]
        cells = [[row["name"], *(_cell(row[key]) for key in ("float32", "int8", "ratio"))] for row in rows]
        parts += [table([*head, "times as fast"], cells)] if cells else []
    return "\n\n".join(parts)


def on_gpu(measured: Sequence[Measured]) -> str:
    """What the benchmark found, GPU by GPU, or that there is nothing."""
    seen = [one for one in measured if one["settings"]["device"] is not None]
    if not seen:
        return (
            "Not measured: no number here was seen on a GPU. `hasten bench kernels --json kernels.json` measures on a machine with one; "
            "`--measured kernels.json` then puts it on this page."
        )
    return "\n\n".join(map(_of_gpu, seen))


def _of_gpu(measured: Measured) -> str:
    parts = [f"{measured['settings']['device']}; a copy moves {measured['settings']['bandwidth'] / 1e9:,.0f} GB/s."]
    for part, head in COLUMNS.items():
        cells = [[_cell(row[key]) for key in head.values()] for row in measured["rows"] if row["part"] == part]
        parts.append(f"### {part.capitalize()}\n\n{table(list(head), cells) if cells else 'Not measured.'}")
    bars = [[bar["name"], _cell(bar["value"]), _cell(bar["limit"]), _cell(bar["holds"])] for bar in measured["bars"]]
    return "\n\n".join([*parts, f"### Bars\n\n{table(['bar', 'measured', 'limit', 'holds'], bars)}"])


COLUMNS = {
    "checks": {
        "op": "name", "type": "dtype", "size": "size", "error / allowed": "error", "unlike the reference": "unlike", "right": "right",
    },
    "times": {
        "op": "name", "type": "dtype", "size": "size", "MB": "megabytes", "kernel, µs": "kernel", "op by op, µs": "eager",
        "torch.compile, µs": "compiled", "of the copy's bandwidth": "share",
    },
    "decoding": {"logits": "name", "size": "size", "token_commit, µs": "kernel", "scheduler's step, µs": "eager", "times as fast": "ratio"},
    "pipelines": {
        "pipeline": "name", "variant": "variant", "seconds": "seconds", "times as fast": "speedup", "bound": "bound",
        "waits between steps": "waits",
    },
}  # fmt: skip
"""Of the benchmark's rows, part by part: headings and keys."""


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def page(found: Found, version: tuple[int, int], measured: Sequence[Measured] = ()) -> str:
    """The whole page, with what was measured on any number of machines."""
    return "\n\n".join([
        "# Kernels, measured",
        "Written by `python -m hasten.kernels.report`, never by hand; "
        f"hasten {__version__}, torch {torch.__version__}, sources {digest()}.",
        "## What they take of a GPU",
        summary(found, version),
        "Registers of a thread / bytes of static shared memory of a block; bytes that are spilled on all architectures together.",
        taken(found),
        "## Bytes moved",
        "For every entry of bfloat16 hidden states or logits: what must be read and written, and what PyTorch's ops read and write that "
        "do the same one by one, counted as they are dispatched. `reindex` moves eight tensors; `int8_linear` reads its weight.",
        moved(),
        "## On a CPU",
        "`int8_linear`, quantising, bias and all, beside `torch.nn.functional.linear` in float32 on one thread: 256 x 1152 times "
        "1152 x 4608, medians of runs that take turns. The bar is 5 times as fast.",
        on_cpu(measured),
        "## On a GPU",
        on_gpu(measured),
    ]) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(prog="python -m hasten.kernels.report", description="Writes docs/results/kernels.md.")
    told = "what `hasten bench kernels --json FILE` wrote; several for several machines"
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", default=[], help=told)
    parser.add_argument("--out", type=Path, metavar="FILE", default=PAGE, help="where the page goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in options.measured]
    compiler = Compiler()
    options.out.write_text(page(resources(compiler), compiler.version, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
