"""Tiny language models of transformers with random weights, and logits of a row alone as one would compute them without any engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.decoding.statistics import Sampling

VOCABULARY, MASK, EOS = 32, 31, 30
SAMPLING = Sampling(MASK)


@cache
def qwen3(layers: int = 2) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    return sharpened(Qwen3ForCausalLM(config))


@cache
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return sharpened(LlamaForCausalLM(config))


def sharpened(model: Any) -> Any:
    """Larger weights, and masks that say less of themselves: answers of many tokens and confidences, from attention that matters."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(9 if name == "lm_head.weight" else 6 if "self_attn" in name else 3)
    model.get_input_embeddings().weight.data[MASK] *= 0.3
    return model.eval()


def ragged(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in lengths]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids with padding on the left that is no zero, and where there is none."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[7] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, torch.arange(longest) >= torch.tensor([longest - len(prompt) for prompt in prompts])[:, None]


@torch.no_grad()
def plain(model: Any, tokens: Tensor, seen: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [n, V] of one row [n] in which query i sees the keys that bool [n, n] says."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    positions = torch.arange(len(tokens)) if positions is None else positions
    return model(input_ids=tokens[None], attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0]


class Alone:
    """A `LogitsFn` that forwards every row by itself, without its padding and without a cache.

    Args:
        block_length: 0 for a model that sees everything.
        prompt: Columns before the first generated one; blocks are counted from there, or from the row's first token if `aligned`.
        shift: 1 where a token is predicted at the position before.
    """

    def __init__(self, model: Any, block_length: int, prompt: int, aligned: bool = False, shift: int = 0) -> None:
        self.model, self.block_length, self.prompt, self.aligned, self.shift = model, block_length, prompt, aligned, shift

    def seen(self, length: int, origin: int, block_length: int) -> Tensor:
        if not block_length:
            return torch.ones(length, length, dtype=torch.bool)
        anchor = 0 if self.aligned else self.prompt - origin
        block = [(i - anchor) // block_length for i in range(length)]
        return torch.tensor([[theirs <= mine for theirs in block] for mine in block])

    def row(self, tokens: Tensor, origin: int, columns: Tensor, block_length: int | None = None) -> Tensor:
        """Logits [W, V] of some columns of a row [L]."""
        own = tokens[origin:]
        logits = plain(self.model, own, self.seen(len(own), origin, self.block_length if block_length is None else block_length))
        return logits[(columns - self.shift - origin).clamp(min=0)]

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        origins = valid.int().argmax(-1).tolist()
        return torch.stack([self.row(*each) for each in zip(tokens, origins, columns, strict=True)])

    def shadow(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """Each column's logits at a mask that sees what the column sees, itself in its place: one forward for each."""
        rows = []
        for own, origin, asked in zip(tokens, valid.int().argmax(-1).tolist(), columns, strict=True):
            n, found = len(own) - origin, []
            for place in (asked - origin).tolist():
                seen = torch.zeros(n + 1, n + 1, dtype=torch.bool)
                seen[:n, :n] = self.seen(n, origin, self.block_length)
                seen[n] = seen[place]
                seen[n, place], seen[n, n] = False, True
                ids = torch.cat([own[origin:], torch.tensor([MASK])])
                found.append(plain(self.model, ids, seen, torch.tensor([*range(n), place]))[n])
            rows.append(torch.stack(found))
        return torch.stack(rows)
