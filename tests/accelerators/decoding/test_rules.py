"""Every rule against the same rule for one row in plain Python, on statistics by lot that are full of ties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.accelerators.decoding.ccd import CCD
from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.entropy_bound import EntropyBoundDecoding
from hasten.accelerators.decoding.factor import FactorDecoding
from hasten.accelerators.decoding.hierarchical import HierarchicalDecoding
from hasten.accelerators.decoding.klass import KLASS, divergence
from hasten.accelerators.decoding.noise import gumbel
from hasten.accelerators.decoding.quota import Curve, quota, rank, top
from hasten.accelerators.decoding.rcr import RCR
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling, Statistics, measure
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO
from tests.accelerators.decoding.toys import MASK, VOCABULARY, Episode

F = np.float32
SEEDS = st.integers(0, 10**6)


@dataclass
class Row:
    """What an oracle sees of a row in a step, and what it remembers."""

    values: dict[str, list[Any]]
    active: list[bool]
    step: int
    memory: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> list[Any]:
        return self.values[name]

    @property
    def width(self) -> int:
        return len(self.active)

    @property
    def candidates(self) -> list[int]:
        return [i for i in range(self.width) if self.active[i] and self.masked[i]]

    @property
    def standing(self) -> list[int]:
        return [i for i in range(self.width) if self.active[i] and not self.masked[i]]

    def scores(self, name: str) -> list[float]:
        if name == "margin":
            return [float(F(a) - F(b)) for a, b in zip(self.p1, self.p2, strict=True)]
        return {"low_confidence": self.p, "entropy": [-h for h in self.entropy], "random": self.values.get("uniform", [])}[name]

    def best(self, name: str = "low_confidence", among: list[int] | None = None) -> list[int]:
        score = self.scores(name)
        return sorted(self.candidates if among is None else among, key=lambda i: (-score[i], i))


@dataclass
class Outcome:
    """Commits, edits and remasks of a row, and whether it is settled."""

    commits: set[int] = field(default_factory=set)
    edits: set[int] = field(default_factory=set)
    remasks: set[int] = field(default_factory=set)
    settled: bool | None = None


Oracle = Callable[[Row], Outcome]


def compare(schedule: Schedule, oracle: Oracle, seed: int, *, coarse: bool = True, alike: float = 0.0, steps: int = 24) -> None:
    """Runs an episode and holds every decision against the oracle."""
    episode = Episode.of(seed, steps=steps, coarse=coarse, alike=alike)
    memories: list[dict[str, Any]] = [{} for _ in episode.current]
    settled = [False] * len(memories)
    for step, (statistics, decision, current) in enumerate(episode.run(schedule)):
        names = ("p", "p1", "p2", "entropy", "uniform", "tokens", "best", "current", "masked", "shadow", "p_current")
        tensors = {name: value for name in names if (value := getattr(statistics, name)) is not None}
        after = decision.apply(current, MASK)
        for r, memory in enumerate(memories):
            values = {name: value[r].tolist() for name, value in tensors.items()}
            values["log_p"] = np.log(dense(episode.logits[step][r])).tolist()
            row = Row(values, episode.active[r].tolist(), step, memory)
            expected = oracle(row)
            found = [set(mask[r].nonzero()[:, 0].tolist()) for mask in (decision.commits, decision.edits, decision.remasks)]
            assert found == [expected.commits, expected.edits, expected.remasks], (step, r)
            full = {i for i in row.candidates if i not in expected.commits} | expected.remasks == set()
            assert bool(decision.settled[r]) == (full if expected.settled is None else expected.settled), (step, r)
            assert full == (not bool((after[r][episode.active[r]] == MASK).any()))
            settled[r] |= bool(decision.settled[r])
    assert all(settled)


def dense(logits: torch.Tensor) -> np.ndarray:
    """Probabilities in float64 with the mask suppressed."""
    z = logits.double().numpy().copy()
    z[..., MASK] = -1e300
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) + 1e-300


# ----------------------------------------------------------------------------------------------------- quotas and selection


@given(
    seed=SEEDS, width=st.integers(1, 9), values=st.sampled_from([(0.0, 1.0), (float("nan"), -math.inf, 0.5), (-3e38, math.inf, 2.0, 2.0)])
)
def test_ranking_puts_equals_to_the_left_and_the_ineligible_last(seed: int, width: int, values: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.tensor(values)[torch.randint(len(values), (2, width), generator=generator)]
    eligible = torch.rand(2, width, generator=generator) < 0.6
    count = torch.randint(0, width + 2, (2,), generator=generator)
    chosen, found = top(score, eligible, count), rank(score, eligible)
    for r in range(2):
        lowest = {i for i in range(width) if not score[r, i] > -3e38}  # NaN, -inf and the smallest number are equals
        order = sorted((i for i in range(width) if eligible[r, i]), key=lambda i: (math.inf if i in lowest else -float(score[r, i]), i))
        assert [i for _, i in sorted((int(found[r, i]), i) for i in range(width))][: len(order)] == order
        assert sorted(found[r].tolist()) == list(range(width))
        assert set(chosen[r].nonzero()[:, 0].tolist()) == set(order[: int(count[r])])


def test_equals_keep_their_order_in_a_long_row_too() -> None:
    score, eligible = torch.zeros(2, 300), torch.ones(2, 300, dtype=torch.bool)
    assert torch.equal(rank(score, eligible), torch.arange(300).expand(2, -1))
    assert top(score, eligible, torch.tensor([7, 290])).sum(-1).tolist() == [7, 290] and not top(score, eligible, 7)[:, 7:].any()


def expected_quota(n: int, left: int, step: int, steps: int, curve: Curve) -> int:
    if step >= steps - 1:
        return max(1, left)
    if curve == "dream":
        t = np.linspace(1, 1e-3, steps + 1)
        return max(1, math.floor(left * (1 - t[step + 1] / t[step]) + 1e-3))
    r = (step + 1) / steps
    after = {
        "even": n - sum(n // steps + (i < n % steps) for i in range(step + 1)),
        "linear": math.ceil(n * (1 - r) - 1e-3),
        "cosine": math.ceil(n * math.cos(math.pi * r / 2) - 1e-3),
    }[curve]
    return max(1, left - after)


@pytest.mark.parametrize("curve", ["even", "linear", "cosine", "dream"])
def test_quotas_follow_their_curve_and_end_in_time(curve: Curve) -> None:
    for steps in (1, 2, 3, 5, 8, 31, 32, 40):
        total = torch.arange(41)
        left, step = total.clone(), 0
        while (left > 0).any():
            found = quota(left, total, torch.full_like(total, step), steps, curve)
            assert found.tolist() == [expected_quota(int(n), int(m), step, steps, curve) for n, m in zip(total, left, strict=True)]
            left, step = (left - found).clamp(min=0), step + 1
        assert step <= steps


def test_even_quotas_are_those_of_llada() -> None:
    left, found = 13, []
    for step in range(5):
        found.append(int(quota(torch.tensor([left]), torch.tensor([13]), torch.tensor([step]), 5)))
        left -= found[-1]
    assert found == [3, 3, 3, 2, 2]


# -------------------------------------------------------------------------------------------------------------------- rules


@settings(max_examples=20)
@given(seed=SEEDS, score=st.sampled_from(["low_confidence", "margin", "entropy", "random"]), steps=st.sampled_from([None, 1, 3, 5, 20]))
def test_static(seed: int, score: Any, steps: int | None) -> None:
    def oracle(row: Row) -> Outcome:
        total = row.memory.setdefault("total", len(row.candidates))
        count = 2 if steps is None else expected_quota(total, len(row.candidates), row.step, steps, "even")
        return Outcome(set(row.best(score)[:count]))

    compare(StaticDecoding(score, steps=steps, tokens_per_step=2 if steps is None else 1), oracle, seed)


@settings(max_examples=20)
@given(seed=SEEDS, threshold=st.sampled_from([0.0, 0.3, 0.45, 0.7, 1.1]), minimum=st.integers(1, 3), margin=st.booleans())
def test_threshold(seed: int, threshold: float, minimum: int, margin: bool) -> None:
    score: Any = "margin" if margin else "low_confidence"

    def oracle(row: Row) -> Outcome:
        values = row.scores(score)
        return Outcome({i for i in row.candidates if values[i] >= F(threshold)} | set(row.best(score)[:minimum]))

    compare(ThresholdDecoding(threshold, minimum, score), oracle, seed)


@settings(max_examples=20)
@given(seed=SEEDS, factor=st.sampled_from([0.0, 0.5, 1.0, 1.7, 3.0, 20.0]))
def test_factor(seed: int, factor: float) -> None:
    def oracle(row: Row) -> Outcome:
        order, n = row.best(), 1
        while n < len(order) and F(n + 2) * (F(1) - F(row.p[order[n]])) < F(factor):
            n += 1
        return Outcome(set(order[:n]))

    compare(FactorDecoding(factor), oracle, seed)


def test_a_factor_of_0_is_one_token_a_step_even_at_certainty() -> None:
    logits = 1e4 * torch.nn.functional.one_hot(torch.arange(4), VOCABULARY)[None].float()
    statistics = measure(logits, torch.full((1, 4), MASK), Sampling(MASK))
    assert (statistics.p == 1).all()
    decision, _ = FactorDecoding(0.0).select(statistics, FactorDecoding().init(1, 4))
    assert decision.commits.tolist() == [[True, False, False, False]]


@settings(max_examples=20)
@given(seed=SEEDS, low=st.sampled_from([0.0, 0.25, 0.4, 0.6]), threshold=st.sampled_from([0.6, 0.9, 1.0]))
def test_hierarchical(seed: int, low: float, threshold: float) -> None:
    def oracle(row: Row) -> Outcome:
        runs: list[list[int]] = []
        for i in row.candidates:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        heads = {row.best(among=run)[0] for run in runs}
        chosen = {i for i in heads if row.p[i] > F(low)} | {i for i in row.candidates if row.p[i] > F(threshold)}
        return Outcome(chosen | set(row.best()[:1]))

    compare(HierarchicalDecoding(low, threshold), oracle, seed)


@settings(max_examples=20)
@given(seed=SEEDS, bound=st.sampled_from([0.0, 0.013, 1.537, 3.011, 8.0]), score=st.sampled_from(["entropy", "low_confidence"]))
def test_entropy_bound(seed: int, bound: float, score: Any) -> None:
    def oracle(row: Row) -> Outcome:
        order, n = row.best(score), 1
        for k in range(2, len(order) + 1):
            entropies = [row.entropy[i] for i in order[:k]]
            if sum(entropies) - max(entropies) > bound:
                break
            n = k
        return Outcome(set(order[:n]))

    compare(EntropyBoundDecoding(bound, score), oracle, seed)


# ------------------------------------------------------------------------------------------------------------------ history


@settings(max_examples=20)
@given(seed=SEEDS, limit=st.sampled_from([0.02, 0.3, 1.0]), window=st.integers(1, 3), minimum=st.integers(1, 2))
def test_klass(seed: int, limit: float, window: int, minimum: int) -> None:
    def oracle(row: Row) -> Outcome:
        p = [np.exp(row.log_p[i]) for i in range(row.width)]
        before, stable = row.memory.get("p"), row.memory.setdefault("stable", [0] * row.width)
        for i in range(row.width):
            small = before is not None and float((p[i] * (np.log(p[i]) - np.log(before[i]))).sum()) < limit
            stable[i] = stable[i] + 1 if small else 0
        row.memory["p"] = p
        ready = {i for i in row.candidates if stable[i] >= window and row.p[i] >= F(0.35)}
        return Outcome(ready or set(row.best()[:minimum]))

    compare(KLASS(0.35, limit, window, minimum, support=16), oracle, seed, coarse=False, alike=0.7)


@given(seed=SEEDS, listed=st.integers(1, 7))
def test_the_divergence_of_a_list_is_at_most_the_true_one_and_that_one_if_the_list_is_whole(seed: int, listed: int) -> None:
    log_p, log_q = (4 * torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))).double().log_softmax(-1)
    true = float((log_p.exp() * (log_p - log_q)).sum())
    ids = log_q.topk(listed).indices
    part = float(divergence(log_p[ids], log_q[ids]))
    assert -1e-9 <= part <= true * (1 + 1e-6) + 1e-9
    assert float(divergence(log_p, log_q)) == pytest.approx(true, abs=1e-9)


def test_the_divergence_is_never_below_zero() -> None:
    log_p = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)).mul(4).log_softmax(-1)
    assert bool((divergence(log_p, log_p + 1e-7 * torch.randn(512, 8, generator=torch.Generator().manual_seed(1))) >= 0).all())


def test_klass_does_not_take_the_first_step_of_a_block_for_a_stable_one() -> None:
    episode = Episode.of(3, alike=1.0)  # the same logits in every step
    trace = episode.run(KLASS(threshold=0.0, divergence=0.01, window=2))
    # Two comparisons need three forwards.
    assert [decision.commits.sum(-1).tolist() for _, decision, _ in trace][:2] == [[1, 1, 1], [1, 1, 1]]
    assert len(trace) == 3 and trace[-1][1].settled.all()


@settings(max_examples=20)
@given(seed=SEEDS, history=st.integers(1, 3), dynamic=st.booleans(), u=st.integers(1, 2))
def test_ccd(seed: int, history: int, dynamic: bool, u: int) -> None:
    def oracle(row: Row) -> Outcome:
        past = row.memory.setdefault("past", [])
        past.append(np.exp(np.array(row.log_p)))
        mean = np.mean(past[-history:], 0)
        entropy = -(mean * np.log(mean)).sum(-1)
        best = mean.argmax(-1)
        for i in row.candidates:
            assert row.expected_tokens[i] == best[i]
        order = sorted(row.candidates, key=lambda i: entropy[i])
        streak, token = row.memory.setdefault("streak", [0] * row.width), row.memory.setdefault("token", [-1] * row.width)
        for i in range(row.width):
            streak[i] = 0 if i not in order[:4] else streak[i] + 1 if token[i] == best[i] else 1
            token[i] = best[i]
        coherent = {i for i in row.candidates if streak[i] >= history and entropy[i] < 1.2}
        return Outcome(coherent if dynamic and coherent else set(order[:u]))

    schedule = CCD(history, u, dynamic, positions=4, bound=1.2, support=VOCABULARY)
    chosen: list[list[int]] = []

    def with_tokens(row: Row) -> Outcome:
        row.values["expected_tokens"] = chosen.pop(0)
        return oracle(row)

    for _, decision, _ in Episode.of(seed, coarse=False, alike=0.6).run(schedule):
        chosen.extend(decision.tokens.tolist())
    compare(schedule, with_tokens, seed, coarse=False, alike=0.6)


def test_an_average_entropy_is_the_mean_one_and_the_disagreement() -> None:
    episode = Episode.of(5, coarse=False)
    found: list[Statistics] = []

    class Spy(StaticDecoding):
        def choose(self, view: Any, memory: Any) -> Any:
            found.append(view.statistics)
            return super().choose(view, memory)

    trace = episode.run(CCD(history=2, support=VOCABULARY, rule=Spy("entropy")))
    p, q = (dense(logits) for logits in episode.logits[:2])
    mean = (p + q) / 2
    disagreement = sum((x * np.log(x / mean)).sum(-1) for x in (p, q)) / 2
    expected = (-(p * np.log(p)).sum(-1) - (q * np.log(q)).sum(-1)) / 2 + disagreement
    masked = trace[1][0].masked & episode.active
    np.testing.assert_allclose(found[1].entropy[masked].numpy(), expected[masked.numpy()], atol=1e-5)
    assert torch.equal(found[1].entropy[~masked], trace[1][0].entropy[~masked])


def test_without_a_history_nothing_is_cut_off() -> None:
    schedule = CCD(history=2, support=2)
    logits = torch.randn(1, 4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    state = schedule.init(1, 4)
    statistics = measure(logits, torch.full((1, 4), MASK), Sampling(MASK), probes=schedule.probes(state), top=2)
    seen: list[Statistics] = []

    class Spy(StaticDecoding):
        def choose(self, view: Any, memory: Any) -> Any:
            seen.append(view.statistics)
            return super().choose(view, memory)

    CCD(history=2, support=2, rule=Spy()).select(statistics, state)
    assert torch.equal(seen[0].entropy, statistics.entropy) and torch.equal(seen[0].log_p, statistics.log_p)


# ------------------------------------------------------------------------------------------------------------------- credit


@dataclass
class DenseCredit:
    """The published form: a buffer of the size of the vocabulary for each position."""

    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2

    def step(self, credit: np.ndarray, log_p: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities with credit, and the credit, both [..., VOCABULARY]."""
        new = self.beta * credit
        best = log_p.argmax(-1)[..., None]
        np.put_along_axis(new, best, np.take_along_axis(new, best, -1) + np.exp(self.gamma * np.take_along_axis(log_p, best, -1)), -1)
        credit = np.where(candidates[..., None], new, credit)
        fused = log_p + self.alpha * np.log1p(credit)
        return fused - np.log(np.exp(fused).sum(-1, keepdims=True)), credit


