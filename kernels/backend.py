"""Whether kernels run on a device, and if not, why: said once, then PyTorch answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Concatenate, ParamSpec

import torch

from hasten.kernels.cubins import Cubins
from hasten.kernels.driver import Driver, DriverError, Kernels
from hasten.kernels.nvrtc import CompileError, NoCompiler

P = ParamSpec("P")


class Backend:
    """The kernels of one device.

    Args:
        make: Finds the driver and what compiles for it; called at the first launch.
        stream: The handle of the caller's present stream.

    Attributes:
        broken: Why no kernel runs here, once that is known: there is no driver, or nothing that compiles.
        refused: Why the latest launch that was refused was.
    """

    def __init__(self, make: Callable[[], Kernels], stream: Callable[[], int]) -> None:
        self._make, self._stream = make, stream
        self._kernels: Kernels | None = None
        self.broken: str | None = None
        self.refused: str | None = None

    def run(self, launch: Callable[Concatenate[Kernels, int, P], None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the launch went through. If not, a warning has said why.

        Args:
            launch: Puts kernels on a stream, given by its handle; the rest are its other arguments.
        """
        if self.broken is not None:
            return False
        try:
            if self._kernels is None:
                self._kernels = self._make()
            launch(self._kernels, self._stream(), *args, **kwargs)
            return True
        except (CompileError, DriverError) as error:
            if self._kernels is None or isinstance(error, NoCompiler):
                self.broken = str(error)
                warnings.warn(f"hasten's kernels are off, PyTorch's are used: {error}", RuntimeWarning, stacklevel=2)
            elif str(error) != self.refused:
                warnings.warn(
                    f"one of hasten's kernels does not run, PyTorch's are used in its place: {error}", RuntimeWarning, stacklevel=2
                )
            self.refused = str(error)
            return False


def wanted() -> bool:
    """Whether kernels may be used: HASTEN_KERNELS=reference turns them off.

    Raises:
        ValueError: It says something else.
    """
    said = os.environ.get("HASTEN_KERNELS", "")
    if said not in ("", "reference"):
        raise ValueError(f"HASTEN_KERNELS must be 'reference' or not set, not {said!r}")
    return said == ""


def usable(device: torch.device) -> bool:
    """Whether kernels may be used on a device, and nothing is known that forbids it."""
    if device.type != "cuda" or torch.version.hip is not None or not wanted():
        return False
    # What is compiled cannot ask: its ops find out when they run.
    return torch.compiler.is_compiling() or of_device(torch.cuda.current_device() if device.index is None else device.index).broken is None


@cache
def of_device(index: int) -> Backend:
    """The backend of a CUDA device, the same for the life of the process."""

    def make() -> Kernels:
        major, minor = torch.cuda.get_device_capability(index)
        return Kernels(Driver(device=index), Cubins(f"sm_{major}{minor}").get)

    return Backend(make, lambda: int(torch.cuda.current_stream(index).cuda_stream))
