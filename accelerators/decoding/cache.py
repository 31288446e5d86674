"""Keys and values of a batch in buffers that are allocated once. Each row writes to columns of its own, and says which of them it sees.

Rows of a batch are at different places in their texts. A cache that grows by concatenation has one end for all of them; here a row's
columns are where they are on its canvas, and what a forward writes replaces what an earlier one wrote there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class Memory(Cache):
    """What a transformers model is given as `past_key_values`. `aim` it before each forward.

    Args:
        rows: Rows of the batch.
        columns: Columns that a row may write to.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def aim(self, written: Tensor, seen: slice, places: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Says where the next forward writes and what it sees.

        Args:
            written: int64 [r, F], the columns of the tokens that are forwarded. Where two are the same, either may win.
            seen: The columns that attention gets; the mask tells which of them count.
            places: int64 [r], which rows of the memory these are, if not all in their order. One may come several times, in versions that
                do not see each other.
            kept: int64 [k], the rows of this forward whose keys and values are kept; all unless told. No row of the memory twice.
        """
        self._written, self._seen, self._places, self._kept = written, seen, places, kept

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values [r, heads, F, size] of a layer in, and returns those that attention gets."""
        if layer_idx == len(self.keys):
            for buffers, states in ((self.keys, key_states), (self.values, value_states)):
                # Zeros, not whatever is there: a value that is no number would come through a mask.
                buffers.append(states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3]))
        return self._joined(self.keys[layer_idx], key_states), self._joined(self.values[layer_idx], value_states)

    def _joined(self, buffer: Tensor, states: Tensor) -> Tensor:
        written = self._written.to(states.device)
        if self._places is None:
            buffer.scatter_(2, written[:, None, :, None].expand_as(states), states)
            return buffer[:, :, self._seen]
        places = self._places.to(states.device)
        joined = buffer[places].scatter_(2, written[:, None, :, None].expand_as(states), states)
        if self._kept is not None:
            kept = self._kept.to(states.device)
            places, written, states = places[kept], written[kept], states[kept]
        heads = torch.arange(states.shape[1], device=states.device)
        buffer[places[:, None, None], heads[:, None], written[:, None]] = states
        return joined[:, :, self._seen]

    def reindex(self, rows: Tensor) -> None:
        """Keeps the given rows, int64 [n]."""
        self.rows = len(rows)
        self.keys = [buffer[rows.to(buffer.device)] for buffer in self.keys]
        self.values = [buffer[rows.to(buffer.device)] for buffer in self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given, and never counted on from here."""
        return 0