@settings(max_examples=15)
@given(seed=SEEDS, temperature=st.sampled_from([0.0, 0.8]), alike=st.sampled_from([0.0, 0.5, 0.9]))
def test_sparse_credit_is_the_dense_one(seed: int, temperature: float, alike: float) -> None:
    episode = Episode.of(seed, rows=2, width=5, coarse=False, alike=alike)
    found: list[Statistics] = []

    class Spy(StaticDecoding):
        def choose(self, view: Any, memory: Any) -> Any:
            found.append(view.statistics)
            return super().choose(view, memory)

    trace = episode.run(CreditDecoding(slots=VOCABULARY, rule=Spy("margin")), Sampling(MASK, temperature=temperature))
    credit = np.zeros((2, 5, VOCABULARY))
    for step, (raw, _, _) in enumerate(trace):
        candidates = (raw.masked & episode.active).numpy()
        log_p, credit = DenseCredit().step(credit, np.log(dense(episode.logits[step])), candidates)
        p, s = np.exp(log_p), found[step]
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(s.p1.numpy()[candidates], p.max(-1)[candidates], **close)
        np.testing.assert_allclose(s.p2.numpy()[candidates], np.sort(p, -1)[..., -2][candidates], **close)
        np.testing.assert_allclose(s.entropy.numpy()[candidates], -(p * log_p).sum(-1)[candidates], **close)
        assert (s.best.numpy() == log_p.argmax(-1))[candidates].all()
        if temperature:
            noise = gumbel(episode.key._replace(steps=episode.key.steps + step), VOCABULARY).double().numpy()
            expected = (log_p + temperature * noise).argmax(-1)
            assert (s.tokens.numpy() == expected)[candidates].all()
        else:
            assert torch.equal(s.tokens[candidates], s.best[candidates])
        at = np.take_along_axis(p, s.tokens.numpy()[..., None], -1)[..., 0]
        np.testing.assert_allclose(s.p.numpy()[candidates], at[candidates], **close)
        for name in ("tokens", "log_p", "entropy", "p2", "log_p1"):
            assert torch.equal(getattr(s, name)[~candidates], getattr(raw, name)[~candidates])


