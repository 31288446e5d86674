"""`hasten doctor --kernels`: compiles the CUDA kernels, checks each op on fresh random inputs and times it, on the present device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from hasten.app.errors import FAILURE, OK
from hasten.app.output import Outcome, table
from hasten.kernels import backend as backends
from hasten.kernels.backend import Backend
from hasten.kernels.cubins import SOURCES, Cubins
from hasten.kernels.measure import Checked, NotRun, Timed, check, copy_bandwidth, timed
from hasten.kernels.nvrtc import CompileError, Compiler
from hasten.kernels.trials import DECODING, TRIALS, Size

BLOCKS: tuple[Size, ...] = ((2, 77, 1152), (3, 5, 257), (1, 1, 16_640))
"""On which the ops of blocks are checked: a model's size, one that no vector divides, and more than a block of threads holds."""
LOGITS: tuple[Size, ...] = ((2, 5, 32_003), (1, 32, 4096))
TIMED_BLOCKS: Size = (1, 4096, 3072)
"""FLUX.1's hidden states at 1,024 x 1,024."""
TIMED_LOGITS: Size = (8, 32, 126_464)
"""LLaDA's vocabulary."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITHOUT_A_GPU = "sm_90"


def doctor_kernels() -> Outcome:
    """On the present CUDA device, or where there is none what the compiler says; exit code 1 where a kernel is wrong or does not run."""
    if not torch.cuda.is_available():
        return compiled()
    device = torch.device("cuda", torch.cuda.current_device())
    name = f"{torch.cuda.get_device_name(device)}, {_memory(device)}"
    return examine(backends.of_device(device.index), device, name, BLOCKS, LOGITS, TIMED_BLOCKS, TIMED_LOGITS, copy_bandwidth(device))


def _memory(device: torch.device) -> str:
    return f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"


def examine(
    backend: Backend,
    device: torch.device,
    name: str,
    blocks: Sequence[Size],
    logits: Sequence[Size],
    timed_blocks: Size,
    timed_logits: Size,
    bandwidth: float,
) -> Outcome:
    """Checks and times every op on one device.

    Args:
        backend: Runs its kernels.
        name: What the device is called.
        blocks, logits: Sizes on which ops are checked.
        timed_blocks, timed_logits: Those on which they are timed, in bfloat16.
        bandwidth: Of a copy, bytes a second.
    """
    rows: list[tuple[str, ...]] = [("", "op", "checks right", "error", "us", "us op by op", "GB/s", "of a copy")]
    checks: list[Checked] = []
    times: list[Timed] = []
    problems: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # why a kernel does not run is among the problems
        for trials, sizes, large in ((TRIALS, blocks, timed_blocks), (DECODING, logits, timed_logits)):
            for trial in trials:
                try:
                    found = [check(trial, size, dtype, backend, device, seed) for seed, size in enumerate(sizes) for dtype in DTYPES]
                    took = timed(trial, large, torch.bfloat16, backend, device, bandwidth)
                except NotRun as error:
                    problems.append(str(error))
                    rows.append(("!", trial.name, "does not run", *[""] * 5))
                    continue
                checks, times = [*checks, *found], [*times, took]
                wrong = [one for one in found if not one.right]
                problems += map(_complaint, wrong)
                speed = f"{took.kernel * 1e6:.1f}", f"{took.eager * 1e6:.1f}", f"{took.bytes / took.kernel / 1e9:.0f}", f"{took.share:.2f}"
                right = f"{len(found) - len(wrong)} of {len(found)}"
                rows.append(("!" if wrong else " ", trial.name, right, f"{max(one.error for one in found):.2f}", *speed))
    facts = f"{name}; a copy moves {bandwidth / 1e9:.0f} GB/s\ntimed in bfloat16: {list(timed_blocks)}, logits {list(timed_logits)}"
    off = "" if backends.wanted() else "\nHASTEN_KERNELS=reference: the ops use PyTorch, not these kernels"
    verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, marked !" if problems else "every kernel is right"
    last = f"{verdict}; error is the largest, over what rounding allows"
    text = "\n".join([f"{facts}{off}\n", table(rows, numbers=False), "", *problems, last])
    data = {"ok": not problems, "device": name, "copy": bandwidth, "checks": _plain(checks), "times": _plain(times), "problems": problems}
    return Outcome(data, text, FAILURE if problems else OK)


def _complaint(wrong: Checked) -> str:
    return f"{wrong.name}, {wrong.dtype} {list(wrong.size)}: error {wrong.error:.3g} of what is allowed, {wrong.unlike} entries unlike"


def _plain(found: Sequence[Checked | Timed]) -> list[dict[str, Any]]:
    return [{key: None if value == float("inf") else value for key, value in asdict(one).items()} for one in found]


def compiled(compiler: Compiler | None = None) -> Outcome:
    """Without a device: whether the kernels compile, and what is missing to run them.

    Args:
        compiler: NVRTC unless told.
    """
    why = "this torch has no CUDA" if torch.version.cuda is None else f"torch has CUDA {torch.version.cuda}, but finds no device"
    missing = [f"no kernel was run: {why}"]
    rows: list[tuple[str, ...]] = [("source", "kernels", "registers", "bytes shared", "bytes spilled")]
    try:
        compiler = compiler or Compiler()
        for source in SOURCES:
            found = Cubins(WITHOUT_A_GPU, compiler=compiler).compile(source).resources().values()
            most = max(one.registers for one in found), max(one.shared for one in found), sum(one.spilled for one in found)
            rows.append((source, str(len(found)), *map(str, most)))
    except CompileError as error:
        missing.append(str(error))
        rows = []
    data = {"ok": True, "device": None, "compiled": [dict(zip(rows[0], row, strict=True)) for row in rows[1:]], "missing": missing}
    head = [f"compiled for {WITHOUT_A_GPU} by NVRTC {'.'.join(map(str, compiler.version))}\n", table(rows), ""] if rows and compiler else []
    return Outcome(data, "\n".join([*head, *missing]), OK)
