"""Files that are written whole or not at all, and checks, before any work, that they can be."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image


def check_folder(option: str, folder: Path) -> None:
    """Tries whether files can be written into `folder`, which need not exist yet. Leaves nothing behind.

    Raises:
        BadInput: They cannot.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"{option} must be a folder that can be written to, but {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise BadInput(f"{option} must be a folder that can be written to, not {folder}: {error.strerror or error}") from None


def check_target(option: str, path: Path) -> None:
    """Tries whether the file `path` can be written.

    Raises:
        BadInput: It cannot.
    """
    if path.is_dir():
        raise BadInput(f"{option} must be a file, but {path} is a folder")
    check_folder(f"the folder of {option}", path.parent)


def write(path: Path, data: bytes) -> None:
    """Writes the file so that an interrupted run leaves the old one or none, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def png(image: Image, caption: str, settings: Mapping[str, Any]) -> bytes:
    """The picture as a PNG whose text says how it was made: `Title` the caption, `hasten` all settings as JSON."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("Title", caption)
    info.add_itxt("hasten", json.dumps(settings, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of a text file, without blank ones.

    Raises:
        BadInput: It is missing, no UTF-8 text, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise BadInput(f"{option} must be a text file with one caption a line, not {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{option} must be UTF-8 text with one caption a line; {path} is something else") from None
    lines = [line for line in lines if line]
    if not lines:
        raise BadInput(f"{option} must hold at least one caption, one a line; {path} is empty")
    return lines
