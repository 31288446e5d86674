"""The loop: against a naive one, rows alone and among others, what it counts, and that it ends whatever the model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.decoding.adablock import AdaBlock
from hasten.accelerators.decoding.ccd import CCD
from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.daedal import DAEDAL
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.generate import Decoded, Loop, begin, decode
from hasten.accelerators.decoding.geometry import Canvas, Extent, FixedBlocks, Geometry, advanced, window, written
from hasten.accelerators.decoding.hex import HEX, _log_likelihoods, vote
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling, measure
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO
from tests.accelerators.decoding.toys import EOS, MASK, REVISING, SAMPLING, SCHEDULES, STEADY, VOCABULARY, Model, NoSync

every = pytest.mark.parametrize("name", SCHEDULES)


def prompts(rows: int, length: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, EOS, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(schedule: Any, model: Model | None = None, rows: int = 3, geometry: Geometry | None = None, **options: Any) -> Decoded:
    model = Model() if model is None else model
    options = {"sampling": SAMPLING, "length": 14, **options}
    ids = options.pop("prompt_ids", None)
    return decode(model, prompts(rows) if ids is None else ids, schedule, geometry or FixedBlocks(5), shadow_fn=model.shadow, **options)


def alike(a: Decoded, b: Decoded, rows: slice | list[int] = slice(None)) -> None:
    n = a.tokens.shape[1]
    assert torch.equal(a.tokens, b.tokens[rows][:, :n])
    assert torch.equal(a.lengths, b.lengths[rows]) and torch.equal(a.forwards, b.forwards[rows])


# ------------------------------------------------------------------------------------------------------------------ the loop


def naive(
    model: Model, prompt: list[int], length: int, block: int, commit: Callable[[dict[int, float]], set[int]]
) -> tuple[list[int], int]:
    """One row, block by block, a list of tokens, as one would write it down."""
    tokens, forwards = [*prompt, *[MASK] * length], 0
    for start in range(len(prompt), len(tokens), block):
        while MASK in (inside := tokens[start : start + block]):
            ids = torch.tensor([tokens])
            logits = model(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(tokens))[None])[0]
            logits[:, MASK] = -torch.inf
            p, best = logits.softmax(-1).max(-1)
            forwards += 1
            for i in commit({start + i: float(p[start + i]) for i, token in enumerate(inside) if token == MASK}):
                tokens[i] = int(best[i])
    return tokens[len(prompt) :], forwards


def surest(p: dict[int, float]) -> set[int]:
    return {min(p, key=lambda i: (-p[i], i))}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [None, 0.35])
def test_the_loop_is_the_naive_one(seed: int, threshold: float | None) -> None:
    def commit(p: dict[int, float]) -> set[int]:
        return surest(p) | {i for i in p if threshold is not None and p[i] >= threshold}

    model = Model(seed)
    found = run(StaticDecoding() if threshold is None else ThresholdDecoding(threshold), model)
    for r, prompt in enumerate(prompts(3).tolist()):
        tokens, forwards = naive(model, prompt, 14, 5, commit)
        # A margin of rounding between two softmaxes would show as another order; the model's numbers leave none.
        assert found.tokens[r].tolist() == tokens and int(found.forwards[r]) == forwards
    assert found.lengths.tolist() == [14] * 3


@every
def test_a_row_alone_is_the_row_among_others_and_padding_does_not_matter(name: str) -> None:
    # Every other one draws its tokens.
    schedule, sampling = SCHEDULES[name], Sampling(MASK, temperature=0.7 * (list(SCHEDULES).index(name) % 2))
    ids, seeds, lengths = prompts(3), [3, 1, 3], [4, 2, 3]
    mask = torch.arange(4) >= 4 - torch.tensor(lengths)[:, None]
    # What stands in the padding is never seen.
    batch = run(schedule, prompt_ids=ids, prompt_mask=mask, sampling=sampling, eos_id=EOS, seeds=seeds)
    for r, length in enumerate(lengths):
        alone = run(schedule, prompt_ids=ids[r : r + 1, 4 - length :], sampling=sampling, eos_id=EOS, seeds=seeds[r : r + 1])
        alike(alone, batch, [r])
    assert name in REVISING or (batch.forwards <= 14).all()


@every
def test_no_mask_and_nothing_after_the_end_of_text(name: str) -> None:
    for seed in range(2):
        model = Model(seed)
        model.place[..., EOS] += 6
        found = run(SCHEDULES[name], model, rows=4, eos_id=EOS)
        assert not (found.tokens == MASK).any()
        for row, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
            ends = [i for i, token in enumerate(row) if token == EOS]
            assert length == (ends[0] + 1 if ends else len(row))
            assert all(token == EOS for token in row[length:])


def test_a_row_is_done_as_soon_as_nothing_is_masked_before_its_end_of_text() -> None:
    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        # Row of prompt 0: sure of end-of-text at the third place; the others: of token 1 everywhere.
        logits = torch.zeros(*columns.shape, VOCABULARY)
        logits[..., 1] = 9
        ends = (columns == 4 + 2) & (tokens[:, :1] == 0)
        logits[ends] = torch.nn.functional.one_hot(torch.tensor(EOS), VOCABULARY) * 12.0
        calls.append(len(tokens))
        return logits

    calls: list[int] = []
    ids = torch.tensor([[0] * 4, [1] * 4])
    found = decode(model, ids, StaticDecoding(), FixedBlocks(4), sampling=SAMPLING, length=16, eos_id=EOS)
    # The end-of-text is committed first, being the surest, then what stands before it.
    assert found.forwards.tolist() == [3, 16] and found.lengths.tolist() == [3, 16]
    assert found.tokens[0].tolist() == [1, 1, *[EOS] * 14] and found.tokens[1].tolist() == [1] * 16
    assert calls == [2] * 3 + [1] * 13  # the row that is done is not forwarded any more
    assert found.tokens_per_forward.tolist() == [1.0, 1.0]


def test_four_confident_blocks_are_four_forwards() -> None:
    calls = []

    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        calls.append(1)
        return 50.0 * torch.nn.functional.one_hot(columns % EOS, VOCABULARY).float()

    found = decode(model, prompts(2), ThresholdDecoding(0.9), FixedBlocks(8), sampling=SAMPLING, length=32)
    assert found.forwards.tolist() == [4, 4] and len(calls) == 4
    assert found.tokens[0].tolist() == [(4 + i) % EOS for i in range(32)]


def test_end_of_text_in_the_prompt_ends_nothing() -> None:
    ids = prompts(2)
    ids[0, 1] = EOS
    model = Model()
    model.place[..., EOS] = -1000
    found = run(StaticDecoding(), model, prompt_ids=ids, eos_id=EOS)
    assert found.lengths.tolist() == [14, 14] and found.forwards.tolist() == [14, 14]


@pytest.mark.parametrize("name", ["threshold", "credit", "saber", "editing"])
def test_a_row_that_is_done_stays_as_it_is_until_it_is_taken_out(name: str) -> None:
    model = Model(1)
    model.place[..., EOS] += 4
    loop = Loop(model, SCHEDULES[name], FixedBlocks(5), SAMPLING, 5, EOS)
    rows = begin(loop, prompts(4), 14, None, None)
    snapshots: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for _ in range(25):
        logits, rows = loop.forward(rows)
        rows, _ = loop.transition(rows, logits)
        for r in range(4):
            now = (rows.canvas.tokens[r], rows.forwards[r], rows.clock[r])
            if rows.done[r]:
                assert all(torch.equal(a, b) for a, b in zip(now, snapshots.setdefault(r, now), strict=True))
    assert rows.done.all() and rows.forwards.unique().numel() > 1
    assert torch.equal(rows.forwards, run(SCHEDULES[name], model, rows=4, eos_id=EOS).forwards)


@every
def test_a_step_of_the_loop_reads_nothing_back(name: str) -> None:
    model, schedule = Model(), SCHEDULES[name]
    for geometry in (AdaBlock((1, 2), 0.1, 5), FixedBlocks(4, aligned=True)):
        shadow = model.shadow if schedule.needs.shadow else None
        loop = Loop(model, schedule, geometry, Sampling(MASK, temperature=0.5), geometry.width(14), EOS, shadow)
        rows = begin(loop, prompts(3), 14, None, None)
        with NoSync():
            for _ in range(2):
                logits, rows = loop.forward(rows)
                rows, _ = loop.transition(rows, logits)


def test_errors_say_what_is_wrong() -> None:
    model = Model()
    for options, message in (
        ({"length": None}, "length must be"),
        ({"seeds": [1]}, "seeds must have an entry for each of the 3 rows"),
        ({"prompt_mask": torch.tensor([[1, 0, 1, 1]]).expand(3, 4)}, "prompt_mask must be"),
        ({"prompt_ids": prompts(3)[0]}, "prompt_ids must be"),
        ({"geometry": FixedBlocks((3, 4))}, "an entry for each of the 3 rows"),
        ({"geometry": DAEDAL(4, 8), "length": None}, "needs eos_id"),
        ({"geometry": DAEDAL(4, 8), "eos_id": EOS}, "length must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            run(StaticDecoding(), model, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs shadow_fn"):
        decode(model, prompts(1), WINO(), sampling=SAMPLING, length=4)
    with pytest.raises(ValueError, match="cannot draft under DAEDAL"):
        run(FreeDave(), geometry=DAEDAL(4, 8), length=None, eos_id=EOS)
    assert model.forwards == 0


# --------------------------------------------------------------------------------------------------------------- termination


def adversary(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A model that says nothing of use, or another thing each time."""
    generator = torch.Generator().manual_seed(0)

    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        shape = (*columns.shape, VOCABULARY)
        if kind == "flapping":
            return 6 * torch.randn(shape, generator=generator)
        logits = torch.full(shape, {"nan": torch.nan, "inf": torch.inf, "nothing": -torch.inf}.get(kind, 0.0))
        if kind == "only masks":
            logits.fill_(-torch.inf)
            logits[..., MASK] = torch.inf
        if kind == "one row of nan":
            logits[0] = torch.nan
        if kind == "end of text":
            logits[..., EOS] = 1e30
        if kind == "confident":
            logits[..., 3] = 1e30
        return logits

    return model


