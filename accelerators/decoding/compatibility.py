"""Which schedules, geometries, executors and caches go together. What does not is refused with the reason, before anything is computed."""

from __future__ import annotations

from typing import Literal, get_args

from hasten.accelerators.decoding.geometry import Geometry
from hasten.accelerators.decoding.schedule import Schedule

Cache = Literal["none", "prefix", "dual", "vicinity", "block-append", "delayed", "selective"]
"""What is kept of keys and values.

prefix: of what is left of the block; dual: of everything but the block; vicinity: of everything but the block and its surroundings (these
three refresh at the start of a block). block-append: of finished blocks, exact for block-causal models. delayed: of tokens once they
are decoded. selective: of tokens that are not chosen for recomputation.
"""


def refuse(schedule: Schedule, *, geometry: Geometry | None = None, cache: Cache = "none", drafts: bool = False) -> None:
    """Returns if these go together.

    Args:
        schedule: What is committed.
        geometry: Where the blocks are.
        cache: What is kept of keys and values between forwards.
        drafts: Whether several drafts of a row are evaluated at once and verified (FreeDave).

    Raises:
        ValueError: They do not go together; the message says why.
    """
    if cache not in get_args(Cache):
        raise ValueError(f"cache must be one of {', '.join(get_args(Cache))}, not {cache!r}")
    name = type(schedule).__name__
    if drafts and schedule.revises:
        raise ValueError(f"FreeDave cannot verify {name}: drafts only add tokens, and {name} goes back on tokens that stand")
    if cache in ("delayed", "selective") and schedule.revises:
        raise ValueError(f"{name} cannot use the {cache} cache: it keeps the keys and values of tokens that {name} may still change")
    if geometry is None:
        return
    place = type(geometry).__name__
    if drafts and geometry.inserts:
        raise ValueError(f"FreeDave cannot draft under {place}: an insertion moves the positions that the other drafts have filled")
    if cache != "none" and geometry.inserts:
        raise ValueError(f"{place} cannot use the {cache} cache: an insertion moves every later position, whose keys then belong elsewhere")
    if cache == "block-append" and geometry.adapts:
        raise ValueError(f"{place} cannot use the {cache} cache: block-causal models see blocks of the length that they were trained with")
