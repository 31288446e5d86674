"""Launches compiled kernels through the CUDA driver's own library: ctypes, no toolkit, no extension module."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

from hasten.kernels.nvrtc import CompileError

Size = tuple[int, int]
"""Of a grid or a block: x and y."""


class DriverError(RuntimeError):
    """The driver is missing or refuses; the message says what and why."""


_NO_CONTEXT = 201


class Driver:
    """The few entry points of libcuda that a launch needs, in the calling thread's current context.

    That is the one torch has made. A thread whose first work on the device is a launch has none yet (torch's guards and its allocator do
    not ask for one where they have nothing to do), so it is given the device's.

    Args:
        path: The library; the system's unless told.
        device: Whose context a thread is given that has none.

    Raises:
        DriverError: There is none.
    """

    def __init__(self, path: Path | str | None = None, device: int = 0) -> None:
        name = str(path) if path is not None else "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise DriverError(f"no CUDA driver: {error}") from None
        self._library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._call("cuInit", 0)
        self._device, self._context = device, ctypes.c_void_p()

    def load(self, image: bytes) -> ctypes.c_void_p:
        """A module from machine code."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        """A kernel of a module."""
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        return found

    def launch(self, function: ctypes.c_void_p, grid: Size, block: Size, args: ctypes.Structure, stream: int) -> None:
        """Puts a kernel on a stream; its arguments, one structure, are copied before this returns."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        self._call("cuLaunchKernel", function, *grid, 1, *block, 1, 0, stream, ctypes.addressof(parameters), None)

    def _call(self, name: str, *args: object) -> None:
        status: int = getattr(self._library, name)(*args)
        if status == _NO_CONTEXT and self._enter():
            status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name} failed: {(text.value or b'').decode()} (CUDA error {status})")

    def _enter(self) -> bool:
        """Whether the thread could be given the device's context; it is retained once, and never given back."""
        if not self._context:
            device = ctypes.c_int()
            found = self._library.cuDeviceGet(ctypes.byref(device), self._device)
            if found or self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device):
                return False
        status: int = self._library.cuCtxSetCurrent(self._context)
        return status == 0


TRIES = 3
"""How often the driver may refuse a kernel before it is given up: memory may be short, or a capture forbid loading, for once."""


class Kernels:
    """The kernels of one device: a source file is compiled and loaded when the first of its kernels is launched.

    Args:
        driver: Of the device.
        image: Machine code of a source file, by its name; called with `True` where what it gave before cannot be loaded.
    """

    def __init__(self, driver: Driver, image: Callable[[str, bool], bytes]) -> None:
        self.driver, self.image = driver, image
        self._modules: dict[str, ctypes.c_void_p] = {}
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._again: set[str] = set()
        self._refused: dict[str, tuple[int, str]] = {}

    def launch(self, source: str, name: str, grid: Size, block: Size, args: ctypes.Structure, stream: int) -> None:
        """Launches the kernel `name` of a source file. One that was refused too often is refused from then on, at no cost.

        Raises:
            CompileError: The file cannot be compiled.
            DriverError: The driver refuses.
        """
        times, why = self._refused.get(name, (0, ""))
        if times >= TRIES:
            raise DriverError(why)
        try:
            if name not in self._functions:
                self._functions[name] = self.driver.function(self._module(source), name)
            self.driver.launch(self._functions[name], grid, block, args, stream)
        except CompileError as error:
            self._refused[name] = TRIES, str(error)
            raise
        except DriverError as error:
            self._refused[name] = times + 1, f"{name}: {error}"
            raise DriverError(f"{name}: {error}") from None
        if times:
            del self._refused[name]

    def _module(self, source: str) -> ctypes.c_void_p:
        if source not in self._modules:
            try:
                self._modules[source] = self.driver.load(self.image(source, False))
            except DriverError:
                if source in self._again:  # compiling takes seconds: once
                    raise
                self._again.add(source)
                self._modules[source] = self.driver.load(self.image(source, True))
        return self._modules[source]
