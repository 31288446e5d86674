"""The fused CUDA kernels on a GPU: right, as fast as memory allows, and what whole pipelines take.

    hasten bench kernels --json kernels.json
    python -m hasten.kernels.report --measured kernels.json    # puts it on docs/results/kernels.md

Without a GPU the int8 layer is measured, and a denoiser in int8, on the CPU. On one, every op is checked on inputs that are drawn anew
against float64 and against what it means, its outputs poisoned before; then timed on the device beside a copy of as many bytes, beside the
same work op by op, and beside that under torch.compile; then whole pipelines. It ends within ten minutes: what does not fit in is left out,
and what fails has a row that says why.
"""

from __future__ import annotations

import math
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import BlockRefinementScheduler

from hasten.accelerators.caching.cachequant import CacheQuant
from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Results,
    command_line,
    conduct,
    run_from_command_line,
    steady_memory,
)
from hasten.benchmarks.kernel_pipelines import COMPUTED, PIPELINES, Subject, build, not_run, time_pipeline
from hasten.kernels import backend as backends
from hasten.kernels import ops, reference, report
from hasten.kernels.arguments import Grid, Selection, Weight
from hasten.kernels.backend import Backend
from hasten.kernels.measure import NotRun, check, copy_bandwidth, timed
from hasten.kernels.trials import DECODING, TRIALS, Draw, Size, Trial, mapped
from hasten.pipelines.accelerated import accelerate
from hasten.pipelines.calibration import calibrate

NAME = "kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK = 1
FULL: dict[str, Any] = {
    "checked": ((2, 77, 1152), (3, 5, 257), (1, 4096, 3072), (1, 2, 16_640)),
    "checked_logits": ((2, 5, 32_003), (1, 32, 126_464)),
    "blocks": ((1, 4096, 3072), (2, 4096, 3072), (1, 4608, 3072), (2, 1024, 1152)),
    "logits": ((8, 32, 126_464), (8, 32, 157_184)),
    "pipelines": tuple(PIPELINES),
    "compiled": True,
    "minutes": 9.0,
    "cached": ({},),
}
"""Blocks: hidden states of FLUX.1 (with and without its text) and of PixArt-alpha. Vocabularies: LLaDA's and LLaDA2's."""
QUICK: dict[str, Any] = {**FULL, "blocks": ((1, 4096, 3072),), "logits": ((8, 32, 126_464),), "pipelines": (), "minutes": 4.0, "cached": ()}
ENOUGH = 4096 * 3072
"""Entries of hidden states from which on the bars of bandwidth hold."""


def execute(
    checked: Sequence[Size],
    checked_logits: Sequence[Size],
    blocks: Sequence[Size],
    logits: Sequence[Size],
    pipelines: Sequence[str | Subject],
    compiled: bool,
    minutes: float,
    cached: Sequence[dict[str, Any]],
    note: Note,
    device: torch.device | None = None,
    backend: Backend | None = None,
    copied: int = 2**29,
) -> Results:
    """Checks, then times. Without a GPU there is the part of the CPU alone, the int8 layer beside float32.

    Args:
        checked, checked_logits: Sizes on which the ops of blocks and of decoding are checked.
        blocks, logits: Sizes on which they are timed, in bfloat16.
        pipelines: Names of `kernel_pipelines.PIPELINES`, or others like them.
        compiled: Time chains and pipelines under torch.compile, too.
        minutes: Nothing is begun that is expected to end later; a quarter of them is for torch.compile of single ops.
        cached: Arguments of `cached_on_cpu`, once for each row; not on a GPU, whose time that would take.
        device: The present CUDA device unless told.
        backend: Runs its kernels; needed with a device that is none.
        copied: Bytes that are copied to measure the bandwidth.

    Raises:
        BenchError: There is a GPU, and its kernels do not run.
    """
    began = time.monotonic()
    results = Results(NAME, False, settings={"device": None, "minutes": minutes}, rows=int8_on_cpu())
    if device is None and not torch.cuda.is_available():
        print("no CUDA device was found: what needs a GPU is not measured", file=sys.stderr)
        results.rows += [cached_on_cpu(**each) for each in cached]
        results.bars = bars_of(results.rows)
        return results
    device = device or torch.device("cuda", torch.cuda.current_device())
    backend = backend or backends.of_device(device.index)
    seed = secrets.randbits(31)
    bandwidth = copy_bandwidth(device, copied)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    results.settings |= {"device": name, "bandwidth": bandwidth, "seed": seed}
    for trials, sizes in ((TRIALS, checked), (DECODING, checked_logits)):
        done = note("checked", len(trials))
        for trial in trials:
            results.rows += [checks_of(trial, sizes, dtype, backend, device, seed) for dtype in DTYPES]
            done()
    if backend.broken is not None:
        raise BenchError(f"no kernel runs here: {backend.broken}")
    for trials, sizes in ((TRIALS, blocks), (DECODING, logits)):
        done = note("timed", len(trials) * len(sizes))
        for size in sizes:
            for trial in trials:
                compiling = compiled and time.monotonic() < began + 15 * minutes
                results.rows.append(times_of(trial, size, backend, device, bandwidth, compiling))
                done()
    results.rows += [scheduler_beside(size, backend, device) for size in logits]
    done = note("pipelines", len(pipelines))
    for chosen in pipelines:
        subject = PIPELINES[chosen] if isinstance(chosen, str) else chosen
        results.rows += pipelines_of(subject, device, compiled, began + 60 * minutes)
        done()
    results.bars = bars_of(results.rows)
    return results


