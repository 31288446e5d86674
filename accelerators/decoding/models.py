"""Language models as the engine calls them: stock transformers models under a mask of our own, and remote-code LLaDA and Dream."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from hasten.accelerators.decoding.cache import Memory
from hasten.accelerators.decoding.generate import LogitsFn

Attention = Literal["block-causal", "bidirectional"]
"""What a position sees: its own block and those before it (LLaDA2, SDAR, `puzzles`), or everything (LLaDA, Dream)."""


@runtime_checkable
class LanguageModel(Protocol):
    """A model as the engine calls it.

    Attributes:
        attention: What it was trained with.
        context: Positions that it was made for; None where that is not known.
    """

    attention: Attention
    context: int | None

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor, /) -> Tensor:
        """Logits [r, W, V] of some columns; a `LogitsFn`."""
        ...


IMPLEMENTATIONS = ("sdpa", "eager")
"""Those of transformers that take any mask."""


class CausalLM:
    """A causal language model of transformers (`AutoModelForCausalLM`) that was trained as a diffusion model.

    Its classes are causal by themselves; a 4-D mask says otherwise. Whether the model obeys is tried out on a few tokens.

    Args:
        model: Qwen3, Llama and their like.
        attention: What it was trained with.
        shifted: Whether a token is predicted at the position before its own, as in models that were adapted from autoregressive ones.

    Attributes:
        context: Positions that the model was made for; None where its configuration does not say.

    Raises:
        ValueError: The model cannot be run under such a mask; the message says why.
    """

    def __init__(self, model: Any, *, attention: Attention = "block-causal", shifted: bool = False) -> None:
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, not {attention!r}")
        self.model, self.attention, self.shifted = model, attention, shifted
        self.name = type(model).__name__
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"{self.name} runs {implementation!r} attention, which takes no 4-D mask and would stay causal: "
                "load it with attn_implementation='sdpa'"
            )
        other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if other:
            raise ValueError(
                f"{self.name} has layers of {', '.join(sorted(other))}: only full attention can be told by a mask what it sees"
            )
        self._decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        self._head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._check()

    @property
    def lead(self) -> int:
        """Columns before a window that its logits need."""
        return int(self.shifted)

    def read(self, ids: Tensor, seen: Tensor, positions: Tensor, at: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits [r, W, V] of some of the tokens that are forwarded.

        Args:
            ids: int64 [r, F].
            seen: bool [r, F, K], which keys each of them sees; K is F, or what the memory was aimed at.
            positions: int64 [r, F], counted from each row's first token.
            at: int64 [r, W], places among the F.
            memory: Keys and values of other tokens.
        """
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
        # The lowest number instead of -inf, which some attention kernels turn into NaN.
        mask = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]
        run = self.model if self._decoder is None else self._decoder
        out = run(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=memory, use_cache=memory is not None)
        if self._decoder is None:
            return out.logits.take_along_dim(at[..., None], 1)
        return self._head(out.last_hidden_state.take_along_dim(at[..., None], 1))

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """A `LogitsFn` that sees everything, whatever `attention` says."""
        seen = valid[:, None].expand(-1, tokens.shape[1], -1)
        return self.read(tokens, seen, _positions(valid), (columns - self.lead).clamp(min=0))

    def shadow(self, mask_id: int) -> LogitsFn:
        """A `LogitsFn` of masks in the places of the columns, each of which sees everything but the token in its place."""
        return partial(self._shadow, mask_id)

    def _shadow(self, mask_id: int, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        (rows, length), width = tokens.shape, columns.shape[1]
        real = valid[:, None].expand(-1, length, -1)
        beside = valid[:, None].expand(-1, width, -1).scatter(-1, columns[..., None], False)
        seen = torch.cat([torch.cat([real, real.new_zeros(rows, length, width)], 2), shadow_rows(beside)], 1)
        positions = _positions(valid)
        ids = torch.cat([tokens, torch.full_like(columns, mask_id)], 1)
        at = torch.arange(length, length + width, device=tokens.device).expand(rows, -1)
        return self.read(ids, seen, torch.cat([positions, positions.gather(1, columns)], 1), at)

    @torch.no_grad()
    def _check(self) -> None:
        """Tries the mask out: the second of two tokens must count for the first one in the same block, and not in another one."""
        device = self.model.device
        ids = torch.tensor([[0, 1], [0, 2]], device=device)
        positions = torch.tensor([[0, 1]] * 2, device=device)
        first = torch.zeros(2, 1, dtype=torch.int64, device=device)
        together = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
        apart = together.tril()
        inner, whole = self._decoder, None
        if inner is not None and self._head is not None:
            whole = self.read(ids, together, positions, first)
        self._decoder = None
        a, b = self.read(ids, together, positions, first)
        c, d = self.read(ids, apart, positions, first)
        if torch.equal(a, b):
            raise ValueError(f"{self.name} stays causal under a 4-D mask: pass a model whose attention takes one, such as Qwen3 or Llama")
        if not torch.allclose(c, d, rtol=1e-3, atol=1e-3 * float((a - b).abs().max())):
            raise ValueError(
                f"{self.name} sees what a 4-D mask hides from it: pass a model whose attention takes one, such as Qwen3 or Llama"
            )
        # Some models do more to their logits than the head does; those are run whole.
        if whole is not None and torch.allclose(whole[0], a, rtol=1e-2, atol=1e-2 * float(a.abs().max())):
            self._decoder = inner


class LLaDA:
    """LLaDA and LLaDA-MoE as they are published (remote code): `model(input_ids, attention_mask=...)`, everything sees everything.

    Published versions of the code ignore the mask, so that padding would be seen. Whether this one does is tried out; if so, rows of
    different length are forwarded one length after another, which reads back and takes a call of the model for each.

    Args:
        model: As `AutoModel.from_pretrained(..., trust_remote_code=True)` gives it.

    Attributes:
        context: Positions that the model was made for; None where its configuration does not say.
    """

    attention: Attention = "bidirectional"

    def __init__(self, model: Any) -> None:
        self.model = model
        config = getattr(model, "config", None)
        self.context: int | None = getattr(config, "max_sequence_length", None) or getattr(config, "max_position_embeddings", None)
        self.pads = self._obeys()

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """A `LogitsFn`."""
        if self.pads:
            return self.model(input_ids=tokens, attention_mask=valid.long()).logits.take_along_dim(columns[..., None], 1)
        ends = torch.stack([valid.int().argmax(-1), valid.shape[1] - valid.flip(-1).int().argmax(-1)], -1).tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (begin, end) in enumerate(ends):
            groups.setdefault((begin, end), []).append(row)
        found: dict[int, Tensor] = {}
        for (begin, end), members in groups.items():
            chosen = torch.tensor(members, device=tokens.device)
            logits = self.model(input_ids=tokens[chosen, begin:end]).logits
            at = (columns[chosen] - begin).clamp(max=end - begin - 1)
            found.update(zip(members, logits.take_along_dim(at[..., None], 1), strict=True))
        return torch.stack([found[row] for row in range(len(tokens))])

    @torch.no_grad()
    def _obeys(self) -> bool:
        ids = torch.tensor([[0, 1, 2], [3, 1, 2]], device=self.model.device)
        mask = torch.tensor([[0, 1, 1]] * 2, device=self.model.device)
        a, b = self.model(input_ids=ids, attention_mask=mask).logits[:, 1:]
        bare = self.model(input_ids=ids).logits[:, 1:]
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float((bare[0] - bare[1]).abs().max()))


