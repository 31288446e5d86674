"""token_stats and token_commit by their kernel, against the reference and against what decoding measures today."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.decoding.noise import Key, gumbel
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.statistics import Sampling, measure
from hasten.kernels import fused, ops, reference
from hasten.kernels.arguments import Noise, Selection
from tests.kernels.cases import FEW, LAYOUTS, dtypes, laid_out, same, seeds, values
from tests.kernels.machine import Machine

vocabularies = st.one_of(st.integers(2, 70), st.sampled_from([256, 1000, 8192, 8193, 20_003]))


def key_of(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return seeds, torch.arange(width).expand(rows, width) + 5, torch.arange(rows) * 3


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], logits: Tensor, noise: float) -> None:
    """Ids where no other is as good to 1e-5, numbers to float32's steps."""
    log_p = want[1][0]
    same_token = got[0][0] == want[0][0]
    if noise == 0:
        assert same_token.all()
    near = (got[1][0] + got[1][6] - (want[1][0] + want[1][6])).abs() <= 1e-5 * (1 + log_p.abs())
    assert bool((same_token | near).all())
    assert torch.equal(got[0][1], want[0][1])
    for k in range(9):
        if k in (0, 6, 8):
            torch.testing.assert_close(got[1][k][same_token], want[1][k][same_token], rtol=3e-5, atol=3e-6)
        else:
            torch.testing.assert_close(got[1][k], want[1][k], rtol=3e-5, atol=3e-5 if k == 3 else 3e-6)


@FEW
@given(
    rows=st.integers(1, 3), width=st.integers(1, 4), vocabulary=vocabularies, dtype=dtypes, seed=seeds, layout=st.sampled_from(LAYOUTS),
    extremes=st.integers(0, 3), spread=st.sampled_from([0.0, 1.0, 5.0, 30.0]), noise=st.sampled_from([0.0, 0.7, 1.0]),
    divisor=st.sampled_from([1.0, 0.5]), suppressed=st.lists(st.integers(0, 80), max_size=3),
)  # fmt: skip
def test_statistics_are_the_references(  # type: ignore[no-untyped-def]
    machine: Machine, rows, width, vocabulary, dtype, seed, layout, extremes, spread, noise, divisor, suppressed
) -> None:
    if len({token for token in suppressed if token < vocabulary}) >= vocabulary:
        suppressed = []
    logits = laid_out(values((rows, width, vocabulary), dtype, seed, extremes=extremes, spread=spread), layout)
    current = torch.randint(-1, vocabulary + 2, (rows, width), generator=torch.Generator().manual_seed(seed))
    drawn = Noise(noise, *key_of(rows, width, seed)) if noise else None
    want = reference.token_stats(logits, current, suppressed, divisor, drawn)
    got = fused.token_stats(machine.backend, logits, current, suppressed, divisor, drawn)
    assert got is not None
    agree(got, want, logits, noise)


@pytest.mark.parametrize(("temperature", "tempered"), [(0.0, False), (0.8, False), (0.8, True)])
def test_they_are_what_decoding_measures(any_machine: Machine, temperature: float, tempered: bool) -> None:
    mask, logits = 7, values((3, 5, 300), torch.bfloat16, 4, spread=3.0, extremes=4)
    current = torch.randint(0, 300, (3, 5), generator=torch.Generator().manual_seed(0))
    current[:, ::2] = mask
    seeds, positions, steps = key_of(3, 5, 1)
    noise = Noise(1.0 if tempered else temperature, seeds, positions, steps) if temperature else None
    theirs = measure(logits, current, Sampling(mask, (3,), temperature, tempered), key=Key(seeds, positions, steps))
    ours = ops.token_stats(logits, current, [mask, 3], divisor=temperature if tempered else 1.0, noise=noise)
    names = (
        "tokens",
        "best",
        "log_p",
        "log_p1",
        "p2",
        "entropy",
        "logsumexp",
        "p_current",
        *(("token_noise", "best_noise") if noise else ()),
    )
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)
    if noise:
        assert same(reference.gumbel(seeds, positions, steps, 300), gumbel(Key(seeds, positions, steps), 300))


def test_ties_go_to_the_lowest_id(machine: Machine) -> None:
    logits = torch.zeros(1, 2, 20_000)
    logits[0, 1, [19_000, 9_000, 8_500]] = 1.0
    got = fused.token_stats(machine.backend, logits, torch.zeros(1, 2, dtype=torch.int64), [0, 1])
    assert got is not None and got[0].tolist() == [[[2, 8_500]], [[2, 8_500]]]
    torch.testing.assert_close(got[1][2][0, 1], got[1][1][0, 1].exp())  # the second is as probable as the first


