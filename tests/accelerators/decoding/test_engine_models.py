"""Adapters: stock models under a mask, stand-ins with the signatures of LLaDA's and Dream's published code, and models that do not obey."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators.decoding.cache import Memory
from hasten.accelerators.decoding.engine import Engine, Generated
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.accelerators.decoding.models import CausalLM, Dream, LLaDA, adapt
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from tests.accelerators.decoding.tiny import EOS, SAMPLING, llama, qwen3, ragged

PROMPTS = ragged((7, 4, 7, 2, 4))


def run(model: Any, cache: Any = "none") -> Generated:
    engine = Engine(model, ThresholdDecoding(0.3), FixedBlocks(6), cache)
    return engine.generate(PROMPTS, sampling=SAMPLING, length=12, eos_id=EOS)


def whole(tokens: Tensor, keys: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits of a model that sees all keys, bool [r, L]."""
    length = tokens.shape[1]
    mask = torch.zeros(len(tokens), 1, length, length).masked_fill(~keys[:, None, None], torch.finfo(torch.float32).min)
    positions = torch.arange(length).expand(len(tokens), -1) if positions is None else positions
    return qwen3()(input_ids=tokens, attention_mask=mask, position_ids=positions).logits


class PublishedLLaDA(nn.Module):
    """With the signature of LLaDA's `LLaDAModelLM.forward`; the attention mask counts only if it `obeys`."""

    device = torch.device("cpu")

    def __init__(self, obeys: bool) -> None:
        super().__init__()
        self.obeys, self.calls = obeys, 0
        self.config = SimpleNamespace(model_type="llada", max_sequence_length=64)

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        self.calls += 1
        keys = attention_mask.bool() if self.obeys and attention_mask is not None else torch.ones_like(input_ids, dtype=torch.bool)
        return SimpleNamespace(logits=whole(input_ids, keys))