class Dream:
    """Dream as it is published (remote code): `model(input_ids, attention_mask, position_ids)`, logits shifted by one position.

    Args:
        model: As `AutoModel.from_pretrained(..., trust_remote_code=True)` gives it.

    Attributes:
        context: Positions that the model was made for; None where its configuration does not say.
    """

    attention: Attention = "bidirectional"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.context: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """A `LogitsFn`."""
        length = tokens.shape[1]
        mask = valid[:, None, None].expand(-1, 1, length, -1)
        logits = self.model(tokens, mask, _positions(valid)).logits
        return logits.take_along_dim((columns - 1).clamp(min=0)[..., None], 1)


def adapt(model: Any, *, attention: Attention | None = None, shifted: bool = False) -> LanguageModel:
    """The adapter that fits a model.

    Args:
        model: A model of transformers, or LLaDA or Dream from remote code, which are known by the `model_type` of their configuration; or
            anything that is a `LanguageModel` already.
        attention: For a model of transformers; "block-causal" unless told.
        shifted: Likewise; Dream is shifted in any case.

    Raises:
        ValueError: There is no adapter, or the model does not fit it.
    """
    if not isinstance(model, nn.Module) and isinstance(model, LanguageModel):
        return model
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"model must be a language model of transformers, not {type(model).__name__}")
    kind = str(getattr(model.config, "model_type", "")).lower()
    if kind in ("llada", "dream"):
        if attention == "block-causal":
            raise ValueError(f"attention must be 'bidirectional' for {type(model).__name__}: it sees everything, not {attention!r}")
        return LLaDA(model) if kind == "llada" else Dream(model)
    return CausalLM(model, attention=attention or "block-causal", shifted=shifted)


def shadow_rows(beside: Tensor) -> Tensor:
    """What shadows see, bool [r, W, K + W]: of the other keys what `beside` says, and each itself."""
    rows, width, _ = beside.shape
    return torch.cat([beside, torch.eye(width, dtype=torch.bool, device=beside.device).expand(rows, -1, -1)], 2)


def _positions(valid: Tensor) -> Tensor:
    """Positions [r, L], counted from each row's first token."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return (columns - valid.int().argmax(-1, keepdim=True)).clamp(min=0)