@every
@pytest.mark.parametrize("kind", ["only masks", "ties", "nan", "one row of nan", "inf", "nothing", "flapping", "end of text", "confident"])
def test_every_schedule_ends_on_adversarial_logits(name: str, kind: str) -> None:
    schedule, model = SCHEDULES[name], adversary(kind)
    found = decode(model, prompts(2), schedule, FixedBlocks(6), sampling=SAMPLING, length=12, eos_id=EOS, shadow_fn=adversary(kind))
    assert ((found.tokens >= 0) & (found.tokens < VOCABULARY) & (found.tokens != MASK)).all()
    most = 12 + 2 * 3 if name.startswith("editing") else 12  # two blocks, three steps after each
    assert (found.forwards <= most).all()
    if kind == "end of text":
        assert (found.lengths == 1).all()


@pytest.mark.parametrize("kind", ["only masks", "ties", "nan", "flapping"])
def test_executors_and_geometries_end_on_adversarial_logits(kind: str) -> None:
    for schedule in (FreeDave(drafts=3), FreeDave(STEADY["credit"], 4, "subset")):
        found = decode(adversary(kind), prompts(2), schedule, FixedBlocks(6), sampling=SAMPLING, length=12)
        assert not (found.tokens == MASK).any() and (found.forwards <= 12).all()
    for geometry in (AdaBlock((0, 3), 0.0, 4), AdaBlock((0,), 0.9, 3, share=1.0)):
        assert not (decode(adversary(kind), prompts(2), Saber(), geometry, sampling=SAMPLING, length=12).tokens == MASK).any()
    for name in ("threshold", "credit", "saber", "rcr", "editing"):
        geometry = DAEDAL(4, 20, block_length=6, expansion=3, low=1.0, expand_eos_threshold=2.0, eos_window=4)
        found = decode(adversary(kind), prompts(2), SCHEDULES[name], geometry, sampling=SAMPLING, eos_id=EOS)
        assert not (found.tokens == MASK).any() and (found.lengths <= 22).all()


