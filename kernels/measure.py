"""Whether a device's kernels are right, and how fast they are beside what they replace and beside copying the same bytes.

On the CPU the clock is the system's; that is for tests, and says nothing of a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.kernels.backend import Backend
from hasten.kernels.trials import Draw, Size, Trial, mapped, tensors, traffic

_CPU = torch.device("cpu")
_COPIED = 2**29
"""Bytes of what is copied to measure the bandwidth: far more than any cache holds."""


class NotRun(RuntimeError):
    """A kernel did not run; the message says why."""


class Traffic(TorchDispatchMode):
    """Counts what PyTorch's ops read and write while it is entered; views cost nothing.

    Attributes:
        bytes: All of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given, new = tensors(args), tensors(made)
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        if not any(tensor.untyped_storage().data_ptr() in known for tensor in new):
            self.bytes += traffic(given, new)
        return made


def bytes_per_entry(trial: Trial, size: Size, dtype: torch.dtype) -> tuple[float, float]:
    """(by the kernel, op by op): bytes read and written for every entry of hidden states or logits."""
    args = trial.make(Draw(0, size, dtype, _CPU))
    with torch.no_grad(), Traffic() as counted:
        trial.chain(*args)
    entries = size[0] * size[1] * size[2]
    return trial.traffic(args, trial.reference(args)) / entries, counted.bytes / entries


@dataclass(frozen=True)
class Checked:
    """What came of a check.

    Attributes:
        name: Of the trial.
        dtype: Of hidden states or logits.
        size: Of the inputs.
        error: The largest one against float64, over what rounding allows.
        unlike: Entries of all results that are not the reference's to the bit.
        right: Nothing is off by more than rounding, no input was changed, and where that is asked for no entry is unlike.
    """

    name: str
    dtype: str
    size: Size
    error: float
    unlike: int
    right: bool


@dataclass(frozen=True)
class Timed:
    """How long a call takes on the device, in seconds.

    Attributes:
        name: Of the trial.
        dtype: Of hidden states or logits.
        size: Of the inputs.
        bytes: That have to move.
        kernel: By the kernel.
        eager: Op by op in PyTorch.
        compiled: The same chain under torch.compile; None where that was not asked for.
        floor: What copying takes that moves as many bytes.
    """

    name: str
    dtype: str
    size: Size
    bytes: int
    kernel: float
    eager: float
    compiled: float | None
    floor: float

    @property
    def share(self) -> float:
        """Of the copy's bandwidth."""
        return self.floor / self.kernel


def check(trial: Trial, size: Size, dtype: torch.dtype, backend: Backend, device: torch.device, seed: int) -> Checked:
    """One call on inputs of its own, into memory that was poisoned before.

    Args:
        backend: Runs the kernels of the device.
        seed: Of the inputs.

    Raises:
        NotRun: No kernel ran.
    """
    args = trial.make(Draw(seed, size, dtype, _CPU))
    there = mapped(args, lambda tensor: tensor.to(device, copy=True))
    with poisoned():
        made = trial.kernel(backend, there)
    if made is None:
        raise NotRun(f"{trial.name}: {backend.broken or backend.refused or 'no kernel takes these arguments'}")
    made = [tensor.to(_CPU) for tensor in made]
    want = trial.reference(args)
    alike = len(made) == len(want) and all(m.shape == w.shape and m.dtype == w.dtype for m, w in zip(made, want, strict=True))
    unlike = sum(map(_unlike, made, want)) if alike else -1
    changed = sum(_unlike(tensor.to(_CPU), before) for tensor, before in zip(tensors(there), tensors(args), strict=True))
    error = trial.error(args, made) if alike else float("inf")
    right = alike and not changed and error <= 1 and not (trial.exact and unlike)
    return Checked(trial.name, _name(dtype), size, error, unlike, right)


def _unlike(got: Tensor, want: Tensor) -> int:
    """Entries that are not the very same; numbers that are none are alike."""
    got, want = (tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in (got, want))
    return int(((got != want) & ~((got != got) & (want != want))).sum())


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN or the largest integer: an entry that a kernel leaves out is seen."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def copy_bandwidth(device: torch.device, nbytes: int = _COPIED) -> float:
    """Bytes a second that a copy reads and writes, both counted."""
    sets = [(torch.empty(nbytes, dtype=torch.uint8, device=device), torch.ones(nbytes, dtype=torch.uint8, device=device)) for _ in range(2)]
    return 2 * nbytes / seconds(lambda out, source: out.copy_(source), sets, device)


def timed(
    trial: Trial, size: Size, dtype: torch.dtype, backend: Backend, device: torch.device, bandwidth: float, compiled: bool = False
) -> Timed:
    """Kernel and chain, on inputs that take turns so that no cache holds them.

    Args:
        bandwidth: Of a copy, bytes a second.
        compiled: Time the chain under torch.compile as well.

    Raises:
        NotRun: No kernel ran.
    """
    args = trial.make(Draw(0, size, dtype, device))
    made = trial.kernel(backend, args)
    if made is None:
        raise NotRun(f"{trial.name}: {backend.broken or backend.refused or 'no kernel takes these arguments'}")
    needed = trial.traffic(args, made)
    sets = [args, *(mapped(args, torch.Tensor.clone) for _ in range(_turns(needed, device) - 1))]
    with torch.no_grad():
        kernel = seconds(lambda *args: trial.kernel(backend, args), sets, device)
        eager = seconds(trial.chain, sets, device)
        fast = seconds(torch.compile(trial.chain, dynamic=False), sets, device) if compiled else None
    return Timed(trial.name, _name(dtype), size, needed, kernel, eager, fast, needed / bandwidth)


def _turns(nbytes: int, device: torch.device) -> int:
    """Sets of inputs that together are four times as large as the L2 cache, as far as a quarter of the free memory holds them."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    room = torch.cuda.mem_get_info(device)[0] // 4
    return max(2, min(-(-4 * cache // nbytes), room // nbytes, 256))


def seconds(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], device: torch.device, rounds: int = 7, least: int = 20) -> float:
    """Of one call on the device: the median over rounds, in each of which all sets take turns.

    On CUDA the device sleeps while a round is put into its queue, so that what the host takes for a launch is not in it.

    Args:
        run: Is given one of the sets.
        sets: Arguments, which take turns.
        rounds: How many.
        least: Calls of a round on CUDA; the CPU makes one with each set.
    """
    on_cuda = device.type == "cuda"
    calls = [sets[k % len(sets)] for k in range(max(len(sets), least if on_cuda else 1))]

    def queue() -> float:
        begin = time.perf_counter()
        for args in calls:
            run(*args)
        return time.perf_counter() - begin

    if not on_cuda:
        queue()
        return statistics.median(queue() for _ in range(rounds)) / len(calls)
    with torch.cuda.device(device):
        queue()
        torch.cuda.synchronize()
        host = queue()
        torch.cuda.synchronize()
        found = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int((1.5 * host + 1e-3) * 2e9))  # cycles, at 2 GHz
            start.record()
            queue()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
