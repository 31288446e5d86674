"""A CUDA device that is none: the kernels compiled by g++ through the shim, behind a driver that runs them on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from hasten.kernels.backend import Backend
from hasten.kernels.cubins import SOURCES
from hasten.kernels.driver import Driver, Kernels

SHIM = Path(__file__).parent / "shim"
CUDA = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
IMAGE = b"\x7fELF"
"""What the driver takes for machine code."""


def host_compiler() -> str:
    """g++. A machine without it cannot tell whether the kernels are right, so that is an error and no reason to pass over them."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++ was not found, by which the kernels' tests run them on the CPU: please install it (.ci/run does)")
    return compiler


def build(folder: Path, *options: str) -> Path:
    """The driver with all kernels as a shared library."""
    compiler = host_compiler()
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the sanitizers are not for the compiler
    common = [compiler, "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror", f"-I{SHIM}", f"-I{CUDA}", *options]
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source}.o")
        shim = ["-include", "cuda_on_cpu.h", "-Wno-unknown-pragmas", "-x", "c++"]
        subprocess.run([*common, *shim, "-c", CUDA / f"{source}.cu", "-o", objects[-1]], check=True, env=env)
    library = folder / "libcuda_on_cpu.so"
    subprocess.run([*common, "-shared", SHIM / "driver.cpp", *objects, "-o", library], check=True, env=env)
    return library


@dataclass
class Machine:
    """The device.

    Attributes:
        path: Of its driver.
        library: The driver's entry points, and the shim's own.
        backend: Launches on it.
    """

    path: Path
    library: ctypes.CDLL = field(init=False)
    backend: Backend = field(init=False)

    def __post_init__(self) -> None:
        self.library = ctypes.CDLL(str(self.path))
        self.library.shim_name.restype = self.library.shim_error.restype = ctypes.c_char_p
        self.library.shim_size.restype = ctypes.c_size_t
        self.backend = self.backend_of_its_own()

    def backend_of_its_own(self) -> Backend:
        """Another one, that may break."""
        return Backend(self.kernels, lambda: 0)

    def kernels(self) -> Kernels:
        """Loaded anew."""
        return Kernels(Driver(self.path), lambda source, again: IMAGE)

    def names(self) -> list[str]:
        """Of all kernels."""
        found: list[str] = []
        while (name := self.library.shim_name(len(found))) is not None:
            found.append(name.decode())
        return found
