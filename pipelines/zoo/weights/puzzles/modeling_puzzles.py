"""A Qwen3 language model that reads in blocks: within a block every position sees every other, later blocks are unseen.

Qwen3 itself would take a 2-D mask, or none, for a causal one. This file imports nothing but torch and transformers: a copy of it lies
beside the weights and is loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import Cache


class PuzzlesConfig(Qwen3Config):
    """Qwen3's configuration and `block_length`, the positions of a block.

    The model type is one of its own: without the remote code, loading fails instead of giving a causal model.
    """

    model_type = "hasten_puzzles"
    block_length: int = 16


class PuzzlesForMaskedLM(Qwen3ForCausalLM):
    """Predicts the token at every masked position; the logits are not shifted."""

    config_class = PuzzlesConfig
    # Kernels that take no dense mask would silently leave the blocks out.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def block_causal_mask(self, attention_mask: Tensor, queries: int) -> Tensor:
        """The additive 4-D mask [B, 1, queries, length] of the last `queries` positions.

        Blocks are counted from the first position of the sequence, padding included. A query sees the keys of its own block and of
        earlier ones that are not padding.

        Args:
            attention_mask: [B, length], non-zero where a token is real; covers what is cached as well.
            queries: Positions that are not cached, the last ones.
        """
        block = torch.arange(attention_mask.shape[1], device=attention_mask.device) // self.config.block_length
        seen = (block[-queries:, None] >= block) & attention_mask.bool()[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        # The lowest number instead of -inf: a row of padding that sees nothing would become NaN.
        return mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, queries, vocabulary], as of `Qwen3ForCausalLM`.

        Args:
            input_ids: [B, queries].
            attention_mask: A 4-D mask is used as it is. A 2-D one [B, cached + queries], or none, becomes block-causal.
            position_ids: [B, queries]; counted from the first position, padding included, by default.
            past_key_values: Keys and values of earlier blocks.
            inputs_embeds: [B, queries, hidden] instead of `input_ids`.
            kwargs: Others of `Qwen3ForCausalLM`.

        Raises:
            ValueError: A 2-D mask does not cover the cached and the new positions.
        """
        if attention_mask is None or attention_mask.ndim == 2:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is None:
                raise ValueError("either input_ids or inputs_embeds must be given")
            batch, queries = given.shape[:2]
            length = queries + (0 if past_key_values is None else past_key_values.get_seq_length())
            if attention_mask is None:
                attention_mask = torch.ones(batch, length, device=given.device)
            if attention_mask.shape != (batch, length):
                raise ValueError(f"attention_mask must have shape {(batch, length)}, not {tuple(attention_mask.shape)}")
            attention_mask = self.block_causal_mask(attention_mask, queries)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
