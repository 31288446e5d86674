"""How many pictures are drawn at a time: as many as memory holds, and no more than makes them faster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.app.batch.failures import one_line, out_of_memory
from hasten.app.batch.jobs import Job
from hasten.app.setup import BATCH

if TYPE_CHECKING:
    from hasten.app.batch.painter import Painter

MOST = 64
"""No batch is larger: by then a GPU is busy, and a process that dies loses the whole batch."""
PROBE_STEPS = 4
"""Denoising steps of a call that is measured."""
SHARE = 0.8
"""Of free memory that batches may fill: the measured calls need not be the hungriest."""
EFFORT = 0.03
"""Share of the whole work that measuring may cost."""
REPEATS = 2
"""Of each measurement; the shorter time counts."""
WORTH = 0.03
"""A larger batch must be faster by this much."""
UNMEASURED, LOST = 16, 60.0
"""Where measuring does not pay: pictures at a time, and seconds of a batch, which a process that dies loses; slower ones are of `BATCH`."""


@dataclass(frozen=True)
class Size:
    """A batch size, and where it came from as plain data."""

    size: int
    how: dict[str, Any]


def find_size(
    painter: Painter, jobs: Sequence[Job], processes: int = 1, world: int = 1, told: Callable[[str], None] = lambda text: None
) -> Size:
    """Measures one job, then twice as many at a time, while memory lasts and pictures come faster.

    The pictures measured are the largest of the list, with few steps. Where the list is too short for the measurement to pay, memory
    decides alone. With several processes no batch is so large that there would be fewer than four for each.

    Args:
        painter: Draws them.
        jobs: All jobs.
        processes: That share the memory.
        world: That share the work.
        told: Hears what is being done.
    """
    plain = [job for job in jobs if not job.steered]
    if not plain:
        return Size(1, {"found": "steered pictures are drawn one by one"})
    groups = Counter(job.key() for job in plain)
    probe = _probe_of(max(plain, key=lambda job: ((job.width or 0) * (job.height or 0), groups[job.key()])))
    most = min(MOST, max(groups.values()))
    if world > 1:
        most = max(1, min(most, len(plain) // (4 * world)))
    steps = sum(job.steps or painter.model.steps for job in plain)
    memory = _memory_of(painter.model.device)
    free, base = memory.free(), memory.used()
    if free is None:
        most = min(most, BATCH)
    fits, speeds, spent, size = most, dict[int, float](), 0, 1
    told("measuring a picture")
    try:
        _paint(painter, [probe])  # the first call pays for what is made once
        while size <= fits and (size == 1 or spent + size * PROBE_STEPS <= EFFORT * steps):
            told(f"measuring batches of {size}")
            memory.reset()
            batch = [replace(probe, seed=probe.seed + i) for i in range(size)]
            speeds[size] = size / min(_paint(painter, batch) for _ in range(REPEATS))
            spent += REPEATS * size * PROBE_STEPS
            if free is not None:
                growth = max(memory.peak() - base, 1)
                fits = min(fits, max(size, int(SHARE * free / processes / (growth / size))))
            if size > 1 and max(speeds[size], speeds[size // 2]) < max(speeds.values()):
                break  # twice in a row no faster
            size *= 2
    except Exception as error:  # whatever it is, the jobs themselves will say it; here it only means that there is no measurement
        fits = max(1, size // 2) if out_of_memory(error) else fits
        if not speeds:
            return Size(1 if out_of_memory(error) else min(BATCH, fits), {"found": "not measured", "why": one_line(error)})
    best = min(size for size, speed in speeds.items() if speed >= (1 - WORTH) * max(speeds.values()))
    if size <= fits and spent + size * PROBE_STEPS > EFFORT * steps:  # nobody knows whether more would be faster
        seconds = steps / len(plain) / PROBE_STEPS / max(speeds.values())
        best = max(best, min(UNMEASURED if UNMEASURED * seconds <= LOST else BATCH, fits))
    how = {
        "found": "measured",
        "free_bytes": free,
        "fits": fits,
        "pictures_per_second": {str(size): round(speed, 3) for size, speed in speeds.items()},
        "steps": probe.steps,
    }
    return Size(best, how)


def _probe_of(job: Job) -> Job:
    """The job with few steps. A plan fits its own number of steps alone, so it is left out."""
    caching = {"method": "none"} if "plan" in job.caching else job.caching
    return replace(job, steps=PROBE_STEPS if job.steps is None else min(job.steps, PROBE_STEPS), caching=caching)


def _paint(painter: Painter, jobs: Sequence[Job]) -> float:
    began = time.perf_counter()
    painter.paint(jobs)
    return time.perf_counter() - began


class _Unknown:
    """Memory that nobody can ask about."""

    def free(self) -> int | None:
        """Bytes that can be had; None where that is not known."""
        return None

    def used(self) -> int:
        """Bytes in use now."""
        return 0

    def reset(self) -> None:
        """The next peak is from here on."""

    def peak(self) -> int:
        """Most bytes in use since `reset`."""
        return 0


class _Cuda(_Unknown):
    """The present GPU."""

    def free(self) -> int | None:
        import torch

        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def used(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()


class _Linux(_Unknown):
    """A Linux machine's memory, or what a control group leaves of it."""

    def free(self) -> int | None:
        available = _field(Path("/proc/meminfo"), "MemAvailable")
        limit, usage = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
        if available is None or limit is None or usage is None:
            return available
        return max(0, min(available, limit - usage))

    def used(self) -> int:
        return _field(Path("/proc/self/status"), "VmRSS") or 0

    def reset(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # the peak is then that of the whole process: more than is true, so batches are too small, never too large

    def peak(self) -> int:
        return _field(Path("/proc/self/status"), "VmHWM") or 0


def _memory_of(device: str) -> _Unknown:
    if device == "cuda":
        return _Cuda()
    return _Linux() if device == "cpu" and Path("/proc/meminfo").is_file() else _Unknown()


def _field(path: Path, name: str) -> int | None:
    """Bytes of a line such as 'VmRSS:   1234 kB'."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


def _number(path: Path) -> int | None:
    """A file's number; None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
