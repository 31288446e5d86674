"""Machine code of the kernels' sources: compiled when first wanted, then kept on disk.

A file's name is a hash of all that its content depends on, and its first bytes are a hash of that content: a file that was damaged is
compiled again. Files appear by renaming, so two processes that compile the same at once do not disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from hasten.kernels.nvrtc import Compiled, Compiler

OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")
"""Without contraction to fused operations numbers agree with PyTorch's to the bit."""
SOURCES = ("adaln", "apply", "drift", "gelu", "linear", "reindex", "store", "tokens")
"""The files of cuda/ that hold kernels."""
HEADERS = ("common.cuh", "elementary.cuh", "rows.cuh")
"""What they include."""
_DIGEST = 32


def source_text(name: str) -> str:
    """A file of cuda/."""
    return (files("hasten.kernels") / "cuda" / name).read_text(encoding="utf-8")


def digest() -> str:
    """A short hash of all sources and options."""
    texts = (*(source_text(f"{name}.cu") for name in SOURCES), *map(source_text, HEADERS), *OPTIONS)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def default_folder() -> Path:
    """Where machine code is kept: HASTEN_CACHE, else hasten/ in XDG_CACHE_HOME or ~/.cache; the temporary folder for who has no home."""
    try:
        own = os.environ.get("HASTEN_CACHE")
        return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten" / "kernels"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"hasten-{getattr(os, 'getuid', int)()}" / "kernels"


class Cubins:
    """The sources, compiled for one architecture.

    Args:
        architecture: Such as "sm_90".
        folder: Where to keep them; where that is not possible a warning says so, and every process compiles for itself.
        compiler: For tests; NVRTC unless told.
    """

    def __init__(self, architecture: str, folder: Path | None = None, compiler: Compiler | None = None) -> None:
        self.architecture, self.folder = architecture, folder or default_folder()
        self._given = compiler
        self._warned = False

    @cached_property
    def compiler(self) -> Compiler:
        """Loaded when it is first needed.

        Raises:
            CompileError: There is none.
        """
        return self._given or Compiler()

    def compile(self, source: str) -> Compiled:
        """Compiles a source, whatever is kept.

        Raises:
            CompileError: The compiler refuses or there is none.
        """
        headers = {name: source_text(name) for name in HEADERS}
        return self.compiler.compile(source_text(f"{source}.cu"), f"{source}.cu", self.architecture, headers, OPTIONS)

    def get(self, source: str, again: bool = False) -> bytes:
        """Machine code of a source.

        Args:
            again: Compile it although it is kept: what was kept could not be loaded.

        Raises:
            CompileError: There is no compiler, whose version the name of what is kept has; or it is not kept, and the compiler refuses.
        """
        path = self.path(source)
        kept = None if again else _read(path)
        if kept is None:
            kept = self.compile(source).cubin
            self._write(path, kept)
        return kept

    def path(self, source: str) -> Path:
        """Where a source's machine code is kept."""
        facts = (source_text(f"{source}.cu"), *map(source_text, HEADERS), *OPTIONS, self.architecture, self._version)
        digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
        return self.folder / f"{source}-{self.architecture}-{digest[:24]}.cubin"

    @cached_property
    def _version(self) -> str:
        return "{}.{}".format(*self.compiler.version)

    def _write(self, path: Path, image: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(image).digest() + image)
                os.replace(name, path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = f"compiled kernels cannot be kept in {self.folder} ({error.strerror or error}); HASTEN_CACHE names another folder"
                warnings.warn(text, RuntimeWarning, stacklevel=2)


def _read(path: Path) -> bytes | None:
    """What is kept there, or None where there is nothing or it was damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image = content[_DIGEST:]
    return image if len(content) > _DIGEST and hashlib.sha256(image).digest() == content[:_DIGEST] else None