def int8_on_cpu(rows: int = 256, columns: int = 1152, out: int = 4608, rounds: int = 41) -> list[dict[str, Any]]:
    """A row for each way to quantise activations: `int8_linear` beside the float32 layer on one thread, milliseconds of runs in turns."""
    steady_memory()
    draw = Draw(0, (1, rows, columns), torch.float32, torch.device("cpu"))
    x, dense, bias = draw.hidden()[0], draw.normal(out, columns), draw.normal(out)
    values, scale = reference.quantise_rows(dense, "int8")
    weight = Weight(values, scale[:, 0].contiguous(), bias)
    grid = Grid(x.abs().max()[None] / 127, torch.zeros(1), values.sum(1, dtype=torch.int32))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for way, given in (("a scale for every row", None), ("a grid fixed beforehand", grid)):
            turns = []
            for _ in range(rounds + 2):
                begin = time.perf_counter()
                F.linear(x, dense, bias)
                middle = time.perf_counter()
                ops.int8_linear(x, weight, given)
                turns.append(((middle - begin) * 1e3, (time.perf_counter() - middle) * 1e3))
            fp32, int8 = (statistics.median(took) for took in zip(*turns[2:], strict=True))
            ratio = statistics.median(a / b for a, b in turns[2:])
            found.append({"part": "cpu", "name": way, "float32": fp32, "int8": int8, "ratio": ratio})
    finally:
        torch.set_num_threads(threads)
    return found