class PublishedDream(nn.Module):
    """With the signature of Dream's `DreamModel.forward`: a 4-D boolean mask, positions by keyword or third."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="Dream", max_position_embeddings=64)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        num_logits_to_keep: int = 0,
    ) -> Any:
        assert attention_mask.dtype == torch.bool and attention_mask.shape == (*input_ids.shape[:1], 1, *input_ids.shape[1:] * 2)
        return SimpleNamespace(logits=whole(input_ids, attention_mask[:, 0, 0], position_ids))


@pytest.mark.parametrize("obeys", [False, True])
def test_llada_sees_no_padding_whether_its_code_knows_the_mask_or_not(obeys: bool) -> None:
    stand_in = PublishedLLaDA(obeys)
    adapter = adapt(stand_in)
    assert isinstance(adapter, LLaDA) and adapter.pads == obeys and adapter.context == 64
    stand_in.calls = 0
    found, expected = run(adapter), run(CausalLM(qwen3(), attention="bidirectional"))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.forwards, expected.forwards)
    # Without a mask, a call for each of three lengths; as many of them as are left.
    assert stand_in.calls == found.calls if obeys else found.calls < stand_in.calls <= 3 * found.calls


def test_dream_s_logits_are_shifted() -> None:
    adapter = adapt(PublishedDream())
    assert isinstance(adapter, Dream) and adapter.context == 64
    found, expected = run(adapter), run(CausalLM(qwen3(), attention="bidirectional", shifted=True))
    assert torch.equal(found.tokens, expected.tokens)
    assert not torch.equal(found.tokens, run(CausalLM(qwen3(), attention="bidirectional")).tokens)


# ----------------------------------------------------------------------------------------------------- models that do not obey


def altered(base: Any, forward: Any) -> Any:
    """A copy whose decoder is called through `forward(call, kwargs)`."""
    model = copy.deepcopy(base)
    call = model.model.forward
    model.model.forward = lambda **kwargs: forward(call, kwargs)
    return model


def test_a_model_that_stays_causal_is_refused() -> None:
    model = altered(qwen3(), lambda call, kwargs: call(**{**kwargs, "attention_mask": None}))
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM stays causal under a 4-D mask: pass a model"):
        CausalLM(model)


def test_a_model_that_sees_what_is_hidden_is_refused() -> None:
    model = altered(llama(), lambda call, kwargs: call(**{**kwargs, "attention_mask": torch.zeros_like(kwargs["attention_mask"])}))
    with pytest.raises(ValueError, match="LlamaForCausalLM sees what a 4-D mask hides from it"):
        CausalLM(model)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", None])
def test_attention_that_takes_no_mask_is_refused(name: str | None) -> None:
    model = copy.deepcopy(qwen3())
    model.config._attn_implementation_internal = name
    with pytest.raises(ValueError, match="load it with attn_implementation='sdpa'"):
        CausalLM(model)


def test_layers_with_a_window_are_refused() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(**sizes, head_dim=8, num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="layers of sliding_attention"):
        CausalLM(Qwen3ForCausalLM(config))


def test_unknown_models_and_attentions_are_refused() -> None:
    with pytest.raises(ValueError, match="attention must be one of block-causal, bidirectional"):
        CausalLM(qwen3(), attention="causal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a language model of transformers, not int"):
        adapt(3)
    with pytest.raises(ValueError, match="'bidirectional' for PublishedDream"):
        adapt(PublishedDream(), attention="block-causal")
    adapter = CausalLM(qwen3())
    assert adapt(adapter) is adapter


@pytest.mark.parametrize("cache", ["none", "block-append"])
def test_eager_attention_takes_the_same_mask(cache: Any) -> None:
    model = copy.deepcopy(qwen3())
    model.set_attn_implementation("eager")
    assert torch.equal(run(CausalLM(model), cache).tokens, run(CausalLM(qwen3()), cache).tokens)


@pytest.mark.parametrize("cache", ["none", "block-append"])
def test_logits_that_are_changed_behind_the_head_stay_so(cache: Any) -> None:
    from transformers import Qwen3ForCausalLM

    class Capped(Qwen3ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    model = copy.deepcopy(qwen3())
    model.__class__ = Capped
    ids = torch.tensor([PROMPTS[0]])
    seen = torch.ones(1, 7, 7, dtype=torch.bool)
    at = torch.tensor([[2, 5]])
    positions = torch.arange(7)[None]
    capped, bare = (CausalLM(m).read(ids, seen, positions, at) for m in (model, qwen3()))
    torch.testing.assert_close(capped, 2 * torch.tanh(bare / 2))
    # A flatter distribution commits one token a step, whatever the cache.
    assert (run(CausalLM(model), cache).forwards >= run(CausalLM(qwen3()), cache).forwards).all()
    assert torch.equal(run(CausalLM(model), cache).tokens, run(CausalLM(model), "none").tokens)


# ------------------------------------------------------------------------------------------------------------------------ memory


def test_versions_of_a_row_do_not_see_each_other_and_the_first_is_kept() -> None:
    memory = Memory(3, 6)
    generator = torch.Generator().manual_seed(0)

    def states(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, 2, columns, 4, generator=generator)

    first = states(3, 4)
    memory.aim(torch.tensor([[0, 1, 2, 3]] * 3), slice(0, 4))
    keys, _ = memory.update(first, first, 0)
    assert torch.equal(keys, first)
    drafts = states(4, 2)
    written = torch.tensor([[3, 4], [3, 4], [2, 3], [2, 3]])
    memory.aim(written, slice(1, 5), places=torch.tensor([2, 2, 0, 0]), kept=torch.tensor([0, 2]))
    keys, _ = memory.update(drafts, drafts, 0)
    for draft, row in enumerate((2, 2, 0, 0)):
        expected = torch.cat([first[row], torch.zeros(2, 2, 4).movedim(1, 1)], 1)
        expected[:, written[draft]] = drafts[draft]
        assert torch.equal(keys[draft], expected[:, 1:5])
    memory.reindex(torch.tensor([2, 0]))
    assert torch.equal(memory.keys[0][0, :, 3:5], drafts[0]) and torch.equal(memory.keys[0][1, :, 2:4], drafts[2])
    assert torch.equal(memory.keys[0][0, :, :3], first[2, :, :3]) and memory.keys[0].shape == (2, 2, 6, 4)
