"""The loop with a cache: each forward holds what is not in it, and every row has columns, a block and a progress of its own.

Finished blocks of a block-causal model are forwarded once more, together with the block that follows them where there is room, and then
only their keys and values are used. That is exact. For models that see both ways, Fast-dLLM's prefix and dual caches (arXiv 2505.22618)
and dInfer's vicinity refresh (arXiv 2510.08666) keep keys and values that were true at the start of the block.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.accelerators.decoding.cache import Memory
from hasten.accelerators.decoding.compatibility import Cache
from hasten.accelerators.decoding.generate import Logits, Loop, Rows
from hasten.accelerators.decoding.geometry import Canvas, FixedBlocks, window
from hasten.accelerators.decoding.models import CausalLM, shadow_rows

EXACT: tuple[Cache, ...] = ("none", "block-append")
APPROXIMATE: tuple[Cache, ...] = ("prefix", "dual", "vicinity")

VICINITY, WARMUP = 16, 4
"""Columns on either side of the block that the vicinity cache forwards with it, and whole forwards that it begins with; both dInfer's."""


@dataclass
class Track:
    """What the host knows of the batch, which may be out of date, and what is kept of keys and values.

    Attributes:
        low, high: Columns that any row may see are from `low` up to, not including, `high`.
        first: The first column of a block that any row is in.
        calls: Of the model.
        recent: Whether nothing was forwarded since the rows were read.
        pending: Which rows were at the beginning of a block when they were read.
        wide: Whether forwards are to hold two blocks while it is not known whether a row needs that.
        cached: int64 [r], the columns before are in the memory for good.
    """

    memory: Memory
    cached: Tensor
    low: int
    high: int
    first: int
    calls: int = 0
    recent: bool = False
    pending: list[bool] = field(default_factory=list)
    wide: bool = True