def test_noise_is_not_lost_in_huge_logits(any_machine: Machine) -> None:
    """Two tokens of a logit of 1e30: each is drawn about every other time."""
    logits = torch.full((1, 400, 16), -1.0)
    logits[..., [2, 9]] = 1e30
    seeds, steps = torch.tensor([11]), torch.tensor([0])
    got = fused.token_stats(
        any_machine.backend, logits, torch.zeros(1, 400, dtype=torch.int64), [], 1.0, Noise(1.0, seeds, torch.arange(400), steps)
    )
    assert got is not None
    drawn = got[0][0]
    assert bool(((drawn == 2) | (drawn == 9)).all()) and 150 < int((drawn == 9).sum()) < 250


def test_tokens_are_drawn_as_often_as_they_are_probable(any_machine: Machine) -> None:
    """Skipping noise that cannot win must not skew the draw: 1,500 draws over eight tokens."""
    logits = values((1, 1, 8), torch.float32, 2, spread=1.5).expand(1, 1500, 8)
    p = logits[0, 0].softmax(0)
    noise = Noise(1.0, torch.tensor([5]), torch.arange(1500)[None], torch.tensor([1]))
    got = fused.token_stats(any_machine.backend, logits, torch.zeros(1, 1500, dtype=torch.int64), [], 1.0, noise)
    assert got is not None
    share = torch.bincount(got[0][0].flatten(), minlength=8) / 1500
    assert bool(((share - p).abs() < 4.5 * (p * (1 - p) / 1500).sqrt()).all())


def test_a_row_measures_the_same_alone_and_in_a_batch(machine: Machine) -> None:
    logits = values((3, 4, 20_000), torch.bfloat16, 3, spread=4.0)
    current, key = torch.zeros(3, 4, dtype=torch.int64), key_of(3, 4, 2)
    together = fused.token_stats(machine.backend, logits, current, [1], 1.0, Noise(1.0, *key))
    alone = fused.token_stats(machine.backend, logits[1:2].clone(), current[1:2], [1], 1.0, Noise(1.0, *(t[1:2] for t in key)))
    assert together is not None and alone is not None
    assert torch.equal(together[0][:, 1:2], alone[0]) and same(together[1][:, 1:2], alone[1])


@FEW
@given(
    rows=st.integers(1, 3), width=st.integers(1, 20), vocabulary=st.sampled_from([9, 64]), seed=seeds,
    threshold=st.sampled_from([0.2, 0.6, 2.0]),
    minimum=st.one_of(st.integers(0, 5), st.just(2**40)),
    score=st.sampled_from(["low_confidence", "margin", "entropy"]), bounded=st.booleans(), ties=st.booleans(),
)  # fmt: skip
def test_commits_are_those_of_a_threshold(
    machine: Machine, rows, width, vocabulary, seed, threshold, minimum, score, bounded, ties
) -> None:  # type: ignore[no-untyped-def]
    mask = 1
    logits = values((rows, width, vocabulary), torch.float32, seed, spread=3.0)
    if ties:
        logits = logits[:, :1].expand(rows, width, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    current = torch.where(torch.rand(rows, width, generator=generator) < 0.6, mask, 3)
    active = torch.rand(rows, width, generator=generator) < 0.7 if bounded else None
    threshold = -threshold if score == "entropy" else threshold
    selection = Selection(mask, threshold, minimum, score, active)
    got = fused.token_commit(machine.backend, logits, current, [mask], selection)
    assert got is not None
    ids, numbers, commits, after = got
    candidates = (current == mask) & (True if active is None else active)
    assert torch.equal(commits, candidates & (numbers[8] >= threshold) | top(numbers[8], candidates, minimum))
    assert torch.equal(after, torch.where(commits, ids[0], current))
    want = reference.token_commit(logits, current, [mask], selection)
    torch.testing.assert_close(numbers[8], want[1][8], rtol=3e-5, atol=3e-5)
    if not ties:
        assert torch.equal(commits, want[2])


def test_more_suppressed_ids_than_a_kernel_takes_are_the_references(any_machine: Machine) -> None:
    assert fused.token_stats(any_machine.backend, torch.randn(1, 1, 50), torch.zeros(1, 1, dtype=torch.int64), list(range(33))) is None
    stats = ops.token_stats(torch.randn(1, 1, 50), torch.zeros(1, 1, dtype=torch.int64), list(range(33)))
    assert int(stats.best) >= 33
