"""Compiles CUDA C++ for a given architecture with NVRTC, the run-time compiler that comes with torch's CUDA wheels. No GPU is needed."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch


class CompileError(RuntimeError):
    """There is no compiler, or it refused; the message says which and why."""


class NoCompiler(CompileError):
    """There is none."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor.

    Attributes:
        registers: Of each thread.
        shared: Bytes of static shared memory of each block.
        spilled: Bytes of registers that were moved to memory, stores and loads together, and of the stack frame.
    """

    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    """Machine code, and what the assembler said about it."""

    cubin: bytes
    ptx: str
    log: str

    def resources(self) -> dict[str, Resources]:
        """By kernel. Only where the options had `--ptxas-options=-v`."""
        found: dict[str, Resources] = {}
        for part in self.log.split("Compiling entry function '")[1:]:
            counts = {name: int(match[1]) if (match := re.search(pattern, part)) else 0 for name, pattern in _COUNTS.items()}
            spilled = counts["frame"] + counts["stores"] + counts["loads"]
            found[part[: part.index("'")]] = Resources(counts["registers"], counts["shared"], spilled)
        return found


_COUNTS = {
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
    "frame": r"(\d+) bytes stack frame",
    "stores": r"(\d+) bytes spill stores",
    "loads": r"(\d+) bytes spill loads",
}


def find_nvrtc() -> Path | None:
    """The library: of pip's packages first, then of torch's own folder, then of a CUDA toolkit; None if there is none.

    Where there are several, one of the CUDA that torch was built for: a driver may be too old for what a later one compiles.
    """
    folders = [folder for package in ("nvidia", "torch") for folder in _folders(package)]
    folders += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + [Path("/usr/local/cuda")]
    places = ("cu*/lib", "cuda_nvrtc/lib", "cu*/bin/**", "cuda_nvrtc/bin", "lib", "lib64", "bin")
    names = ("libnvrtc.so*", "nvrtc64_*.dll")
    found = (file for folder in folders for place in places for name in names for file in sorted(folder.glob(f"{place}/{name}")))
    libraries = [file for file in found if ".alt." not in file.name]
    major = (torch.version.cuda or "none").partition(".")[0]
    fitting = [file for file in libraries if re.search(rf"nvrtc(64_|\.so\.){major}", file.name)]
    return next(iter(fitting or libraries), None)


def _folders(package: str) -> list[Path]:
    """Where an installed package lies."""
    spec = find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []


class Compiler:
    """NVRTC through ctypes.

    Args:
        path: The library; the one that `find_nvrtc` finds unless told.

    Attributes:
        version: (major, minor) of it.

    Raises:
        NoCompiler: There is none, or it cannot be loaded.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or find_nvrtc()
        if path is None:
            raise NoCompiler("no NVRTC was found: pip install nvidia-cuda-nvrtc, or set CUDA_HOME")
        try:
            # NVRTC 13 of pip looks for its built-in functions on the library path only, where they are not.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
            self._library = ctypes.CDLL(str(path))
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        except (OSError, AttributeError) as error:
            raise NoCompiler(f"{path} cannot be loaded as NVRTC: {error}") from None
        self.version = major.value, minor.value

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities that it compiles for, such as 90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return tuple(found)

    def compile(self, source: str, name: str, architecture: str, headers: Mapping[str, str], options: Sequence[str] = ()) -> Compiled:
        """Machine code for one architecture.

        Args:
            source: CUDA C++.
            name: What the compiler calls it in its messages.
            architecture: Such as "sm_90".
            headers: By the name under which they are included.
            options: Of the compiler.

        Raises:
            CompileError: The compiler refuses; the message is its log.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names))
        try:
            flags = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in options)]
            status = self._library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
            log = self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise CompileError(
                    f"NVRTC {self.version[0]}.{self.version[1]} refuses {name} for {architecture}: {log or self._reason(status)}"
                )
            ptx = self._bytes("nvrtcGetPTX", program).rstrip(b"\0").decode()
            return Compiled(self._bytes("nvrtcGetCUBIN", program), ptx, log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, getter: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"{getter}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        self._check(getattr(self._library, getter)(program, buffer))
        return buffer.raw[: size.value]

    def _reason(self, status: int) -> str:
        text: bytes | None = self._library.nvrtcGetErrorString(status)
        return (text or b"").decode() or f"error {status}"

    def _check(self, status: int) -> None:
        if status:
            raise CompileError(f"NVRTC: {self._reason(status)}")