@dataclass(frozen=True, kw_only=True)
class CachedLoop(Loop):
    """A loop that forwards only what is not in the cache.

    Attributes:
        model: The model.
        cache: What is kept of keys and values.
        track: Where the rows are.
        drafting: Whether rows come in several drafts at once, in any selection; their progress is then read back in each forward.
        wide_cost: What a forward of two blocks costs, in forwards of one.
    """

    model: CausalLM
    cache: Cache
    track: Track
    drafting: bool = False
    wide_cost: float = 2.0

    def forward(self, rows: Rows) -> tuple[Logits, Rows]:
        """Runs the model on what is not cached, and counts that."""
        self.track.calls += 1
        if self.drafting:
            logits = self._drafts(rows)
        elif self.cache == "none":
            logits = self._uncached(rows)
        elif self.cache == "block-append":
            logits = self._appended(rows)
        else:
            logits = self._refreshed(rows)
        useful = ~rows.done
        if logits.ready is not None and self.cache in APPROXIMATE:
            useful = useful & logits.ready
        self.track.recent = False
        return logits, replace(rows, forwards=rows.forwards + useful)

    # ------------------------------------------------------------------------------------------------- exact, block by block

    def _uncached(self, rows: Rows) -> Logits:
        track, zero = self.track, torch.zeros_like(rows.index)
        logits = self._read(rows, zero + track.low, track.high - track.low, rows.canvas.limit, slice(track.low, track.high))
        track.high = min(track.high + self.width, rows.canvas.tokens.shape[1])
        return logits

    def _appended(self, rows: Rows) -> Logits:
        """Forwards each row from what it has cached on: the block before if that is not cached yet, and its block if there is room.

        Two blocks wide, all rows have their logits. One block wide is cheaper; a row that has come to a new block then takes one forward
        to cache the one before, and another for its logits.
        """
        track, length = self.track, rows.extent.length
        block = self._boundary(rows.canvas, rows.extent.start, length)
        start = (track.cached - self.model.lead).clamp(min=0)
        wide = any(track.pending) if track.recent else track.wide
        room = rows.canvas.prompt + self.width if track.calls == 1 else (2 if wide else 1) * self.width + self.model.lead
        ready = block + length - start <= room
        track.cached = torch.where(ready, block, self._boundary(rows.canvas, start + room, length))
        logits = self._read(rows, start, room, rows.canvas.limit, slice(track.low, track.high))
        track.high = min(track.high + self.width, rows.canvas.tokens.shape[1])
        return logits._replace(ready=ready)

    def _drafts(self, rows: Rows) -> Logits:
        """As the others, for any rows in any number; what is kept is of the first version of each."""
        track, canvas, length = self.track, rows.canvas, rows.extent.length
        block = self._boundary(canvas, rows.extent.start, length)
        start = canvas.origin.amin().expand_as(block)
        if self.cache == "block-append":
            start = (track.cached[rows.index] - self.model.lead).clamp(min=0)
        room, high, low = torch.stack([block + length - start, block + length, -canvas.origin]).amax(-1).tolist()
        if self.cache == "none":
            return self._read(rows, start, room, canvas.limit, slice(-low, -low + room))
        new = torch.ones_like(rows.index, dtype=torch.bool)
        new[1:] = rows.index[1:] != rows.index[:-1]
        kept = new.nonzero()[:, 0]
        track.cached = track.cached.index_copy(0, rows.index[kept], block[kept])
        seen = slice(-low, min(high, canvas.tokens.shape[1]))
        return self._read(rows, start, room, canvas.limit, seen, rows.index, kept)

    def _boundary(self, canvas: Canvas, column: Tensor, length: Tensor) -> Tensor:
        """The first column of the block that a column is in."""
        return column - (column - self._anchor(canvas)) % length

    def _anchor(self, canvas: Canvas) -> Tensor:
        """A column [r] at which a block begins."""
        aligned = isinstance(self.geometry, FixedBlocks) and self.geometry.aligned
        return canvas.origin if aligned else torch.full_like(canvas.origin, canvas.prompt)

    # ------------------------------------------------------------------------------- approximate, refreshed at a block's start

    def _refreshed(self, rows: Rows) -> Logits:
        """Forwards whole rows at the start of a block and what the cache leaves to be forwarded else.

        A row that may have come to a new block waits until that is known, so that rows which have not are not refreshed with it.
        """
        track, whole = self.track, slice(self.track.low, rows.canvas.tokens.shape[1])
        if track.calls == 1 or (self.cache == "vicinity" and track.calls <= WARMUP):
            return self._whole(rows, whole)
        if not (track.recent and any(track.pending)):
            return self._near(rows, whole)._replace(ready=~rows.fresh)
        device = rows.index.device
        stale, other = ([i for i, pending in enumerate(track.pending) if pending is which] for which in (True, False))
        parts: list[tuple[Tensor, Logits]] = []
        for chosen, read in ((stale, self._whole), (other, self._near)):
            if chosen:
                places = torch.tensor(chosen, device=device)
                parts.append((places, read(rows.reindex(places), whole, places)))
        track.calls += len(parts) - 1
        order = torch.cat([places for places, _ in parts]).argsort()
        shadows = [logits.shadow for _, logits in parts if logits.shadow is not None]
        return Logits(torch.cat([logits.window for _, logits in parts])[order], torch.cat(shadows)[order] if shadows else None)

    def _whole(self, rows: Rows, seen: slice, places: Tensor | None = None) -> Logits:
        begin = torch.full_like(rows.index, seen.start)
        return self._read(rows, begin, seen.stop - seen.start, rows.canvas.limit, seen, places)

    def _near(self, rows: Rows, seen: slice, places: Tensor | None = None) -> Logits:
        around = VICINITY if self.cache == "vicinity" else 0
        start = (rows.extent.start - self.model.lead - around).clamp(min=0)
        width, end = self.width + self.model.lead + 2 * around, rows.extent.end + around
        if self.cache == "prefix":
            width, end = seen.stop - self.track.first + self.model.lead, rows.canvas.limit
        return self._read(rows, start, width, torch.minimum(end, rows.canvas.limit), seen, places)

    # ------------------------------------------------------------------------------------------------------------ one forward

    def _read(
        self, rows: Rows, start: Tensor, width: int, end: Tensor, keys: slice, places: Tensor | None = None, kept: Tensor | None = None
    ) -> Logits:
        """Forwards `width` columns of each row from `start`, int64 [r], on; those from `end`, int64 [r], on are of no account."""
        canvas, mask_id = rows.canvas, self.sampling.mask_id
        length, nowhere = canvas.tokens.shape[1], canvas.tokens.shape[1]
        columns = start[:, None] + torch.arange(width, device=start.device)
        outside = columns >= end[:, None]
        columns = torch.minimum(columns, end[:, None] - 1)
        shown = window(canvas, rows.extent.start, self.width)
        ids, positions, asked = canvas.tokens.gather(1, columns), columns, shown
        if self.shadow_fn is not None:
            keys = slice(keys.start, keys.stop if self.cache == "none" else length + 1)
        seen = self._seen(rows, columns, keys)
        at = rows.extent.start[:, None] + torch.arange(self.width, device=start.device) - self.model.lead - start[:, None]
        at = at.clamp(0, width - 1)
        writes = columns.masked_fill(outside, nowhere)
        if self.shadow_fn is not None:
            beside = self._seen(rows, asked, keys) & (asked[..., None] != torch.arange(keys.start, keys.stop, device=start.device))
            seen = torch.cat([torch.cat([seen, seen.new_zeros(*seen.shape[:2], self.width)], 2), shadow_rows(beside)], 1)
            ids = torch.cat([ids, torch.full_like(asked, mask_id)], 1)
            positions = torch.cat([positions, asked], 1)
            at = torch.cat([at, width + torch.arange(self.width, device=start.device).expand_as(asked)], 1)
            writes = torch.cat([writes, length + 1 + torch.arange(self.width, device=start.device).expand_as(asked)], 1)
            keys = slice(keys.start, keys.stop + self.width)
        memory = None
        if self.cache != "none":
            memory = self.track.memory
            memory.aim(writes, keys, places, kept)
        logits = self.model.read(ids, seen, (positions - canvas.origin[:, None]).clamp(min=0), at, memory)
        return Logits(logits[:, : self.width], logits[:, self.width :] if self.shadow_fn is not None else None)

    def _seen(self, rows: Rows, columns: Tensor, keys: slice) -> Tensor:
        """Which keys the columns [r, F] see, bool [r, F, K]. All see the row's first token: seeing nothing would give NaN."""
        canvas = rows.canvas
        key = torch.arange(keys.start, keys.stop, device=columns.device)
        valid = (key >= canvas.origin[:, None]) & (key < canvas.limit[:, None])
        if self.model.attention == "bidirectional":
            return valid[:, None].expand(-1, columns.shape[1], -1)
        anchor, length = self._anchor(canvas)[:, None], rows.extent.length[:, None]
        block_of_key = torch.div(key - anchor, length, rounding_mode="floor")
        block = torch.div(columns - anchor, length, rounding_mode="floor")
        return valid[:, None] & (block_of_key[:, None] <= block[..., None]) | (key == canvas.origin[:, None])[:, None]

    # --------------------------------------------------------------------------------------------------------- what is read back

    def numbers(self, rows: Rows) -> Tensor:
        """What `note` wants to know, int64 [6, r]."""
        block = self._boundary(rows.canvas, rows.extent.start, rows.extent.length)
        pending = rows.fresh if self.cache in APPROXIMATE else block > self.track.cached
        blocks = 1 + (rows.extent.start - rows.canvas.prompt) // rows.extent.length
        return torch.stack([pending.long(), block, rows.extent.start, rows.canvas.origin, rows.clock, blocks])

    def note(self, numbers: list[list[int]], keep: Tensor | None, limit: int) -> None:
        """Takes note of where the rows that stay are.

        Args:
            numbers: Of these rows.
            keep: int64 [n], their places among those before, if there are fewer now.
            limit: Columns of the canvas.
        """
        track, (pending, blocks, starts, origins, clock, begun) = self.track, numbers
        track.recent, track.pending = True, [bool(flag) for flag in pending]
        track.low, track.high, track.first = min(origins), min(max(blocks) + self.width, limit), min(starts)
        # A block of n steps takes n forwards of two blocks, or n + 1 of one.
        steps = sum(clock) / sum(begun)
        track.wide = steps * self.wide_cost <= steps + 1
        if keep is not None:
            track.memory.reindex(keep)
            track.cached = track.cached[keep]
