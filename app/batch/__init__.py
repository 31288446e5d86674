"""Many pictures from many jobs: `hasten batch`, and the parts of it that the endpoint uses too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.app.batch.ray_painter import RayPainter as RayPainter

__all__ = ["RayPainter"]


def __getattr__(name: str) -> object:
    if name != "RayPainter":
        raise AttributeError(f"module 'hasten.app.batch' has no attribute {name!r}")
    from hasten.app.batch.ray_painter import RayPainter  # with it comes torch, which `hasten batch --help` does without

    return RayPainter