@settings(max_examples=15)
@given(seed=SEEDS, threshold=st.sampled_from([0.4, 0.6, 0.8]))
def test_credit_with_a_threshold(seed: int, threshold: float) -> None:
    def oracle(row: Row) -> Outcome:
        credit = row.memory.setdefault("credit", np.zeros((row.width, VOCABULARY)))
        candidates = np.array([i in row.candidates for i in range(row.width)])
        log_p, row.memory["credit"] = DenseCredit().step(credit, np.array(row.log_p), candidates)
        p = np.exp(log_p).max(-1)
        order = sorted(row.candidates, key=lambda i: -p[i])
        return Outcome({i for i in order if p[i] >= threshold} | set(order[:1]))

    compare(CreditDecoding(threshold), oracle, seed, coarse=False, alike=0.8)


def test_persistence_lowers_the_effective_threshold_as_computed() -> None:
    # With p held, credit after k steps is p^gamma (1 - beta^k) / (1 - beta), and the odds grow by (1 + credit)^alpha.
    logits = torch.zeros(1, 1, 3)
    logits[..., 0] = 2.0
    p = float(logits[0, 0, :2].softmax(-1)[0])
    seen: list[float] = []

    class Spy(StaticDecoding):
        def choose(self, view: Any, memory: Any) -> Any:
            seen.append(float(view.statistics.p1))
            return torch.zeros_like(view.candidates), memory

    whole = CreditDecoding(rule=Spy())
    state = whole.init(1, 1)
    for _ in range(6):
        statistics = measure(logits, torch.tensor([[2]]), Sampling(2), probes=whole.probes(state))
        _, state = whole.select(statistics, state)
    for k, found in enumerate(seen, 1):
        odds = p / (1 - p) * (1 + p**0.2 * (1 - 0.8**k) / 0.2) ** 0.7
        assert found == pytest.approx(odds / (1 + odds), rel=1e-5)


