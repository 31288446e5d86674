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
from hasten.kernels.nvrtc import CompileError

P = ParamSpec("P")


class Backend:
    """The kernels of one device.

    Args:
        make: Finds the driver and what compiles for it; called at the first launch.
        stream: The handle of the caller's present stream.

    Attributes:
        broken: Why kernels do not run here, once that is known.
    """

    def __init__(self, make: Callable[[], Kernels], stream: Callable[[], int]) -> None:
        self._make, self._stream = make, stream
        self._kernels: Kernels | None = None
        self.broken: str | None = None

    def run(self, launch: Callable[Concatenate[Kernels, int, P], None], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the launch went through. If not, a warning has said why, and no further one is tried.

        Args:
            launch: Puts kernels on a stream, given by its handle; the rest are its other arguments.
        """
        if self.broken is None:
            try:
                if self._kernels is None:
                    self._kernels = self._make()
                launch(self._kernels, self._stream(), *args, **kwargs)
                return True
            except (CompileError, DriverError) as error:
                self.broken = str(error)
                warnings.warn(f"hasten's kernels are off, PyTorch's are used: {error}", RuntimeWarning, stacklevel=2)
        return False


def wanted() -> bool:
    """Whether kernels may be used: HASTEN_KERNELS=reference turns them off."""
    return os.environ.get("HASTEN_KERNELS", "") != "reference"


@cache
def of_device(index: int) -> Backend:
    """The backend of a CUDA device, the same for the life of the process."""

    def make() -> Kernels:
        major, minor = torch.cuda.get_device_capability(index)
        return Kernels(Driver(), Cubins(f"sm_{major}{minor}").get)

    return Backend(make, lambda: int(torch.cuda.current_stream(index).cuda_stream))
