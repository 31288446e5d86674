"""What a calibration has measured so far, on disk: an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

KEY = "key"


class Checkpoint:
    """Named arrays in one file, written whole after each.

    Args:
        path: The file, continued if it is there; None keeps nothing.
        about: Plain data that what is kept depends on: model, weights, prompts, seeds, the call.

    Raises:
        ValueError: The file is no checkpoint, or one of another calibration.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Any) -> None:
        self.path = Path(path) if path is not None else None
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode()).hexdigest()
        self.arrays: dict[str, np.ndarray] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            with np.load(self.path) as file:
                self.arrays = {name: file[name] for name in file.files}
            found = str(self.arrays.pop(KEY))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"checkpoint {self.path} cannot be read ({error}): delete it, or name another file") from None
        if found != self.key:
            raise ValueError(f"checkpoint {self.path} is of another calibration (other model, prompts or settings): delete it")

    def remember(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What is kept under a name; made, and kept, where nothing is."""
        inside = f"{name}/"
        known = {key.removeprefix(inside): array for key, array in self.arrays.items() if key.startswith(inside)}
        if known:
            return known
        made = {key: np.asarray(array) for key, array in make().items()}
        if self.path is not None:
            self.arrays |= {f"{inside}{key}": array for key, array in made.items()}
            self._write(self.path)
        return made

    def _write(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **{KEY: np.array(self.key)}, **self.arrays)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_bytes(buffer.getvalue())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def finish(self) -> None:
        """The calibration is done: the file goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