# ------------------------------------------------------------------------------------------------------------------ FreeDave


@pytest.mark.parametrize("name", STEADY)
def test_freedave_gives_the_tokens_of_its_schedule(name: str) -> None:
    # Every other one draws its tokens.
    schedule, sampling = STEADY[name], Sampling(MASK, temperature=0.6 * (list(STEADY).index(name) % 2))
    for seed, geometry in ((1, FixedBlocks((3, 14, 8))), (2, AdaBlock((1, 2, 3), 0.1, 4, share=0.5))):
        model = Model(seed, sharpness=1.5)
        model.place[..., EOS] += 3
        options: dict[str, Any] = {"geometry": geometry, "sampling": sampling, "eos_id": EOS if seed == 1 else None, "length": 10}
        step_by_step = run(schedule, model, **options)
        for drafts in (1, 3):
            found = run(FreeDave(schedule, drafts), model, **options)
            assert torch.equal(found.tokens, step_by_step.tokens) and torch.equal(found.lengths, step_by_step.lengths)
            assert (found.forwards <= step_by_step.forwards).all()
            if drafts == 1:
                assert torch.equal(found.forwards, step_by_step.forwards)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**4), drafts=st.integers(2, 7), block=st.integers(1, 14))
def test_freedave_is_lossless_on_static_decoding(seed: int, drafts: int, block: int) -> None:
    model = Model(seed, reach=3, sharpness=2.0)
    step_by_step = run(StaticDecoding(), model, rows=4, geometry=FixedBlocks(block))
    for agreement in ("exact", "subset"):  # with one token a step they are the same
        found = run(FreeDave(drafts=drafts, agreement=agreement), model, rows=4, geometry=FixedBlocks(block))  # type: ignore[arg-type]
        assert torch.equal(found.tokens, step_by_step.tokens)
        assert (found.forwards <= step_by_step.forwards).all()