def test_the_second_probability_may_be_that_of_a_token_without_credit() -> None:
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    seen: list[Statistics] = []

    class Spy(StaticDecoding):
        def choose(self, view: Any, memory: Any) -> Any:
            seen.append(view.statistics)
            return super().choose(view, memory)

    schedule = CreditDecoding(slots=1, rule=Spy("margin"))
    state = schedule.init(1, 1)
    statistics = measure(logits, torch.tensor([[3]]), Sampling(3), probes=schedule.probes(state), top=schedule.needs.top)
    schedule.select(statistics, state)
    p = np.exp([3.0, 2.0, 1.0]) / np.exp([3.0, 2.0, 1.0]).sum()
    boosted = p * [(1 + p[0] ** 0.2) ** 0.7, 1, 1]
    assert float(seen[0].p2) == pytest.approx(boosted[1] / boosted.sum(), rel=1e-5)


def test_the_least_credit_leaves_when_the_slots_are_full() -> None:
    schedule = CreditDecoding(slots=2, rule=StaticDecoding())
    state = schedule.init(1, 1)
    for best in (0, 0, 1, 2):
        logits = torch.zeros(1, 1, 5)
        logits[..., best] = 3.0
        statistics = measure(logits, torch.tensor([[4]]), Sampling(4), probes=schedule.probes(state))
        _, state = schedule.select(statistics, state)
    p = float(torch.tensor([3.0, 0, 0, 0]).softmax(-1)[0]) ** 0.2
    ids, credit = state.transform["ids"][0, 0].tolist(), state.transform["credit"][0, 0].tolist()
    # Token 0 has p (1 + 0.8) 0.8^2, token 1 had 0.8 p when token 2 came.
    assert dict(zip(ids, credit, strict=True)) == pytest.approx({0: p * 1.8 * 0.64, 2: p}, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- revisions


@settings(max_examples=20)
@given(seed=SEEDS, n=st.integers(1, 4), mu=st.integers(1, 8), backtrack=st.booleans(), signal=st.sampled_from(["largest", "committed"]))
def test_saber(seed: int, n: int, mu: int, backtrack: bool, signal: Any) -> None:
    def oracle(row: Row) -> Outcome:
        recorded = row.memory.setdefault("recorded", {})
        last = row.memory.setdefault("last", [0.0] * row.width)
        now = [F(row.p_current[i]) if signal == "committed" and not row.masked[i] else F(row.p1[i]) for i in range(row.width)]
        standing = [recorded[i] for i in row.standing]
        # The mean is a sum in float32; positions at its very edge are few, since tokens commit at different values.
        tau = torch.tensor([recorded.get(i, 0.0) if i in row.standing else 0.0 for i in range(row.width)]).sum() / max(1, len(standing))
        tau = float(tau) if standing else 1.0
        commits = {i for i in row.candidates if row.p[i] > tau} | set(row.best()[:n])
        recorded.update({i: row.p[i] for i in commits})
        remasks: set[int] = set()
        if backtrack and commits != set(row.candidates):
            r = min(max(n // 2, math.ceil(len(commits) / mu)), len(commits) - 1)
            order = sorted(row.standing, key=lambda i: (float(now[i] - F(last[i])), i))
            remasks = set(order[:r])
            assert len(remasks) < len(commits)
        row.memory["last"] = now
        for i in remasks:
            del recorded[i]
        return Outcome(commits, remasks=remasks)

    compare(Saber(n, mu, backtrack, signal), oracle, seed)


@settings(max_examples=20)
@given(seed=SEEDS, score=st.sampled_from(["low_confidence", "margin", "entropy"]), steps=st.sampled_from([3, 4, 8]))
def test_rcr(seed: int, score: Any, steps: int) -> None:
    def oracle(row: Row) -> Outcome:
        running = row.memory.setdefault("running", {})
        total = row.memory.setdefault("total", len(row.candidates))
        # The published steps: fill everything that is left, then mask again as many as the later quotas add up to, the lowest first.
        now = row.scores(score)
        filled = dict(running) | {i: now[i] for i in row.candidates}
        later = sum(total // steps + (t < total % steps) for t in range(row.step + 1, steps))
        order = sorted(filled, key=lambda i: (filled[i], -i))
        masked = set(order[:later])
        row.memory["running"] = {i: c for i, c in filled.items() if i not in masked}
        return Outcome(set(row.candidates) - masked, remasks=set(row.standing) & masked)

    compare(RCR(score, StaticDecoding(score, steps=steps)), oracle, seed)


@settings(max_examples=20)
@given(seed=SEEDS, wide=st.sampled_from([0.0, 0.25, 0.4, 2.0]), narrow=st.sampled_from([0.0, 0.1, 0.5, 1.1]))
def test_wino(seed: int, wide: float, narrow: float) -> None:
    def oracle(row: Row) -> Outcome:
        n = len(row.candidates)
        above = [i for i in row.best() if row.p[i] > F(wide)][: max(5, min(20, math.floor(0.7 * n)))]
        commits = set(above) | set(row.best()[:1])
        before = row.memory.get("accepted", 1)
        row.memory["accepted"] = len(commits)
        doubtful = sorted((i for i in row.standing if row.shadow[i] < F(narrow)), key=lambda i: (row.shadow[i], i))
        remasks = set(doubtful[: before - 1]) if len(commits) > 1 and before > 1 else set()
        return Outcome(commits, remasks=remasks)

    compare(WINO(wide, narrow), oracle, seed)


def test_wino_commits_at_most_twenty_and_fills_a_block_of_w_in_w_steps() -> None:
    episode = Episode.of(1, rows=6, width=40, steps=40)
    active = torch.ones_like(episode.active)
    episode = Episode(torch.full_like(episode.current, MASK), active, episode.logits, episode.shadows, episode.key)
    for wide, narrow in ((0.0, 1.1), (0.3, 0.5), (0.0, 0.3)):
        committed = torch.zeros(6, dtype=torch.int64)
        for step, (_, decision, _) in enumerate(episode.run(WINO(wide, narrow)), 1):
            assert decision.commits.sum(-1).max() <= 20
            committed += decision.commits.sum(-1) - decision.remasks.sum(-1)
            assert (committed >= min(step, 40)).all()
        assert (committed == 40).all()


@settings(max_examples=20)
@given(seed=SEEDS, edit=st.sampled_from([0.0, 0.2, 0.4, 0.9]), most=st.integers(0, 4))
def test_editing(seed: int, edit: float, most: int) -> None:
    def oracle(row: Row) -> Outcome:
        was_full = not row.candidates
        commits = {i for i in row.candidates if row.p[i] >= F(0.3)} | set(row.best()[:1])
        edits = {i for i in row.standing if row.tokens[i] != row.current[i] and row.p[i] > F(edit)}
        posts = row.memory["posts"] = row.memory.get("posts", 0) + 1 if was_full else 0
        full = commits == set(row.candidates)
        return Outcome(commits, edits, settled=full and (posts >= most or (was_full and not edits)))

    compare(TokenEditing(edit, ThresholdDecoding(0.3), most), oracle, seed)
