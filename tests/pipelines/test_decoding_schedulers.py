"""Schedules as schedulers of diffusers: the tokens of the loop and of diffusers' own, without its wasted forwards; saved and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.decoding.credit import CreditDecoding as CreditSchedule
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.factor import FactorDecoding as FactorSchedule
from hasten.accelerators.decoding.generate import decode
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.accelerators.decoding.threshold import ThresholdDecoding as ThresholdSchedule
from hasten.pipelines.decoding_schedulers import (
    SCHEDULERS,
    CCDDecoding,
    CreditDecoding,
    DecodingScheduler,
    EditingDecoding,
    EntropyBoundDecoding,
    FactorDecoding,
    HierarchicalDecoding,
    KLASSDecoding,
    RCRDecoding,
    SaberDecoding,
    StaticDecoding,
    ThresholdDecoding,
    decoding_scheduler,
)
from hasten.pipelines.zoo.puzzles import check, new_tokenizer
from tests.accelerators.decoding.toys import EOS, MASK, SAMPLING, VOCABULARY, Model, NoSync

K = 8
VARIED: dict[str, DecodingScheduler] = {
    "static": StaticDecoding(),
    "static-margin-2": StaticDecoding(score="margin", tokens_per_step=2),
    "threshold": ThresholdDecoding(threshold=0.4),
    "factor": FactorDecoding(factor=1.2),
    "hierarchical": HierarchicalDecoding(low=0.2, threshold=0.5),
    "entropy-bound": EntropyBoundDecoding(bound=1.5),
    "klass": KLASSDecoding(threshold=0.3, divergence=0.3, window=1),
    "ccd": CCDDecoding(history=3, tokens_per_step=2),
    "ccd-ds": CCDDecoding(dynamic=True, bound=2.0),
    "credit": CreditDecoding(threshold=0.5),
    "credit-klass": CreditDecoding(rule=KLASSDecoding(threshold=0.3, divergence=0.3, window=1)),
    "saber": SaberDecoding(n=3, mu=2),
    "rcr": RCRDecoding(rule=StaticDecoding(tokens_per_step=2)),
    "editing": EditingDecoding(threshold=0.4, editing_threshold=0.3, max_post_steps=3),
    "editing-credit": EditingDecoding(editing_threshold=0.3, rule=CreditDecoding(rule=FactorDecoding())),
}
every = pytest.mark.parametrize("name", VARIED)


class Stub(torch.nn.Module):
    """Calls a function of tokens, validity and columns, and counts: what LLaDA2Pipeline takes for a model."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, logits_fn: Any) -> None:
        super().__init__()
        self.logits_fn, self.forwards = logits_fn, 0

    def forward(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        self.forwards += 1
        return SimpleNamespace(logits=self.logits_fn(tokens, attention_mask.bool(), position_ids))


def run(model: Stub, scheduler: Any, ids: Tensor, **options: Any) -> Tensor:
    pipe = LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "gen_length": 2 * K,
        "block_length": K,
        "num_inference_steps": K,
        "mask_token_id": MASK,
        "eos_early_stop": False,
        "editing_threshold": None,
        "sampling_method": "greedy",
    }
    return pipe(input_ids=ids, output_type="seq", **{**call, **options}).sequences


def prompts(rows: int, length: int = K, seed: int = 0) -> Tensor:
    return torch.randint(0, EOS, (rows, length), generator=torch.Generator().manual_seed(seed))


