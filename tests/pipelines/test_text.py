"""The text pipeline: what goes in and comes out, against diffusers' pipeline and the loop, and what it says to bad input."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hasten.accelerators.decoding.adablock import AdaBlock
from hasten.accelerators.decoding.daedal import DAEDAL
from hasten.accelerators.decoding.engine import COMMITTED, FINAL, GUESSED, MASKED
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.hex import HEX
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.pipelines import decoding_schedulers
from hasten.pipelines.text import TextPipeline, TextUpdate
from hasten.pipelines.zoo.puzzles import new_config, new_tokenizer
from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesForMaskedLM

TEXTS = ["3? + ? = 91", "483 + 759 = ?", "depth 2 (????)??", "1??4/?4??/?1??/4??1"]
TOKENIZER = new_tokenizer()


def new_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = PuzzlesForMaskedLM(new_config(TOKENIZER, width=32, layers=2, heads=2, inner=48))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6 if "self_attn" in name else 3)
    model.lm_head.weight = torch.nn.Parameter(4 * torch.randn_like(model.lm_head.weight) / 32**0.5)
    return model.eval()


MODEL = new_model()


def pipeline(schedule: Any = None, **options: Any) -> TextPipeline:
    return TextPipeline(MODEL, TOKENIZER, ThresholdDecoding(0.4) if schedule is None else schedule, **options)


# ------------------------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("minimum", [1, 3])
def test_answers_are_those_of_the_pipeline_of_diffusers(minimum: int) -> None:
    from diffusers import LLaDA2Pipeline

    scheduler = decoding_schedulers.ThresholdDecoding(threshold=0.4, minimum=minimum)
    theirs = LLaDA2Pipeline(model=MODEL, scheduler=scheduler, tokenizer=TOKENIZER)
    theirs.set_progress_bar_config(disable=True)
    pipe = pipeline(ThresholdDecoding(0.4, minimum=minimum))
    batch = pipe(TEXTS, gen_length=32)
    for text, tokens, answer in zip(TEXTS, batch.tokens, batch.texts, strict=True):
        # One prompt at a time: in a batch, theirs counts blocks from the padding.
        out = theirs(text, gen_length=32, block_length=16, num_inference_steps=16, editing_threshold=None)
        assert out.sequences[0, : len(tokens)].tolist() == tokens
        assert answer == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert batch.exact and len({len(tokens) for tokens in batch.tokens}) >= 1


def test_what_was_spent_is_reported() -> None:
    pipe = pipeline(StaticDecoding(tokens_per_step=2), sync_every=1)
    out = pipe(TEXTS, gen_length=32)
    for tokens, steps, forwards, rate in zip(out.tokens, out.steps, out.forwards, out.tokens_per_forward, strict=True):
        assert len(tokens) == len(steps) and rate == len(tokens) / forwards
        assert tokens[-1] == TOKENIZER.eos_token_id or len(tokens) == 32
        assert min(steps) >= 1 and max(steps) <= forwards  # prompt and padding took no forward of their own
        assert all(steps.count(step) <= 2 for step in steps)
    assert out.wasted == [0] * 4 and out.calls == max(out.forwards) and out.read_backs == out.calls and out.seconds > 0
    assert pipeline(StaticDecoding(tokens_per_step=2))(TEXTS, gen_length=32).tokens == out.tokens


def test_prompts_come_in_many_shapes() -> None:
    pipe = pipeline()
    ids = [TOKENIZER(text).input_ids for text in TEXTS]
    batch = pipe(TEXTS, gen_length=16)
    assert pipe(ids, gen_length=16).tokens == batch.tokens
    assert pipe(TEXTS[0], gen_length=16).tokens == batch.tokens[:1] == pipe(ids[0], gen_length=16).tokens
    assert pipe(torch.tensor(ids[0]), gen_length=16).tokens == pipe(torch.tensor([ids[0]] * 2), gen_length=16).tokens[:1]
    chat = [{"role": "user", "content": TEXTS[0]}]
    with pytest.raises(ValueError, match="no chat template for messages: pass texts"):
        pipe(chat)
    tokenizer = new_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    pipe = TextPipeline(MODEL, tokenizer, ThresholdDecoding(0.4))
    expected = pipe(TEXTS[0] + "=", gen_length=16).tokens
    assert pipe(chat, gen_length=16).tokens == expected and pipe([chat, chat], gen_length=16).tokens == expected * 2


def test_noise_belongs_to_the_row_s_seed() -> None:
    pipe = pipeline()
    batch = pipe(TEXTS, gen_length=16, temperature=1.0, seeds=7)
    assert batch.tokens != pipe(TEXTS, gen_length=16, temperature=1.0, seeds=8).tokens
    for row, text in enumerate(TEXTS):
        assert pipe(text, gen_length=16, temperature=1.0, seeds=[7 + row]).tokens == batch.tokens[row : row + 1]
    hot = pipe(TEXTS, gen_length=16, temperature=2.0, seeds=7)
    assert hot.forwards != pipe(TEXTS, gen_length=16, temperature=2.0, tempered=True, seeds=[7, 8, 9, 10]).forwards
    common = max((token for row in batch.tokens for token in row), key=lambda token: sum(row.count(token) for row in batch.tokens))
    assert all(common not in row for row in pipe(TEXTS, gen_length=16, temperature=1.0, seeds=7, suppressed=[common]).tokens)


def test_executors_geometries_and_caches_go_through() -> None:
    static = pipeline(StaticDecoding())(TEXTS, gen_length=32)
    drafted = pipeline(FreeDave(drafts=4))(TEXTS, gen_length=32)
    assert drafted.tokens == static.tokens and sum(drafted.forwards) < sum(static.forwards)
    both: dict[str, Any] = {"attention": "bidirectional"}
    assert pipeline(**both).engine.cache == "none" and pipeline(**both).exact
    assert not pipeline(cache="dual", **both).exact
    for geometry, length in ((AdaBlock((4, 5), 0.05, 8), 20), (DAEDAL(8, 24, 8, expansion=4, eos_window=4), None)):
        out = pipeline(geometry=geometry, **both)(TEXTS, gen_length=length)
        assert all(1 <= len(tokens) <= 26 and TOKENIZER.mask_token_id not in tokens for tokens in out.tokens)
    assert pipeline(block_length=8, shifted=True)(TEXTS, gen_length=16).tokens != pipeline(block_length=8)(TEXTS, gen_length=16).tokens


@pytest.mark.parametrize("attention", ["block-causal", "bidirectional"])
def test_block_lengths_vote(attention: Any) -> None:
    pipe = pipeline(attention=attention)
    experts = HEX((4, 8, 16), StaticDecoding(tokens_per_step=2))
    votes = pipe.vote(TEXTS[:2], experts, lambda text: text[:1] or None, gen_length=16)
    for i, text in enumerate(TEXTS[:2]):
        for j, length in enumerate(experts.block_lengths):
            alone = pipeline(experts.schedule, attention=attention, block_length=length)(text, gen_length=16)
            assert votes.answers[i][j] == (alone.texts[0][:1] or None)
        winner = votes.winners[i]
        assert winner is None or votes.answers[i].count(winner) == max(votes.answers[i].count(a) for a in votes.answers[i] if a is not None)
    likely = HEX((4, 8, 16), StaticDecoding(tokens_per_step=2), "likelihood")
    if attention == "bidirectional":
        assert pipe.vote(TEXTS[:2], likely, lambda text: text[:1] or None, gen_length=16).answers == votes.answers
    else:
        with pytest.raises(ValueError, match="tie='likelihood' needs a bidirectional model"):
            pipe.vote(TEXTS[:2], likely, lambda text: text, gen_length=16)


# -------------------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("schedule", [ThresholdDecoding(0.4), Saber()])
def test_the_stream_ends_with_the_answer_and_its_final_text_only_grows(schedule: Any) -> None:
    pipe, updates = pipeline(schedule), []
    out = pipe(TEXTS, gen_length=32, stream=updates.append)
    assert out.tokens == pipe(TEXTS, gen_length=32).tokens and out.wasted == [0] * 4
    marks = set()
    for row in range(4):
        mine: list[TextUpdate] = [update for update in updates if update.row == row]
        assert [update.step for update in mine] == list(range(1, len(mine) + 1)) and len(mine) == out.forwards[row]
        assert all(b.final.startswith(a.final) for a, b in pairwise(mine))
        assert [update.done for update in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].final == mine[-1].text == out.texts[row] and set(mine[-1].marks) == {FINAL}
        marks |= {mark for update in mine for mark in update.marks}
    assert marks == {MASKED, GUESSED, COMMITTED, FINAL}
    lazily = pipe.stream(TEXTS[:1], gen_length=16)
    assert isinstance(next(lazily), TextUpdate)


# ---------------------------------------------------------------------------------------------------------------------- loading


def test_models_are_loaded_from_a_folder(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), num_hidden_layers=1, head_dim=8, max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    pipe = TextPipeline.from_pretrained(tmp_path, StaticDecoding(), block_length=8, local_files_only=True, dtype=torch.float32)
    expected = TextPipeline(model.eval(), TOKENIZER, StaticDecoding(), block_length=8)(TEXTS, gen_length=16)
    assert pipe(TEXTS, gen_length=16).tokens == expected.tokens
    with pytest.raises(ValueError, match="load it with attn_implementation='sdpa'"):
        TextPipeline.from_pretrained(tmp_path, attn_implementation="flex_attention", local_files_only=True)
    with pytest.raises(OSError):
        TextPipeline.from_pretrained(tmp_path / "nothing", local_files_only=True)


def test_the_model_that_ships() -> None:
    pipe = TextPipeline.from_pretrained("puzzles")
    assert pipe.engine.geometry.block_length == 16 and pipe.engine.cache == "block-append"  # type: ignore[attr-defined]
    assert pipe("483 + 759 = ?", gen_length=32).texts == ["111:1242"]


# --------------------------------------------------------------------------------------------------------------------- bad input


def test_errors_say_what_to_pass() -> None:
    maskless = SimpleNamespace(eos_token_id=1)
    with pytest.raises(ValueError, match="has a mask token: pass mask_id, the id of the mask token"):
        TextPipeline(MODEL, maskless)
    assert TextPipeline(MODEL, maskless, mask_id=26).mask_id == 26
    with pytest.raises(ValueError, match=r"use pipe.vote\(prompts, HEX"):
        pipeline(HEX())
    with pytest.raises(ValueError, match=r"schedule must be a decoding schedule such as ThresholdDecoding.*'credit'"):
        pipeline("credit")
    with pytest.raises(ValueError, match="leave block_length and aligned out"):
        pipeline(geometry=AdaBlock(), block_length=8)
    with pytest.raises(ValueError, match="a block-causal one has 'block-append'"):
        pipeline(cache="prefix")
    pipe = pipeline()
    for prompts, options, message in (
        (TEXTS, {"gen_length": 24}, "gen_length must be a multiple of the block length, 16, not 24"),
        (TEXTS, {"gen_length": 0}, "gen_length must be a multiple"),
        ("", {}, "prompt '' is empty: pass at least one token"),
        (["1", "  "], {}, "prompt '  ' is empty"),
        ([[1], []], {}, "is empty"),
        ([], {}, "prompts must be at least one"),
        ("1" * 300, {}, "a prompt has 301 tokens and the model's context 256: pass a shorter one"),
        ("1" * 200, {"gen_length": 64}, r"201 \+ 64 positions and the model's context has 256"),
        (3.5, {}, "prompts must be texts, messages of a chat"),
        (TEXTS, {"temperature": -1.0}, "temperature must be"),
        (TEXTS, {"seeds": [1]}, "seeds must have an entry for each of the 4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompts, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FreeDave cannot be streamed"):
        pipeline(FreeDave())(TEXTS, gen_length=16, stream=print)
    with pytest.raises(ValueError, match="a multiple of the block length, 12, not 16"):
        pipe.vote(TEXTS, HEX((4, 12)), str, gen_length=16)
