"""Statistics against the whole softmax in float64, and noise against known answers and the distribution it must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.accelerators.decoding.noise import LARGEST, Key, gumbel, philox, uniform
from hasten.accelerators.decoding.statistics import Sampling, Statistics, guided, measure, truncated

LOWEST = float(np.finfo(np.float32).min)


def key(rows: int, width: int, seed: int = 0, step: int = 0) -> Key:
    return Key(torch.arange(rows) + seed, torch.arange(width), torch.full((rows,), step))


def dense(logits: torch.Tensor, suppressed: set[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities in float64 by the definition."""
    z = logits.double().numpy() / temperature
    z[..., sorted(suppressed)] = -np.inf
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize(
    ("counter", "keys", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: tuple[int, ...], keys: tuple[int, ...], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in keys)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), (k0, k1))) == words


def test_noise_belongs_to_seed_position_and_step_alone() -> None:
    seeds = torch.tensor([5, -1, 5, 2**62 + 5])
    many = Key(seeds, torch.tensor([[3, 9], [0, 3], [9, 3], [3, 9]]), torch.tensor([2, 2, 2, 2]))
    found = gumbel(many, 10)
    alone = gumbel(Key(seeds[2:3], torch.tensor([[3]]), torch.tensor([2])), 10)
    assert torch.equal(found[2, 1], alone[0, 0]) and torch.equal(found[0, 0], alone[0, 0])
    assert torch.equal(found[..., :7], gumbel(many, 7))
    others = [found[0, 1], found[1, 1], found[3, 0], gumbel(many._replace(steps=many.steps + 1), 10)[0, 0]]
    assert all(not torch.equal(found[0, 0], other) for other in others)
    assert len({float(u) for u in uniform(many).flatten()} | {float(u) for u in found.flatten()}) == 6 + 60


def test_gumbel_noise_is_finite_at_both_ends_and_has_an_upper_tail() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=LARGEST).double()
    assert u[0] == 2.0**-33 and u[-1] < 1
    found = gumbel(key(64, 64), 64)
    assert found.isfinite().all()
    assert abs(found.mean() - 0.5772) < 0.01 and abs(found.var() - np.pi**2 / 6) < 0.02


def test_gumbel_noise_is_fine_where_it_is_large() -> None:
    # Token v takes word v % 4 of counter v // 4; u is the distance from 1, so that a small one is a large noise.
    found = gumbel(Key(torch.tensor([7]), torch.tensor([5]), torch.tensor([3])), 4096)[0, 0].double()
    counter = (torch.arange(1024), torch.tensor(5), torch.tensor(3), torch.tensor(0))
    u = (torch.stack(philox(counter, (torch.tensor(7), torch.tensor(0))), -1).flatten().double() + 0.5) / 2**32
    expected, large = -torch.log(-torch.log1p(-u)), u < 0.5
    torch.testing.assert_close(found[large], expected[large], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert found.max() > 7 and found.argmax() == u.argmin()


def test_sampled_tokens_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 5.0]).expand(40, 500, 5)
    current = torch.full((40, 500), 4)
    for tempered in (False, True):
        found = measure(logits, current, Sampling(4, temperature=0.7, tempered=tempered), key=key(40, 500))
        share = torch.bincount(found.tokens.flatten(), minlength=5) / found.tokens.numel()
        expected = np.exp(dense(logits[0, :1], {4}, 0.7))[0]
        assert share[4] == 0 and np.abs(share.numpy() - expected).max() < 0.01
        plain = dense(logits[0, :1], {4}, 0.7 if tempered else 1.0)[0]
        np.testing.assert_allclose(found.log_p[0].numpy(), plain[found.tokens[0]], atol=1e-5)
        assert (found.best == 2).all()


# ------------------------------------------------------------------------------------------------------------- statistics


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3.0, 40.0]), shift=st.sampled_from([0.0, 1e3, -50.0]), half=st.booleans())
def test_statistics_are_those_of_the_whole_softmax(seed: int, scale: float, shift: float, half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = shift + scale * torch.randn(2, 5, 9, generator=generator)
    logits = logits.bfloat16() if half else logits
    current = torch.randint(0, 9, (2, 5), generator=generator)
    probes = torch.randint(-1, 9, (2, 5, 3), generator=generator)
    before = logits.clone()
    found = measure(logits, current, Sampling(8, (3,)), probes=probes, top=4, shadow=logits.flip(1))
    assert torch.equal(logits, before)
    log_p = dense(logits.float(), {8, 3})
    p, order = np.exp(log_p), np.argsort(-log_p, -1, kind="stable")
    assert (found.tokens.numpy() == order[..., 0]).all() and torch.equal(found.tokens, found.best)
    near = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found.p.numpy(), p.max(-1), **near)
    np.testing.assert_allclose(found.p1.numpy(), p.max(-1), **near)
    np.testing.assert_allclose(found.p2.numpy(), np.sort(p, -1)[..., -2], **near)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.entropy.numpy(), -np.nansum(p * log_p, -1), rtol=1e-4, atol=1e-5)
    z = logits.double().numpy()
    z[..., [3, 8]] = -np.inf
    np.testing.assert_allclose(found.logsumexp.numpy(), np.logaddexp.reduce(z, -1), rtol=1e-5)
    at = np.take_along_axis(p, current.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.p_current.numpy(), at, **near)
    assert found.shadow is not None and found.probe_log_p is not None and found.top_ids is not None and found.top_log_p is not None
    np.testing.assert_allclose(found.shadow.numpy(), np.take_along_axis(p[:, ::-1], current.numpy()[..., None], -1)[..., 0], **near)
    assert torch.equal(found.masked, current == 8)
    listed = np.where(probes < 0, 0.0, np.take_along_axis(p, probes.clamp(min=0).numpy(), -1))
    np.testing.assert_allclose(found.probe_log_p.exp().numpy(), listed, **near)
    np.testing.assert_allclose(found.top_log_p.exp().numpy(), np.take_along_axis(p, found.top_ids.numpy(), -1), **near)
    np.testing.assert_allclose(found.top_log_p.exp().numpy(), np.sort(p, -1)[..., ::-1][..., :4], **near)
    assert found.token_noise is None and found.uniform is None