def block_causal(toy: Any) -> Any:
    """The toy as the pipeline shows it: nothing behind the present block is seen."""

    def logits_fn(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        end = columns[:, :1] - columns[:, :1] % K + K
        return toy(tokens, valid & (torch.arange(tokens.shape[1]) < end), columns)

    return logits_fn


class Smooth(Model):
    """The toy without ties, and never fond of the mask: diffusers orders ties by chance, and would commit the mask."""

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor, blind: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        jitter = torch.rand(512, VOCABULARY, generator=generator)[columns]
        logits = super().__call__(tokens, valid, columns, blind) + 0.3 * jitter
        logits[..., MASK] = -1e4
        return logits


# ----------------------------------------------------------------------------------------------- the tokens are the same


@every
@pytest.mark.parametrize("seed", [6, 7])
def test_the_pipeline_decodes_as_the_loop_does(name: str, seed: int) -> None:
    scheduler, toy, ids = VARIED[name], Model(seed), prompts(3, seed=seed)
    found = run(Stub(toy), scheduler, ids, threshold=0.123, editing_threshold=0.9, minimal_topk=1)  # the pipeline's own are not read
    ours = decode(block_causal(toy), ids, scheduler.schedule, FixedBlocks(K), sampling=SAMPLING, length=2 * K)
    assert torch.equal(found, ours.tokens)
    assert torch.equal(found, run(Stub(toy), scheduler, ids)), "a scheduler can be used again"


@pytest.mark.parametrize("steps", [8, 5, 3, 1])
def test_static_gives_the_tokens_of_diffusers(steps: int) -> None:
    for seed in range(4):
        ids = prompts(4, length=K + 3, seed=seed)  # the first block begins with the end of the prompt
        call = {"num_inference_steps": steps, "threshold": 2.0}
        theirs = run(Stub(Smooth(seed)), BlockRefinementScheduler(), ids, **call)
        assert torch.equal(run(Stub(Smooth(seed)), StaticDecoding(), ids, **call), theirs)


@pytest.mark.parametrize(("threshold", "steps"), [(0.3, 8), (0.6, 8), (0.9, 8), (0.6, 4)])
def test_a_threshold_gives_the_tokens_of_diffusers(threshold: float, steps: int) -> None:
    seen = set()
    for seed in range(4):
        ids = prompts(4, seed=seed)
        toy, call = Smooth(seed, sharpness=3.0), {"num_inference_steps": steps, "threshold": threshold}
        theirs = run(Stub(toy), BlockRefinementScheduler(), ids, **call)
        model = Stub(toy)
        assert torch.equal(run(model, ThresholdDecoding(threshold=threshold), ids, **call), theirs)
        seen.add(model.forwards)
    assert min(seen) < 2 * min(steps, K), "the threshold must have mattered"


def test_editing_gives_the_tokens_of_diffusers() -> None:
    edited = 0
    for seed in range(6):
        ids, call = prompts(1, seed=seed), {"threshold": 0.3, "editing_threshold": 0.3, "max_post_steps": 4}
        theirs = run(Stub(Smooth(seed)), BlockRefinementScheduler(), ids, **call)
        # theirs takes one step more after the block is full
        ours = EditingDecoding(threshold=0.3, editing_threshold=0.3, max_post_steps=5)
        assert torch.equal(run(Stub(Smooth(seed)), ours, ids, **call), theirs)
        edited += int(not torch.equal(theirs, run(Stub(Smooth(seed)), ThresholdDecoding(threshold=0.3), ids)))
    assert edited > 0


@pytest.mark.parametrize("name", ["saber", "rcr"])
def test_tokens_are_masked_again_and_no_mask_is_left(name: str) -> None:
    reopened = []

    def watch(pipe: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        now = values["block_x"][:, -K:] == MASK
        reopened.append(int((now & ~values["active_block"]).sum()))
        return {}

    for seed in range(4):
        out = run(
            Stub(Model(seed)),
            VARIED[name],
            prompts(3, seed=seed),
            callback_on_step_end=watch,
            callback_on_step_end_tensor_inputs=["block_x", "active_block"],
        )
        assert not (out == MASK).any()
    assert sum(reopened) > 0


@every
def test_a_row_alone_is_the_row_among_others(name: str) -> None:
    toy, ids = Model(3), prompts(4)
    together = run(Stub(toy), VARIED[name], ids)
    for row in range(4):
        assert torch.equal(run(Stub(toy), VARIED[name], ids[row : row + 1])[0], together[row])


@every
@pytest.mark.parametrize("kind", ["mask", "equal", "nan"])
def test_every_schedule_ends_on_adversarial_logits_without_a_mask(name: str, kind: str) -> None:
    def logits_fn(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        logits = torch.zeros(*columns.shape, VOCABULARY)
        if kind == "mask":
            logits[..., MASK] = 50.0
        return logits.fill_(torch.nan) if kind == "nan" else logits

    model = Stub(logits_fn)
    out = run(model, VARIED[name], prompts(2), num_inference_steps=3)
    assert not (out == MASK).any()
    assert model.forwards <= 2 * (K + 16)


# ------------------------------------------------------------------------------------------------------------- forwards


def confident(ends: dict[int, int]) -> Any:
    """Sure of every token; in row r the token at column `ends[r]` is end-of-text."""

    def logits_fn(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        logits = torch.zeros(*columns.shape, VOCABULARY)
        logits[..., 1] = 20.0
        for row, end in ends.items():
            logits[row, columns[row] == end, EOS] = 40.0
        return logits

    return logits_fn


@pytest.mark.parametrize(
    ("name", "needed"),
    [("threshold", 1), ("factor", 1), ("hierarchical", 1), ("entropy-bound", 1), ("credit", 1), ("editing", 2), ("editing-credit", 2)],
)
def test_sure_blocks_take_no_forward_more_than_they_need(name: str, needed: int) -> None:
    model = Stub(confident({}))
    run(model, VARIED[name], prompts(1), gen_length=4 * K)
    assert model.forwards == 4 * needed
    theirs = Stub(confident({}))
    run(theirs, BlockRefinementScheduler(), prompts(1), gen_length=4 * K)
    assert theirs.forwards == 8


def test_a_row_that_has_ended_holds_nobody_up() -> None:
    call = {"gen_length": 4 * K, "eos_early_stop": True, "eos_token_id": EOS, "num_inference_steps": K}
    forwards = {}
    for scheduler in (BlockRefinementScheduler(), ThresholdDecoding()):
        model = Stub(confident({0: K + 2}))
        out = run(model, scheduler, prompts(2), **call)
        forwards[type(scheduler).__name__] = model.forwards
        assert out[0, 2] == EOS and not (out[1] == MASK).any()
    assert forwards == {"BlockRefinementScheduler": 26, "ThresholdDecoding": 4}


def test_the_last_row_to_end_ends_the_call() -> None:
    model = Stub(confident({0: K + 2, 1: 2 * K + 1}))
    run(model, ThresholdDecoding(), prompts(2), gen_length=4 * K, eos_early_stop=True, eos_token_id=EOS)
    assert model.forwards == 2


def test_end_of_text_in_the_prompt_ends_nothing_and_one_after_it_does() -> None:
    ids = prompts(1)
    ids[0, 1] = EOS
    model = Stub(confident({0: K + 2}))
    run(model, ThresholdDecoding(), ids, gen_length=4 * K, eos_early_stop=True, eos_token_id=EOS)
    assert model.forwards == 1


@given(st.lists(st.lists(st.sampled_from([1, 2, EOS, MASK]), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 8), st.data())
def test_a_row_has_ended_when_nothing_is_masked_before_its_end_of_text(rows: list[list[int]], prompt: int, data: Any) -> None:
    before = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    expected = []
    for row, was in zip(rows, before, strict=True):
        answer = row[prompt:]
        expected.append(was or (EOS in answer and MASK not in answer[: answer.index(EOS)]))
    found = ThresholdDecoding().check_eos_finished(
        cur_x=torch.tensor(rows),
        sampled_tokens=torch.empty(0),
        final_transfer=torch.empty(0),
        finished=torch.tensor(before),
        eos_token_id=EOS,
        mask_token_id=MASK,
        prompt_length=prompt,
    )
    assert found.tolist() == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 20])
def test_the_steps_of_a_call_are_the_slowest_pace(steps: int) -> None:
    """Nothing is ever sure, so that every block takes as many steps as it may, and no more."""
    for name in ("static", "threshold", "klass", "credit", "rcr"):
        scheduler = {"rcr": RCRDecoding(), "threshold": ThresholdDecoding(threshold=1.1), "klass": KLASSDecoding()}.get(name, VARIED[name])
        if name == "credit":
            scheduler = CreditDecoding(threshold=1.1)
        model = Stub(Model(2, sharpness=0.1))
        run(model, scheduler, prompts(2), num_inference_steps=steps, gen_length=3 * K)
        assert model.forwards == 3 * min(steps, K), name


def test_a_step_reads_nothing_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for scheduler in VARIED.values():
        scheduler.set_timesteps(4, block_length=K)
        tokens = torch.full((3, K), MASK)
        for step in range(2):
            logits = torch.randn(3, K, VOCABULARY, generator=generator)
            with NoSync():
                out = scheduler.step(logits, step, tokens, mask_token_id=MASK, temperature=0.7, top_k=5, prompt_mask=torch.arange(K) < 2)
            tokens = out.prev_sample


# ------------------------------------------------------------------------------------------------------------- sampling


def test_sampled_tokens_follow_the_cut_and_tempered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, *[-30.0] * (VOCABULARY - 6)])
    logits[MASK] = 5.0
    scheduler, rows = StaticDecoding(), 6_000
    given = logits.expand(rows, 1, -1)
    for cut, allowed in (({}, 6), ({"top_k": 3}, 3), ({"top_p": 0.8}, 3)):
        scheduler.set_timesteps(1, block_length=1)
        generator = torch.Generator().manual_seed(1)
        call: dict[str, Any] = {"mask_token_id": MASK, "temperature": 1.5, "generator": generator, **cut}
        out = scheduler.step(given, 0, torch.full((rows, 1), MASK), **call)
        z = (logits / 1.5).index_fill(0, torch.tensor(MASK), -torch.inf)
        p = z.where(torch.arange(VOCABULARY) < allowed, torch.tensor(-torch.inf)).softmax(-1)
        share = torch.bincount(out.prev_sample[:, 0], minlength=VOCABULARY) / rows
        assert (share - p).abs().max() < 0.025, cut
        torch.testing.assert_close(out.sampled_probs, p[out.sampled_tokens])


def test_a_generator_decides_and_greedy_is_greedy() -> None:
    ids, toy = prompts(3), Model(1, sharpness=0.5)

    def sampled(seed: int, **options: Any) -> Tensor:
        call = {"sampling_method": "multinomial", "temperature": 1.0, "generator": torch.Generator().manual_seed(seed)}
        return run(Stub(toy), ThresholdDecoding(threshold=0.5), ids, **{**call, **options})

    assert torch.equal(sampled(0), sampled(0)) and not torch.equal(sampled(0), sampled(1))
    greedy = run(Stub(toy), ThresholdDecoding(threshold=0.5), ids)
    assert torch.equal(sampled(0, sampling_method="greedy"), greedy) and torch.equal(sampled(0, temperature=0.0), greedy)
    lots = [run(Stub(toy), StaticDecoding(score="random"), ids, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(lots[0], lots[1]) and not torch.equal(lots[0], lots[2])


def test_noise_is_another_one_in_every_step() -> None:
    scheduler = StaticDecoding()
    scheduler.set_timesteps(8, block_length=K)
    out = [
        scheduler.step(torch.zeros(1, K, VOCABULARY), step % 4, torch.full((1, K), MASK), mask_token_id=MASK, temperature=1.0)
        for step in range(8)
    ]
    assert len({tuple(o.sampled_tokens[0].tolist()) for o in out}) == 8, "a new block has new noise too"


# ------------------------------------------------------------------------------------------------------- uniform noise


@every
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_without_a_mask_token_what_is_committed_stays_and_all_is_committed_at_the_end(name: str, steps: int) -> None:
    scheduler, generator = VARIED[name], torch.Generator().manual_seed(steps)
    scheduler.set_timesteps(steps, block_length=K)
    revises = scheduler.schedule.revises
    for _ in range(2):  # two canvases
        canvas, kept = torch.randint(0, VOCABULARY, (3, K), generator=generator), torch.zeros(3, K, dtype=torch.bool)
        for step in range(steps):
            out = scheduler.step(torch.randn(3, K, VOCABULARY, generator=generator), step, canvas, generator=generator)
            committed = scheduler._committed
            assert torch.equal(out.prev_sample[out.transfer_index], out.sampled_tokens[out.transfer_index])
            assert not (kept & ~committed).any() or revises
            if not revises:
                assert torch.equal(out.prev_sample[kept], canvas[kept]) and torch.equal(committed, kept | out.transfer_index)
            assert (out.prev_sample < VOCABULARY).all() and out.pred_logits.shape == (3, K, VOCABULARY)
            canvas, kept = out.prev_sample, committed
        assert kept.all()


def test_what_is_not_committed_is_drawn_anew() -> None:
    scheduler, canvas = StaticDecoding(), torch.zeros(64, K, dtype=torch.int64)
    scheduler.set_timesteps(K, block_length=K)
    out = scheduler.step(torch.zeros(64, K, VOCABULARY), 0, canvas, generator=torch.Generator().manual_seed(0))
    assert out.transfer_index.sum() == 64
    drawn = out.prev_sample[~out.transfer_index]
    assert torch.bincount(drawn, minlength=VOCABULARY).min() > 20


@pytest.fixture(scope="module")
def gemma() -> Any:
    """A DiffusionGemmaPipeline of random weights with a canvas of 8."""
    from diffusers import DiffusionGemmaPipeline
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=K)).eval()

    class Processor:
        eos_token_id = 1

        def apply_chat_template(self, messages: list[Any], **options: Any) -> dict[str, Tensor]:
            rows = len(messages)
            return {"input_ids": prompts(rows, 5), "attention_mask": torch.ones(rows, 5, dtype=torch.long)}

    pipe = DiffusionGemmaPipeline(model=model, scheduler=BlockRefinementScheduler(), processor=Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["static", "threshold", "entropy-bound", "credit", "klass", "saber", "editing"])
def test_diffusion_gemma_runs_on_them(gemma: Any, name: str) -> None:
    gemma.scheduler = VARIED[name]
    call = {"gen_length": 2 * K, "num_inference_steps": 4, "output_type": "seq", "eos_early_stop": False, "confidence_threshold": None}
    out = [gemma(["a", "b"], generator=torch.Generator().manual_seed(s), **call).sequences for s in (0, 0)]
    assert out[0].shape == (2, 2 * K) and torch.equal(*out)


def test_diffusion_gemma_decides_as_with_diffusers_own_in_one_step(gemma: Any) -> None:
    """Where every position is committed at once nothing depends on the noise."""
    call = {"gen_length": K, "num_inference_steps": 1, "output_type": "seq", "eos_early_stop": False, "confidence_threshold": None}
    found = []
    for scheduler in (BlockRefinementScheduler(), StaticDecoding()):
        gemma.scheduler = scheduler
        found.append(gemma(["a"], generator=torch.Generator().manual_seed(3), **call).sequences)
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------------- saved and loaded


@every
def test_a_scheduler_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    scheduler = VARIED[name]
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert loaded.schedule == scheduler.schedule and dict(loaded.config) == {**scheduler.config, **loaded.config}
    again = type(scheduler).from_config(scheduler.config, block_length=5)
    assert again.schedule == scheduler.schedule and again.config.block_length == 5


def test_a_pipeline_is_saved_and_loaded_with_its_scheduler(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(new_tokenizer()), head_dim=16, **sizes))
    LLaDA2Pipeline(model, CreditDecoding(threshold=0.77), new_tokenizer()).save_pretrained(tmp_path)
    # Neither tokenizer nor model can be loaded by that pipeline itself, whatever its scheduler.
    loaded = LLaDA2Pipeline.from_pretrained(tmp_path, model=model, tokenizer=new_tokenizer())
    assert type(loaded.scheduler) is CreditDecoding and loaded.scheduler.schedule == CreditSchedule(0.77)


