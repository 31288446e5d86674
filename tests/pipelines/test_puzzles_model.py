"""The puzzles model: it reads in blocks whichever way it is called, needs no hasten to load, and solves what it was trained for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from hasten.pipelines.zoo.puzzles import (
    BLOCK_LENGTH,
    GEN_LENGTH,
    TASKS,
    check,
    load_pipeline,
    load_puzzles,
    modeling_puzzles,
    new_tokenizer,
    validation_puzzles,
    weights_folder,
)
from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesForMaskedLM
from tests.pipelines.tiny_puzzles import tiny

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

ALONE = """
import sys, torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)
logits = model(tokenizer("3? + ? = 91", return_tensors="pt").input_ids).logits
pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(block_length=16), tokenizer)
pipe.set_progress_bar_config(disable=True)
out = pipe("3? + ? = 91", gen_length=16, num_inference_steps=2, output_type="seq")
assert out.sequences.shape == (1, 16)
assert not any(name.partition(".")[0] == "hasten" for name in sys.modules)
torch.save(logits, sys.argv[2])
"""


def without_mask(model: PuzzlesForMaskedLM) -> PuzzlesForMaskedLM:
    """Never answers with the mask itself, of which an untrained model is fond."""
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(logits.shape[-1] - 1), -torch.inf)
    )
    return model


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(4, 26, (rows, length), generator=torch.Generator().manual_seed(1))


def quiet(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> LLaDA2Pipeline:
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(block_length=BLOCK_LENGTH), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STATIC = {"num_inference_steps": BLOCK_LENGTH, "threshold": 2.0, "editing_threshold": None, "gen_length": GEN_LENGTH}
AT_ONCE = {**STATIC, "num_inference_steps": 1}


# --------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("task", TASKS)
def test_every_character_of_every_puzzle_is_a_token(task: str) -> None:
    tokenizer = new_tokenizer()
    for puzzle in validation_puzzles(task, 200):
        prompt, answer = tokenizer(puzzle.prompt).input_ids, tokenizer(puzzle.answer, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in prompt + answer
        assert len(answer) == len(puzzle.answer) < GEN_LENGTH
        assert prompt[-1] == tokenizer.sep_token_id and tokenizer.sep_token_id not in prompt[:-1] + answer
        assert tokenizer.decode(prompt, skip_special_tokens=True) == puzzle.prompt.replace(" ", "")
        assert tokenizer.decode([*answer, tokenizer.eos_token_id], skip_special_tokens=True) == puzzle.answer


def test_spelling_does_not_matter_and_padding_goes_to_the_left() -> None:
    tokenizer = new_tokenizer()
    assert tokenizer("3?+?=91").input_ids == tokenizer(" 3 ? + ?\t= 91\n").input_ids
    assert tokenizer("DEPTH 2 ??").input_ids == tokenizer("depth 2 ??").input_ids
    assert tokenizer.unk_token_id in tokenizer("3? - ? = 91").input_ids
    both = tokenizer(["?+?=5", "3?+?=91"], padding=True)
    assert both.input_ids[0][:2] == [tokenizer.pad_token_id] * 2 and both.attention_mask[0] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}
    assert len(special) == 5 == len(tokenizer.all_special_ids)


# -------------------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_sees_itself_and_earlier_ones_and_nothing_later(attention: str) -> None:
    model, ids = tiny(4, attn_implementation=attention), some_ids(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        for changed in range(12):
            other = ids.clone()
            other[0, changed] = 4 + (ids[0, changed] - 3) % 22
            differs = (model(other).logits != expected).any(-1)[0]
            assert differs.tolist() == [i // 4 >= changed // 4 for i in range(12)]


def test_a_two_dimensional_mask_of_ones_none_and_the_same_in_four_dimensions_agree() -> None:
    model, ids = tiny(4), some_ids(2, 10)
    block = torch.arange(10) // 4
    whole = (block[:, None] >= block)[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
        additive = torch.zeros(whole.shape).masked_fill(~whole, -torch.inf)
        for mask in (whole, additive):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_four_dimensional_mask_is_used_as_it_is() -> None:
    model, ids = tiny(4), some_ids(1, 9)
    mask = torch.eye(9, dtype=torch.bool)[None, None]
    other = ids.flip(1)
    with torch.no_grad():
        alone = model(ids, attention_mask=mask, position_ids=torch.zeros_like(ids)).logits
        again = model(other, attention_mask=mask, position_ids=torch.zeros_like(ids)).logits.flip(1)
    torch.testing.assert_close(alone, again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pads", [1, 3, 4, 7])
def test_padding_on_the_left_moves_the_blocks_and_is_not_read(pads: int) -> None:
    model, ids = tiny(4), some_ids(1, 9)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(ids)], 1)
    block = (torch.arange(9) + pads) // 4
    with torch.no_grad():
        expected = model(ids, attention_mask=(block[:, None] >= block)[None, None]).logits
        found = model(padded, attention_mask=mask).logits
        other = model(torch.cat([torch.full((1, pads), 9), ids], 1), attention_mask=mask).logits
    torch.testing.assert_close(found[:, pads:], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(other[:, pads:], found[:, pads:]) and found.isfinite().all()


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(1, 9\), not \(1, 5\)"):
        tiny(4)(some_ids(1, 9), attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny(4)()


def test_kernels_that_would_leave_the_mask_out_are_refused() -> None:
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            tiny(4, attn_implementation=name)


@pytest.mark.parametrize("four_dimensional", [False, True])
def test_appending_block_by_block_to_a_cache_is_exact(four_dimensional: bool) -> None:
    model, ids, cache = tiny(4), some_ids(2, 14), DynamicCache()
    with torch.no_grad():
        expected = model(ids).logits
        for start, end in ((0, 8), (8, 12), (12, 14)):
            # A first guess of the block, which is taken back as a schedule does.
            mask = torch.ones(2, 1, end - start, end, dtype=torch.bool) if four_dimensional else torch.ones(2, end)
            if four_dimensional and start == 0:
                mask[:, :, :4, 4:] = False
            arguments = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            model(some_ids(2, 14).flip(0)[:, start:end], **arguments)
            cache.crop(-(end - start))
            found = model(ids[:, start:end], **arguments).logits
            torch.testing.assert_close(found, expected[:, start:end], rtol=1e-5, atol=1e-5)
            cache.crop(-(end - start))
            assert torch.equal(model(ids[:, start:end], **arguments).logits, found)
            assert cache.get_seq_length() == end


# ---------------------------------------------------------------------------------------------- as others load and run it


def test_it_is_loaded_and_run_without_hasten(tiny_puzzles_folder: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_puzzles_folder), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, timeout=300, cwd="/")
    with torch.no_grad():
        expected = tiny()(new_tokenizer()("3? + ? = 91", return_tensors="pt").input_ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_without_its_code_it_is_refused_and_not_read_as_a_causal_model(tiny_puzzles_folder: Path) -> None:
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tiny_puzzles_folder, trust_remote_code=False, local_files_only=True)


def cached_static(model: PuzzlesForMaskedLM, prompt: Tensor, mask: int) -> Tensor:
    """One token a forward with a cache of whole blocks and a mask of its own, [GEN_LENGTH]: no line in common with the pipeline."""
    cache, x = DynamicCache(), torch.cat([prompt, torch.full((GEN_LENGTH,), mask)])
    for start in range(0, len(x), BLOCK_LENGTH):
        block = x[start : start + BLOCK_LENGTH]

        def forward(tokens: Tensor, start: int = start) -> Tensor:
            seen = torch.ones(1, 1, len(tokens), start + len(tokens), dtype=torch.bool)
            where = torch.arange(start, start + len(tokens))[None]
            return model(tokens[None], attention_mask=seen, position_ids=where, past_key_values=cache, use_cache=True).logits[0]

        while (block == mask).any():
            confidence, token = forward(block).softmax(-1).max(-1)
            cache.crop(-len(block))
            best = confidence.masked_fill(block != mask, -1).argmax()
            block[best] = token[best]
        forward(block)
    return x[len(prompt) :]


def test_an_unmodified_pipeline_commits_what_static_decoding_with_a_cache_does() -> None:
    tokenizer, model = new_tokenizer(), without_mask(tiny())
    pipe = quiet(model, tokenizer)
    for puzzle in validation_puzzles("addends", 2) + validation_puzzles("sudoku", 2):
        prompt = tokenizer(puzzle.prompt, return_tensors="pt").input_ids[0]
        with torch.no_grad():
            found = cached_static(model, prompt, tokenizer.mask_token_id)
        expected = pipe(puzzle.prompt, output_type="seq", eos_early_stop=False, **STATIC).sequences[0]
        assert torch.equal(found, expected) and tokenizer.mask_token_id not in found


# ---------------------------------------------------------------------------------------------------- what it is taught


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    import puzzles

    return puzzles


def test_samples_mask_one_block_of_the_answer_and_never_the_prompt(recipe: ModuleType) -> None:
    tokenizer = new_tokenizer()
    samples = recipe.Samples(tokenizer, 0)
    lengths, ends = set(), 0
    for _ in range(8):
        for rows in samples.batch(64, 4):
            assert rows.ids.shape == rows.labels.shape == rows.blocks.shape and rows.ids.shape[1] in recipe.WIDTHS
            masked = rows.labels >= 0
            assert torch.equal(masked, rows.ids == tokenizer.mask_token_id)
            torch.testing.assert_close(rows.weight, 1 / masked.sum(1))
            for ids, labels, blocks in zip(rows.ids, rows.labels, rows.blocks, strict=True):
                hidden = labels >= 0
                clean = torch.where(hidden, labels, ids)
                clean = clean[blocks < GEN_LENGTH]
                begin = int((clean == tokenizer.sep_token_id).nonzero()[0]) + 1
                prompt, answer = tokenizer.decode(clean[: begin - 1]), tokenizer.decode(clean[begin:], skip_special_tokens=True)
                # A row that is cut at the end of its block may not come to the end of the answer.
                assert check(prompt, answer).solved or tokenizer.eos_token_id not in clean
                assert not hidden[:begin].any() and len(blocks[hidden].unique()) == 1
                # Whatever stands after the masked block is in a later one, so that nothing masked can see it.
                assert (blocks.diff() >= 0).all()
                lengths.add(int(torch.bincount(blocks[blocks < GEN_LENGTH]).max()))
                ends += int((labels == tokenizer.eos_token_id).sum())
    assert {8, BLOCK_LENGTH} <= lengths and max(lengths) <= 32 and ends > 100


def test_one_row_of_the_loss_is_the_mean_over_what_is_masked(recipe: ModuleType) -> None:
    model, tokenizer = tiny(), new_tokenizer()
    (rows,) = recipe.Samples(tokenizer, 1).batch(3, 1)
    with torch.no_grad():
        loss = recipe.loss_of(model, rows)
        each = []
        for ids, labels, blocks in zip(rows.ids, rows.labels, rows.blocks, strict=True):
            hidden = (labels >= 0).nonzero()[:, 0]
            end = int((blocks <= blocks[hidden[0]]).sum())  # what comes later is left out altogether
            seen = (blocks[:end, None] >= blocks[:end])[None, None]
            logits = model(ids[None, :end], attention_mask=seen).logits[0].log_softmax(-1)
            each.append(-logits[hidden, labels[hidden]].mean())
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=0.02, atol=0.02)


def test_the_recipe_decodes_as_the_pipeline_does(recipe: ModuleType) -> None:
    model, tokenizer = without_mask(tiny()), new_tokenizer()
    pipe = quiet(model, tokenizer)
    puzzles = validation_puzzles("addition", 6)
    prompts = torch.tensor([tokenizer(puzzle.prompt).input_ids for puzzle in puzzles])
    for call in (STATIC, AT_ONCE):
        found = recipe.texts_of(tokenizer, recipe.decode(model, tokenizer, prompts, at_once=call is AT_ONCE))
        alone = torch.cat([pipe(puzzle.prompt, output_type="seq", **call).sequences for puzzle in puzzles])
        assert found == recipe.texts_of(tokenizer, alone) and len(set(found)) > 2


# ------------------------------------------------------------------------------------------------------ what was trained


def test_the_folder_is_small_and_in_bf16_and_its_card_tells_what_was_measured() -> None:
    from safetensors import safe_open

    folder = weights_folder()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 5_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {part.get_dtype() for part in shapes.values()} == {"BF16"}
        assert sum(torch.Size(part.get_shape()).numel() for part in shapes.values()) <= 2_500_000
    results, card = json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()
    assert results["prompts"] >= 2_000 and results["git"] in card
    assert all(results["static"][task] >= 0.9 for task in TASKS)
    assert sum(results["at_once"][task] <= results["static"][task] - 0.1 for task in TASKS) >= 3
    for name in ("static", "at_once"):
        assert all(f"{100 * share:.1f}%" in card for share in results[name].values())
    assert (folder / "training_log.jsonl").stat().st_size > 0
    assert (folder / "modeling_puzzles.py").read_text() == Path(str(modeling_puzzles.__file__)).read_text()


def test_the_shipped_folder_is_loaded_and_run_without_hasten(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ALONE, str(weights_folder()), str(tmp_path / "logits.pt")], check=True, timeout=300, cwd="/")
    tokenizer = AutoTokenizer.from_pretrained(weights_folder(), trust_remote_code=True, local_files_only=True)
    assert tokenizer("3? + ? = 91").input_ids == new_tokenizer()("3? + ? = 91").input_ids
    model, _ = load_puzzles()
    assert model.config.block_length == BLOCK_LENGTH and model.config.model_type == "hasten_puzzles"


@pytest.mark.parametrize("prompt", ["3 ? + ? = 91", "1??4/?4??/?1??/4??1", "depth 2 ????????", "483 + 759 = ?"])
def test_the_pipeline_answers_a_prompt_as_one_types_it(prompt: str) -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    (text,) = pipe(prompt, **STATIC).texts
    assert check(prompt, text).solved, text


def test_one_token_at_a_time_solves_what_all_at_once_does_not() -> None:
    """In padded batches, where the blocks fall elsewhere than for a prompt alone."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    good = {"static": 0, "at once": 0}
    for task in TASKS:
        puzzles = validation_puzzles(task, 24, seed=2)
        prompts = [puzzle.prompt for puzzle in puzzles]
        for name, call in (("static", STATIC), ("at once", AT_ONCE)):
            with torch.autocast("cpu", torch.bfloat16):
                texts = pipe(prompts, eos_early_stop=False, **call).texts
            solved = sum(check(prompt, text).solved for prompt, text in zip(prompts, texts, strict=True))
            good[name] += solved
            assert name == "at once" or solved >= 18, (task, solved)
    assert good["static"] >= 84 and good["at once"] <= good["static"] - 16