@pytest.mark.parametrize("schedule", [CreditDecoding(rule=StaticDecoding()), CCD(history=3)])
def test_the_state_is_carried_along_the_path_that_is_taken(schedule: Schedule) -> None:
    for seed in range(3):
        model = Model(seed, reach=3, sharpness=1.5)
        step_by_step = run(schedule, model, geometry=FixedBlocks(7))
        for agreement in ("exact", "subset"):
            found = run(FreeDave(schedule, 3, agreement), model, geometry=FixedBlocks(7))  # type: ignore[arg-type]
            assert torch.equal(found.tokens, step_by_step.tokens) and (found.forwards < step_by_step.forwards).any()


@pytest.mark.parametrize("agreement", ["exact", "subset"])
def test_the_logits_at_hand_are_those_of_where_a_row_has_come_to(agreement: Any) -> None:
    executor = FreeDave(ThresholdDecoding(0.5), 5, agreement)
    for seed in range(4):
        model = Model(seed, sharpness=1.5)
        loop = Loop(model, executor.schedule, FixedBlocks(5), SAMPLING, 5)
        rows = begin(loop, prompts(6), 14, None, None)
        logits, rows = loop.forward(rows)
        for _ in range(4):
            before, (rows, statistics) = rows, loop.transition(rows, logits)
            branches = executor._branches(loop, before, rows, statistics)
            rows, reached = executor._followed(loop, rows, branches, loop.forward(branches)[0].window)
            logits, _ = loop.forward(rows)
            assert torch.equal(logits.window[~rows.done], reached[~rows.done])


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
def test_drafts_that_are_always_right_save_what_they_can(drafts: int) -> None:
    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(columns % 7, VOCABULARY) * (3.0 + columns[..., None] / 10)

    for blocks, length in ((12, 12), (4, 12)):
        found = decode(model, prompts(2), FreeDave(drafts=drafts), FixedBlocks(blocks), sampling=SAMPLING, length=length)
        if blocks == length:
            assert found.forwards.tolist() == [1 + -(-(length - 1) // drafts)] * 2
        else:
            assert (found.forwards <= 1 + 3 * -(-blocks // drafts)).all()
        step_by_step = decode(model, prompts(2), StaticDecoding(), FixedBlocks(blocks), sampling=SAMPLING, length=length)
        assert torch.equal(found.tokens, step_by_step.tokens) and step_by_step.forwards.tolist() == [12, 12]


def test_subset_agreement_saves_more_where_steps_commit_several_tokens() -> None:
    saved = 0
    for seed in range(6):
        model = Model(seed, sharpness=1.5)
        exact, subset = (run(FreeDave(ThresholdDecoding(0.5), 5, how), model, rows=6) for how in ("exact", "subset"))  # type: ignore[arg-type]
        assert not (subset.tokens == MASK).any()
        saved += int(exact.forwards.sum() - subset.forwards.sum())
    assert saved > 0


# ----------------------------------------------------------------------------------------------------------------- geometries


def test_windows_are_written_where_they_were_read_also_at_the_end() -> None:
    tokens = torch.arange(20).view(2, 10)
    canvas = Canvas(tokens, 2, torch.zeros(2, dtype=torch.int64), torch.tensor([10, 10]))
    start = torch.tensor([3, 8])
    columns = window(canvas, start, 4)
    assert columns.tolist() == [[3, 4, 5, 6], [8, 9, 9, 9]]
    assert torch.equal(written(canvas, start, tokens.gather(1, columns)).tokens, tokens)
    found = written(canvas, start, torch.tensor([[90, 91, 92, 93], [94, 95, 96, 97]])).tokens
    assert found[0].tolist() == [0, 1, 2, 90, 91, 92, 93, 7, 8, 9] and found[1].tolist() == [*range(10, 18), 94, 95]


def test_whole_blocks_without_masks_are_passed_over() -> None:
    tokens = torch.tensor([[1, 1, 1, 1, 1, 1, 1, MASK, 1, 1], [1, 1, MASK, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
    canvas = Canvas(tokens, 1, torch.zeros(3, dtype=torch.int64), torch.tensor([10, 10, 10]))
    extent = Extent(torch.tensor([1, 1, 1]), torch.tensor([3, 3, 3]), torch.tensor([2, 2, 2]))
    moved, done = advanced(canvas, extent, torch.tensor([True, False, True]), MASK)
    assert moved.start.tolist() == [7, 1, 1] and done.tolist() == [False, False, True]


def test_aligned_blocks_are_counted_from_the_first_token() -> None:
    starts: list[list[int]] = []
    blocks = FixedBlocks(4, aligned=True)

    class Spy(FixedBlocks):
        def ends(self, canvas: Any, start: Tensor, length: Tensor, statistics: Any) -> Tensor:
            found = super().ends(canvas, start, length, statistics)
            starts.append([*start.tolist(), *found.tolist()])
            return found

    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    found = run(StaticDecoding(), prompt_ids=prompts(2, 6), prompt_mask=mask, geometry=Spy(4, aligned=True), length=7)
    # Five tokens of prompt: blocks end after 8, 12, 16 tokens, which are columns 9, 13, 17; six: at 8, 12, 16.
    assert starts[0] == [6, 6, 9, 8] and starts[-1][1] == 12 and starts[-1][3] == 16
    assert found.forwards.tolist() == [7, 7] and blocks.width(7) == 4


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.0, 0.25, 0.4, float("inf")]), share=st.sampled_from([0.25, 0.6, 1.0]))
def test_adaptive_blocks_end_at_the_surest_delimiter(seed: int, threshold: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, delimiters = 12, (2, 5)
    geometry = AdaBlock(delimiters, threshold, 3, share)
    start = 4 + torch.randint(0, total, (3,), generator=generator)
    tokens = torch.full((3, 4 + total), MASK)
    canvas = Canvas(tokens, 4, torch.zeros(3, dtype=torch.int64), torch.full((3,), 4 + total))
    columns = window(canvas, start, geometry.width(total))
    few = 2.0 * torch.randn(3, VOCABULARY, generator=generator)
    logits = few[torch.randint(0, 3, columns.shape, generator=generator)]
    statistics = measure(logits, tokens.gather(1, columns), SAMPLING)
    found = geometry.ends(canvas, start, geometry.lengths(3, torch.device("cpu")), statistics)
    for r in range(3):
        look = min(int(share * total), 4 + total - int(start[r]))
        ends = [i for i in range(look) if int(statistics.best[r, i]) in delimiters]
        best = max(ends, key=lambda i: (float(statistics.p1[r, i]), -i), default=None)
        sure = best is not None and float(statistics.p1[r, best]) >= threshold
        assert int(found[r]) - int(start[r]) == (best + 1 if best is not None and sure else 3)


@pytest.mark.parametrize("name", ["static", "threshold", "saber", "credit", "editing"])
def test_adaptive_blocks_with_an_infinite_threshold_are_fixed_ones(name: str) -> None:
    for seed in range(3):
        found = run(SCHEDULES[name], Model(seed), geometry=AdaBlock((1, 2), float("inf"), 5))
        alike(found, run(SCHEDULES[name], Model(seed), geometry=FixedBlocks(5)))


def test_sizing_a_block_takes_no_forward_of_its_own() -> None:
    found = run(StaticDecoding(), geometry=AdaBlock((1, 2, 3), 0.05, 4, share=0.5))
    assert found.forwards.tolist() == [14, 14, 14]


# --------------------------------------------------------------------------------------------------------------------- DAEDAL


def expected_confidence(best: list[int], p1: list[float], window: int) -> float:
    found = [p for token, p in zip(reversed(best), reversed(p1), strict=True) if token == EOS][:window]
    return sum(found) / window


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 9))
def test_the_confidence_in_the_end_of_text_scans_from_the_end(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = 3 + torch.randint(0, 9, (4,), generator=generator)
    logits = torch.randint(-2, 3, (4, 8, VOCABULARY), generator=generator).float()
    logits[..., EOS] += 1.5
    canvas = Canvas(torch.full((4, 12), MASK), 3, torch.zeros(4, dtype=torch.int64), limit)
    statistics = measure(logits, canvas.tokens[:, 3:11], SAMPLING)
    found = DAEDAL(eos_window=size)._confidence(canvas, statistics, EOS)
    for r in range(4):
        n = int(limit[r]) - 3
        best, p1 = statistics.best[r, :n].tolist(), statistics.p1[r, :n].tolist()
        assert float(found[r]) == pytest.approx(expected_confidence(best, p1, size), abs=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_insertion_puts_masks_where_the_weakest_one_was(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    geometry = DAEDAL(4, 14, block_length=5, expansion=3, low=0.35, expand_eos_threshold=0.5, eos_window=2)
    capacity = 2 + geometry.capacity()
    tokens = torch.full((4, capacity), EOS)
    limit = 2 + torch.randint(6, geometry.capacity() + 1, (4,), generator=generator)
    start = 2 + torch.randint(0, 4, (4,), generator=generator)
    for r in range(4):
        tokens[r, : int(limit[r])] = torch.randint(0, VOCABULARY, (int(limit[r]),), generator=generator)
    canvas = Canvas(tokens, 2, torch.zeros(4, dtype=torch.int64), limit)
    columns = window(canvas, start, 5)
    few = 1.5 * torch.randn(3, VOCABULARY, generator=generator)
    statistics = measure(few[torch.randint(0, 3, columns.shape, generator=generator)], tokens.gather(1, columns), SAMPLING)
    everything = measure(
        torch.randn(4, capacity - 2, VOCABULARY, generator=generator) + 2 * torch.eye(VOCABULARY)[EOS], tokens[:, 2:], SAMPLING
    )
    unfilled = statistics.masked & (torch.rand(4, 5, generator=generator) < 0.8) & (columns < limit[:, None])
    found, source = geometry.insert(canvas, start, unfilled, statistics, everything, MASK, EOS)
    for r in range(4):
        row, n = tokens[r, : int(limit[r])].tolist(), int(limit[r]) - 2
        doubt = expected_confidence(everything.best[r, :n].tolist(), everything.p1[r, :n].tolist(), 2) < 0.5
        weak = [i for i in range(5) if unfilled[r, i] and statistics.p1[r, i] < 0.35]
        moved = list(range(5))
        if doubt and weak and n + 2 <= geometry.capacity():
            i = min(weak, key=lambda i: (float(statistics.p1[r, i]), i))
            at = int(start[r]) + i
            row = row[:at] + [MASK] * 3 + row[at + 1 :]
            moved = [*range(i + 1), -1, -1, *range(i + 1, 5)][:5]
        assert int(found.limit[r]) == len(row)
        assert found.tokens[r, : len(row)].tolist() == row
        assert source[r].tolist() == moved


def test_the_row_grows_until_its_end_is_in_sight() -> None:
    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        # Prompt token n: the text has n tokens, and end-of-text is certain from there on.
        logits = 9.0 * torch.nn.functional.one_hot(torch.ones_like(columns), VOCABULARY).float()
        logits[columns - 2 >= tokens[:, 1:2]] = 20.0 * torch.eye(VOCABULARY)[EOS]
        calls.append(tokens.shape[1])
        return logits

    calls: list[int] = []
    geometry = DAEDAL(8, 60, block_length=8, expansion=8, eos_window=16, expand_eos_threshold=0.9)
    found = decode(model, torch.tensor([[0, 3], [0, 9], [0, 5]]), ThresholdDecoding(0.9), geometry, sampling=SAMPLING, eos_id=EOS)
    # Half of the window must be end-of-text: 16 places for 3 and for 5 tokens, 24 for 9.
    assert found.lengths.tolist() == [4, 10, 6]
    # Stage 1 takes 2, 3 and 2 forwards; then one for each block until the first end-of-text has nothing masked before it.
    assert found.forwards.tolist() == [2 + 1, 3 + 2, 2 + 1]
    assert calls[:3] == [2 + 8, 2 + 16, 2 + 24] and calls[3] == 2 + 24 + 8
    assert found.tokens[1].tolist()[:10] == [1] * 9 + [EOS]


def test_a_row_that_never_sees_its_end_grows_to_the_most() -> None:
    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        return 9.0 * torch.nn.functional.one_hot(torch.ones_like(columns), VOCABULARY).float()

    found = decode(model, prompts(2), ThresholdDecoding(0.9), DAEDAL(8, 21, block_length=8), sampling=SAMPLING, eos_id=EOS)
    assert found.lengths.tolist() == [22, 22]  # and the end-of-text behind them
    assert found.forwards.tolist() == [3 + 3, 3 + 3]


def test_masks_are_inserted_where_there_is_more_to_say_and_the_state_moves_with_them() -> None:
    inserted = []
    for name in ("threshold", "credit", "saber-committed"):
        for seed in range(3):
            ids = prompts(3)
            geometry = DAEDAL(6, 40, block_length=5, expansion=4, low=0.3, eos_threshold=0.0, eos_window=4)
            batch = decode(Model(seed), ids, SCHEDULES[name], geometry, sampling=SAMPLING, eos_id=EOS)
            inserted.append(batch.tokens.shape[1] > 6 + 2)
            for r in range(3):
                alone = decode(Model(seed), ids[r : r + 1], SCHEDULES[name], geometry, sampling=SAMPLING, eos_id=EOS)
                alike(alone, batch, [r])
    assert all(inserted)


def test_credit_moves_with_the_positions_when_masks_are_inserted() -> None:
    def model(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        # Every column has a token of its own, and the third is the least certain by far.
        height = torch.where(columns == 2 + 2, 0.1, 4.0 - columns / 10)
        return height[..., None] * torch.nn.functional.one_hot(columns % 9, VOCABULARY)

    geometry = DAEDAL(6, 20, block_length=6, expansion=3, low=0.2, eos_threshold=0.0, eos_window=2)
    loop = Loop(model, CreditDecoding(1.1), geometry, SAMPLING, 6, EOS)
    rows = begin(loop, prompts(1, 2), 6, None, None)
    logits, rows = loop.forward(rows)
    rows, _ = loop.transition(rows, logits)
    # The surest, column 2, was committed; the third of the window became three.
    assert rows.canvas.tokens[0, 2:10].tolist() == [2, *[MASK] * 7] and int(rows.canvas.limit) == 2 + 6 + 1 + 2
    assert rows.state.transform["ids"][0, :, 0].tolist() == [2, 3, 4, -1, -1, 5]


# ------------------------------------------------------------------------------------------------------------------------ HEX


def test_votes() -> None:
    assert vote(["a", "b", None, "b"]) == 1
    assert vote(["a", "b", "b", "a"]) == 0
    assert vote(["a", "b", "b", "a", None], [0.0, -1.0, 5.0, 1.0, 9.0]) == 2
    assert vote([None, None, "c"], [1.0, 1.0, -7.0]) == 2
    assert vote([None, None]) is None and vote([]) is None


@pytest.mark.parametrize("tie", ["first", "likelihood"])
def test_all_block_lengths_in_one_batch_are_each_of_them(tie: Any) -> None:
    lengths, model, ids = (2, 5, 14), Model(3), prompts(3)
    model.place[..., EOS] += 5
    mask = torch.arange(4) >= torch.tensor([0, 2, 1])[:, None]
    found = HEX(lengths, tie=tie).decode(
        model, ids, lambda text: sum(text) % 3 or None, sampling=SAMPLING, length=14, prompt_mask=mask, eos_id=EOS
    )
    assert len(found.answers) == 3 and len(found.winners) == 3
    for i, block in enumerate(lengths):
        each = run(StaticDecoding(tokens_per_step=2), model, geometry=FixedBlocks(block), prompt_ids=ids, prompt_mask=mask, eos_id=EOS)
        alike(each, found.runs, [i, i + 3, i + 6])
        for prompt in range(3):
            text = each.tokens[prompt, : int(each.lengths[prompt])].tolist()
            assert found.answers[prompt][i] == (sum(text) % 3 or None)
    scores = None
    if tie == "likelihood":
        canvas = torch.cat([ids, torch.full((3, 14), MASK)], 1)
        valid = torch.cat([mask, torch.ones(3, 14, dtype=torch.bool)], 1)
        logits = model(canvas, valid, torch.arange(4, 18).expand(3, -1))
        logits[..., MASK] = -torch.inf
        log_p = logits.log_softmax(-1)
        scores = [
            [
                float(log_p[r, :n].gather(-1, found.runs.tokens[3 * r + i, :n, None]).mean())
                for i in range(3)
                for n in [int(found.runs.lengths[3 * r + i])]
            ]
            for r in range(3)
        ]
        likelihoods = _log_likelihoods(model, ids, mask, found.runs, SAMPLING, 3)
        torch.testing.assert_close(likelihoods, torch.tensor(scores))
        assert found.runs.lengths.unique().numel() > 1
    assert found.chosen == [vote(answers, None if scores is None else scores[r]) for r, answers in enumerate(found.answers)]


def test_hex_refuses_what_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="no shadow block"):
        HEX(schedule=WINO())
    with pytest.raises(ValueError, match="tie must be"):
        HEX(tie="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_length must"):
        HEX(())


# --------------------------------------------------------------------------------------------- the interface of an adapter


@pytest.mark.parametrize("steps", [8, 3, 1])
def test_threshold_and_editing_decide_as_the_scheduler_of_diffusers(steps: int) -> None:
    from diffusers import BlockRefinementScheduler

    generator = torch.Generator().manual_seed(steps)
    theirs = BlockRefinementScheduler()
    theirs.set_timesteps(steps, block_length=8)
    for step in range(3 if steps > 1 else 1):
        logits = 2.0 * torch.randn(4, 8, VOCABULARY, generator=generator)
        logits[..., MASK] = -1e4  # it would commit the mask
        current = torch.randint(0, VOCABULARY, (4, 8), generator=generator)
        current[torch.rand(4, 8, generator=generator) < 0.5] = MASK
        prompt = torch.arange(8) < 2
        current[:, :2] = current[:, :2] % MASK  # a prompt has no masks
        out = theirs.step(
            logits, step, current, mask_token_id=MASK, threshold=0.6, editing_threshold=0.4, prompt_mask=prompt, sampling_method="greedy"
        )
        ours = TokenEditing(0.4, ThresholdDecoding(0.6, minimum=int(theirs.get_num_transfer_tokens(8, steps)[step])))
        decision, _ = ours.select(measure(logits, current, SAMPLING), ours.init(4, 8), ~prompt.expand(4, 8))
        assert torch.equal(decision.commits, out.transfer_index) and torch.equal(decision.edits, out.editing_transfer_index)
        assert torch.equal(decision.apply(current, MASK), out.prev_sample)


class Output:
    """What a pipeline of diffusers reads of a scheduler's step."""

    def __init__(self, **values: Tensor) -> None:
        self.__dict__.update(values)


def facade(schedule: Schedule) -> Any:
    """A schedule as the scheduler of diffusers' LLaDA2Pipeline: all that it needs is in the arguments of `step`."""
    from diffusers import BlockRefinementScheduler

    class Facade(BlockRefinementScheduler):
        state: Any = None
        settled: Any = None
        remasked = 0

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            if int(timestep) == 0:
                self.state = schedule.init(*sample.shape, sample.device)
                self.settled = torch.zeros(len(sample), dtype=torch.bool)
            mask_id = options["mask_token_id"]
            statistics = measure(model_output, sample, Sampling(mask_id), probes=schedule.probes(self.state), top=schedule.needs.top)
            # The pipeline goes on until the last row is done; those that are must not change any more.
            active = ~options["prompt_mask"].expand_as(statistics.masked) & ~self.settled[:, None]
            decision, self.state = schedule.select(statistics, self.state, active)
            self.settled |= decision.settled
            self.remasked += int(decision.remasks.sum())
            return Output(
                prev_sample=decision.apply(sample, mask_id),
                transfer_index=decision.commits,
                editing_transfer_index=decision.edits | decision.remasks,
                sampled_tokens=decision.tokens,
                sampled_probs=statistics.p,
            )

    return Facade()


@pytest.mark.parametrize("name", ["static", "threshold", "credit", "credit-klass", "ccd-ds", "saber", "rcr", "editing", "factor"])
def test_the_pipeline_of_diffusers_decodes_as_the_loop_does(name: str) -> None:
    from types import SimpleNamespace

    from diffusers import LLaDA2Pipeline

    schedule, toy = SCHEDULES[name], Model(6)

    class Causal(torch.nn.Module):
        """Sees what the pipeline shows: all blocks up to the present one, and nothing behind."""

        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            return SimpleNamespace(logits=toy(tokens, attention_mask.bool(), position_ids))

    def block_causal(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        end = columns[:, :1] - columns[:, :1] % 8 + 8
        return toy(tokens, valid & (torch.arange(tokens.shape[1]) < end), columns)

    scheduler = facade(schedule)
    pipe = LLaDA2Pipeline(model=Causal(), scheduler=scheduler, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    ids = prompts(2, 8)
    editing = 0.3 if name == "editing" else None
    out = pipe(
        input_ids=ids,
        gen_length=16,
        block_length=8,
        num_inference_steps=16,
        mask_token_id=MASK,
        eos_early_stop=False,
        editing_threshold=editing,
        max_post_steps=2,
        output_type="seq",
    )
    ours = decode(block_causal, ids, schedule, FixedBlocks(8), sampling=SAMPLING, length=16)
    assert torch.equal(out.sequences, ours.tokens)
    if name in ("saber", "rcr"):
        assert scheduler.remasked > 0