@given(st.floats(0, 2), st.floats(0, 3), st.sampled_from([None, 0.25]))
@settings(max_examples=20)
def test_nested_rules_are_described_and_built_again(threshold: float, factor: float, editing: float | None) -> None:
    inner = CreditDecoding(alpha=threshold, rule=FactorDecoding(factor=factor))
    outer = EditingDecoding(editing_threshold=editing, rule=inner)
    expected = TokenEditing(editing, CreditSchedule(alpha=threshold, rule=FactorSchedule(factor)))
    assert outer.schedule == expected
    assert EditingDecoding(editing_threshold=editing, rule=dict(outer.config.rule)).schedule == expected


def test_settings_carry_over_from_the_scheduler_that_was_there() -> None:
    theirs = BlockRefinementScheduler(block_length=16, threshold=0.6)
    ours = ThresholdDecoding.from_config(theirs.config)
    assert ours.schedule == ThresholdSchedule(0.6) and ours.config.block_length == 16


def test_every_schedule_has_its_name() -> None:
    for name, cls in SCHEDULERS.items():
        assert cls.key == name and cls.__name__.endswith("Decoding")
        assert decoding_scheduler(name).schedule == cls().schedule
    assert decoding_scheduler("threshold", threshold=0.6).schedule == ThresholdSchedule(0.6)