def test_equal_logits_give_the_lowest_id_allowed() -> None:
    found = measure(torch.zeros(1, 2, 6), torch.tensor([[0, 5]]), Sampling(0, (1,)))
    assert found.tokens.tolist() == [[2, 2]]
    torch.testing.assert_close(found.p, torch.full((1, 2), 0.25))
    torch.testing.assert_close(found.entropy, torch.full((1, 2), float(np.log(4))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
@pytest.mark.parametrize("sampling", [Sampling(5), Sampling(5, (0,), temperature=0.5), Sampling(5, temperature=0.01, tempered=True)])
def test_no_logit_makes_a_statistic_something_else_than_a_number(value: float, sampling: Sampling) -> None:
    logits = torch.zeros(1, 4, 6)
    logits[0, 0], logits[0, 1, 2], logits[0, 2, 5] = value, value, value
    logits[0, 3, :3] = value
    found = measure(
        logits, torch.full((1, 4), 5), sampling, key=key(1, 4), probes=torch.tensor([[[0, 1, -1]]]).expand(1, 4, 3), top=6, lots=True
    )
    for name in ("p", "p1", "p2", "entropy", "logsumexp", "p_current", "uniform"):
        assert getattr(found, name).isfinite().all(), name
    assert not found.probe_log_p.isnan().any() and not found.top_log_p.isnan().any()  # type: ignore[union-attr]
    assert ((found.p1 > 0) & (found.p1 <= 1) & (found.p2 <= found.p1)).all()
    assert (found.tokens != 5).all() and (found.best != 5).all()
    allowed = 6 - 1 - len(sampling.suppressed)
    torch.testing.assert_close(found.p1[0, 0], torch.tensor(1 / allowed))  # nothing but one value: uniform over what is allowed


def test_a_list_longer_than_the_vocabulary_is_padded() -> None:
    found = measure(torch.zeros(1, 1, 3), torch.tensor([[2]]), Sampling(2), top=5)
    assert found.top_ids is not None and found.top_log_p is not None
    assert found.top_ids.shape == (1, 1, 5) and found.top_ids[0, 0, 3:].tolist() == [-1, -1]
    assert found.top_log_p[0, 0, 2:].exp().sum() == 0


def test_errors_say_what_is_wrong() -> None:
    logits, current = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="every token of a vocabulary of 3 is suppressed"):
        measure(logits, current, Sampling(0, (1, 2)))
    for options in ({"sampling": Sampling(0, temperature=1.0)}, {"sampling": Sampling(0), "lots": True}):
        with pytest.raises(ValueError, match="need a key"):
            measure(logits, current, **options)
    with pytest.raises(ValueError, match="rows, positions, vocabulary"):
        measure(logits, current[:, :1], Sampling(0))
    with pytest.raises(ValueError, match="mask_id"):
        Sampling(-1)
    with pytest.raises(ValueError, match="tempered"):
        Sampling(0, tempered=True)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(0, temperature=float("nan"))
    with pytest.raises(ValueError, match="lots"):
        measure(logits, current, Sampling(0)).score("random")


def test_scores_rank_what_is_not_a_number_last() -> None:
    found = measure(torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64), Sampling(0), key=key(1, 3), lots=True)
    broken = found.map(
        lambda value: value if value.dtype != torch.float32 else torch.where(torch.tensor([[0, 1, 0]]).bool(), torch.nan, value)
    )
    assert isinstance(broken, Statistics)
    for name in ("low_confidence", "margin", "entropy", "random"):
        assert broken.score(name).argmin() == 1 and broken.score(name).isfinite().all()


# --------------------------------------------------------------------------------------------------------- before measuring


def test_guidance() -> None:
    conditional, unconditional = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 1.5), conditional + 1.5 * (conditional - unconditional))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), top_k=st.one_of(st.none(), st.integers(1, 9)), top_p=st.one_of(st.none(), st.floats(0.05, 1.0)))
def test_truncation_keeps_the_most_probable(seed: int, top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(seed))
    found = truncated(logits, top_k=top_k, top_p=top_p)
    for z, kept in zip(logits[0].double().tolist(), found[0].tolist(), strict=True):
        order = sorted(range(7), key=lambda i: -z[i])[: top_k or 7]
        mass = np.exp([z[i] for i in order])
        share = np.cumsum(mass) / mass.sum()
        n = 7 if top_p is None else int((share - mass / mass.sum() < top_p - 1e-6).sum())
        expected = set(order[:n])
        assert {i for i, value in enumerate(kept) if value > -np.inf} == expected
        assert all(kept[i] == pytest.approx(z[i], rel=1e-6) for i in expected)


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_truncation_refuses_what_keeps_nothing(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        truncated(torch.zeros(1, 1, 3), **arguments)  # type: ignore[arg-type]