def cached_on_cpu(subject: Subject = PIPELINES["PixArt-alpha-XL"], side: int = 256, steps: int = 4, rounds: int = 3) -> dict[str, Any]:
    """A row: a denoiser under a CacheQuant plan, its layers in int8, beside the same plan in float32 on one thread, runs in turns.

    Time does not depend on what the ranges and corrections are, so calibration is short.
    """
    steady_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe = build(subject, torch.device("cpu"), torch.float32)
        call = {**subject.call, "height": side, "width": side, "num_inference_steps": steps}
        method = CacheQuant(interval=2, schedule="uniform", cache_correction=False, output_correction=False, smoothing=0.0)
        eight = calibrate(pipe, ["a red circle"], method, samples=1, progress=False, **call)
        facts = {name: value for name, value in eight.facts.items() if name != "quantised"}
        ways = [accelerate(pipe, eight), accelerate(pipe, replace(eight, facts=facts, tables={}))]
        took: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for way, seconds in zip(ways, took, strict=True):
                begin = time.perf_counter()
                way("a blue square", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
                seconds.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    int8, fp32 = (statistics.median(seconds[1:]) for seconds in took)
    name = f"{subject.name}, {side} x {side} pixels, {steps} steps, every second computed"
    return {"part": "cpu denoiser", "name": name, "float32": fp32, "int8": int8, "ratio": fp32 / int8}


def checks_of(trial: Trial, sizes: Sequence[Size], dtype: torch.dtype, backend: Backend, device: torch.device, seed: int) -> dict[str, Any]:
    """A row: the worst of all sizes, or why there is none."""
    row = {"part": "checks", "name": trial.name, "dtype": str(dtype).removeprefix("torch."), "exact": trial.exact}
    try:
        found = [check(trial, size, dtype, backend, device, seed + k) for k, size in enumerate(sizes)]
    except RuntimeError as error:  # one that fails costs no other its result
        return {**row, "name": _with(trial, error), "size": list(sizes[0]), "error": math.inf, "unlike": 0, "right": False}
    worst = max(found, key=lambda one: (not one.right, one.error))
    return {**row, **asdict(worst), "size": list(worst.size), "unlike": sum(one.unlike for one in found)}


def times_of(trial: Trial, size: Size, backend: Backend, device: torch.device, bandwidth: float, compiled: bool) -> dict[str, Any]:
    """A row: microseconds; None for what could not be timed."""
    row = {"part": "times", "name": trial.name, "dtype": "bfloat16", "size": list(size), "memory_bound": trial.bound}
    row |= {"decoding": trial in DECODING, "megabytes": None, "share": None, **dict.fromkeys(MICROSECONDS)}
    for compiling in dict.fromkeys((compiled, False)):  # once more without where the compiler fails
        torch.compiler.reset()
        try:
            found = timed(trial, size, torch.bfloat16, backend, device, bandwidth, compiling)
        except RuntimeError as error:
            row["name"] = _with(trial, error)
            continue
        took = {name: None if value is None else value * 1e6 for name, value in asdict(found).items() if name in MICROSECONDS}
        return {**row, "name": trial.name, **took, "megabytes": found.bytes / 1e6, "share": found.share}
    return row


def pipelines_of(subject: Subject, device: torch.device, compiled: bool, deadline: float) -> list[dict[str, Any]]:
    """Its rows, or one that says why there are none: what was measured before is not lost."""
    try:
        return time_pipeline(subject, device, compiled, deadline)
    except (RuntimeError, ValueError) as error:  # out of memory, of time, or the device's own
        return [not_run(subject, "all", error)]


def _with(trial: Trial, error: Exception) -> str:
    return f"{trial.name}: not run, {' '.join(str(error).split())[:120]}"


MICROSECONDS = ("kernel", "eager", "compiled", "floor")


def scheduler_beside(size: Size, backend: Backend, device: torch.device) -> dict[str, Any]:
    """A row: `token_commit` beside diffusers' own step on the same logits, of which half the positions are masked.

    That is `token_stats` and the selection in one launch: a step of the scheduler does both.
    """
    commit = next(trial for trial in DECODING if trial.op == "token_commit")
    row = {"part": "decoding", "name": f"bfloat16, {size[2]:,} tokens", "size": list(size)}
    try:
        return {**row, **_scheduler_beside(commit, size, backend, device)}
    except RuntimeError as error:
        return {**row, "name": _with(commit, error), **dict.fromkeys(("kernel", "eager", "ratio", "unlike"))}


def _scheduler_beside(commit: Trial, size: Size, backend: Backend, device: torch.device) -> dict[str, Any]:
    rows, width, vocabulary = size
    draw = Draw(0, size, torch.bfloat16, device)
    current = draw.integers(MASK + 1, vocabulary, rows, width)
    current[:, ::2] = MASK
    logits = 4 * draw.hidden()
    logits[..., MASK] = -torch.inf  # the kernel never commits the mask either
    scheduler = BlockRefinementScheduler(block_length=width, num_inference_steps=width)
    scheduler.set_timesteps(width, device=device)
    selection = Selection(MASK, 0.9)
    sets = [(logits, current), mapped((logits, current), torch.Tensor.clone)]
    theirs = scheduler.step(logits, 0, current, mask_token_id=MASK, threshold=0.9)
    ours = commit.kernel(backend, (logits, current, [MASK], selection, 1.0, None))
    if ours is None:
        raise NotRun(backend.broken or backend.refused or "no kernel takes these arguments")
    took = {
        "kernel": waited(lambda z, tokens: commit.kernel(backend, (z, tokens, [MASK], selection, 1.0, None)), sets, device) * 1e6,
        "eager": waited(lambda z, tokens: scheduler.step(z, 0, tokens, mask_token_id=MASK, threshold=0.9), sets, device) * 1e6,
    }
    unlike = int((theirs.prev_sample != ours[3]).sum())
    return {**took, "ratio": took["eager"] / took["kernel"], "unlike": unlike}


def waited(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], device: torch.device, rounds: int = 7) -> float:
    """Seconds of a call by the clock on the wall, to its end on the device: the scheduler waits there, so no other clock is fair."""
    took = []
    for k in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run(*sets[k % len(sets)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return sorted(took[2:])[rounds // 2]


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Those bars for which there are rows."""
    cpu = [row["ratio"] for row in rows if row["part"] == "cpu"]
    bars = [Bar.at_least("float32's time over int8_linear's on a CPU", min(cpu), 5.0)] if cpu else []
    for row in rows:
        if row["part"] == "cpu denoiser":
            bars.append(Bar.at_least("float32's time over int8's, a whole run on a CPU", row["ratio"], 1.0, row["name"]))
    checks = [row for row in rows if row["part"] == "checks"]
    if not checks:
        return bars
    bars += [
        Bar.at_most("largest error against float64, over what rounding allows", max(row["error"] for row in checks), 1.0),
        Bar.at_most("checks that are not right", sum(not row["right"] for row in checks), 0),
        Bar.at_most("entries unlike the reference's where none may be", sum(row["unlike"] for row in checks if row["exact"]), 0),
    ]
    times = [row for row in rows if row["part"] == "times" and row["kernel"] is not None]
    missing = sum(row["kernel"] is None for row in rows if row["part"] in ("times", "decoding"))
    if times or missing:
        bars.append(Bar.at_most("ops that could not be timed", missing, 0))
    large = [row for row in times if row["decoding"] or math.prod(row["size"]) >= ENOUGH]
    moving = [row for row in large if row["memory_bound"] and not row["decoding"]]
    if moving:
        least = min(moving, key=lambda row: row["share"])
        bars.append(Bar.at_least("least share of the copy's bandwidth", least["share"], 0.85, f"{least['name']}, {least['size']}"))
    beside = [row for row in large if row["compiled"] is not None]
    if beside:
        slowest = min(beside, key=lambda row: row["compiled"] / row["kernel"])
        bars.append(Bar.at_least("torch.compile's time over ours", slowest["compiled"] / slowest["kernel"], 1.0, slowest["name"]))
    seconds = {row["variant"]: row for row in rows if row["part"] == "pipelines" and "FLUX" in row["name"]}
    graphed, computed, plain = (seconds.get(name) for name in ("planner, graphs", COMPUTED, "plain"))
    if graphed is not None and computed is not None:  # beside the same blocks, so that what kernels save in them does not count
        over = computed["seconds"] / graphed["seconds"] / graphed["bound"]
        bars.append(Bar.at_least("FLUX-size, planned, with graphs: speed-up over bound", over, 0.97))
    if graphed is not None and plain is not None and graphed["waits"] is not None:
        bars.append(Bar.at_most("FLUX-size, planned, with graphs: waits between steps that the plain pipeline has not",
                                graphed["waits"] - plain["waits"], 0))  # fmt: skip
    decoding = [row for row in rows if row["part"] == "decoding" and row["ratio"] is not None]
    if decoding:
        bars.append(Bar.at_least("diffusers' step over token_commit", min(row["ratio"] for row in decoding), 10.0))
        bars.append(Bar.at_most("tokens unlike those of diffusers' step", sum(row["unlike"] for row in decoding), 0))
    return bars


def page(results: Results) -> str:
    """What was measured, as Markdown; `python -m hasten.kernels.report --measured` makes docs/results/kernels.md of it."""
    measured = [results.to_json()]
    return f"# Kernels, measured\n\n## On a CPU\n\n{report.on_cpu(measured)}\n\n## On a GPU\n\n{report.on_gpu(measured)}\n"


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, **settings: Any) -> int:
    """Runs the benchmark; prints its bars.

    Args:
        quick: One size of each, no pipelines.
        json_path: Where the JSON goes, or None.
        docs: Where a page goes, or None.
        settings: Of `execute`, in place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    return conduct(NAME, execute, page, {**(QUICK if quick else FULL), **settings}, json_path=json_path, docs=docs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The same from `python -m hasten.benchmarks.kernels`."""
    parser = command_line("kernels", __doc__, "none; python -m hasten.kernels.report makes it of what --json wrote")
    return run_from_command_line(run, parser, {}, arguments)


if __name__ == "__main__":
    sys.exit(main())