def test_the_examples_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "decoding.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, "docs/decoding.md", "exec"), {})
    answers = re.findall(r"'([^']*)'", capsys.readouterr().out)
    asked = ["3? + ? = 91", "3? + ? = 91", "depth 3 ????????", "3? + ? = 91", "depth 3 ????????", "483 + 759 = ?"]
    assert [check(prompt, answer).solved for prompt, answer in zip(asked, answers, strict=True)] == [True] * 6


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of static, threshold, .*, not 'greedy'"):
        decoding_scheduler("greedy")
    with pytest.raises(ValueError, match="'wino' runs the model on a shadow block"):
        decoding_scheduler("wino")
    with pytest.raises(ValueError, match="threshold must be a number of at least 0, not -1"):
        ThresholdDecoding(threshold=-1)
    with pytest.raises(TypeError, match="threshhold"):
        ThresholdDecoding(threshhold=0.5)
    with pytest.raises(ValueError, match="block_length must be a whole number of at least 1, not 0"):
        StaticDecoding(block_length=0)
    with pytest.raises(ValueError, match="rule must be a decoding scheduler"):
        CreditDecoding(rule="factor")
    with pytest.raises(ValueError, match="Edit cannot stand on Backtrack"):
        EditingDecoding(rule=SaberDecoding())
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number of at least 1, not 0"):
        StaticDecoding().set_timesteps(0)
    with pytest.raises(ValueError, match=r"temperature must be a number of at least 0, not -0\.5"):
        run(Stub(Model()), StaticDecoding(), prompts(1), temperature=-0.5, sampling_method="multinomial")
    with pytest.raises(ValueError, match="mask_token_id"):
        run(Stub(Model()), StaticDecoding(), prompts(1), mask_token_id=None)
