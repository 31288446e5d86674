"""Steering of masked language models: exact tilted probabilities on tiny models, the plain decoding loop, budgets and rows counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.decoding.generate import decode
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling
from hasten.accelerators.steering.best_of_n import BestOfN
from hasten.accelerators.steering.budget import Budget, BudgetError, Meter
from hasten.accelerators.steering.controller import Run, SteeringError, SteeringMethod
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.mixes import MeanRank, WeightedSum
from hasten.accelerators.steering.noise import LARGEST_SEED, stream
from hasten.accelerators.steering.successive_halving import SuccessiveHalving
from hasten.accelerators.steering.svdd import SVDD, CoDe
from hasten.accelerators.steering.text import Ancestral, SteeredText, soft_mean, steer_text
from hasten.accelerators.steering.verifiers import RewardWarning, VerifierError
from tests.accelerators.decoding.toys import EOS, MASK, VOCABULARY, Model

# ------------------------------------------------------------------------------------------------------- the exact oracles

LETTERS, PLACES, HIDDEN = 3, 3, 3
SEQUENCES = torch.tensor(list(product(range(LETTERS), repeat=PLACES)))
GENERATOR = torch.Generator().manual_seed(5)
REWARDS = torch.randn(len(SEQUENCES), generator=GENERATOR, dtype=torch.float64)
FIRST = torch.tensor([0.5, 0.3, 0.2])
MOVES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
MARKOV = FIRST[SEQUENCES[:, 0]] * MOVES[SEQUENCES[:, 0], SEQUENCES[:, 1]] * MOVES[SEQUENCES[:, 1], SEQUENCES[:, 2]]
ALONE = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
FACTORISED = ALONE[torch.arange(PLACES), SEQUENCES].prod(1)


def number(answers: Tensor) -> Tensor:
    return (answers * torch.tensor([LETTERS**2, LETTERS, 1])).sum(-1)


def table_reward(answers: Tensor) -> Tensor:
    return REWARDS[number(answers)]


def marginals(tokens: Tensor, joint: Tensor) -> Tensor:
    """p(token at a place | what is revealed) for answers [r, PLACES] with masks, [r, PLACES, LETTERS]."""
    fits = ((tokens[:, None] == SEQUENCES) | (tokens[:, None] == HIDDEN)).all(-1) * joint
    found = torch.einsum("rn,npl->rpl", fits, torch.nn.functional.one_hot(SEQUENCES, LETTERS).float())
    return found / found.sum(-1, keepdim=True)


def exact_model(joint: Tensor) -> Callable[..., Tensor]:
    def logits(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        found = marginals(tokens[:, 1:], joint).log().take_along_dim((columns - 1)[..., None], 1)
        return torch.cat([found, torch.full_like(found[..., :1], 5.0)], -1)  # the mask's logit, which must not count

    return logits


def sampler_law(joint: Tensor, steps: int) -> Tensor:
    """The exact law of the finished answer [27] under the ancestral chain: all states, all subsets revealed, all tokens."""
    law = {(HIDDEN,) * PLACES: 1.0}
    for step in range(steps):
        share, after = 1 / (steps - step), dict[tuple[int, ...], float]()
        for state, weight in law.items():
            each = marginals(torch.tensor([state]), joint)[0].tolist()
            # What a place becomes, and with what probability.
            ways = [
                [(token, 1.0)]
                if token != HIDDEN
                else [(HIDDEN, 1 - share)] * (share < 1) + [(letter, share * p) for letter, p in enumerate(each[place])]
                for place, token in enumerate(state)
            ]
            for way in product(*ways):
                key = tuple(token for token, _ in way)
                after[key] = after.get(key, 0.0) + weight * math.prod(p for _, p in way)
        law = after
    return torch.tensor([law[tuple(row)] for row in SEQUENCES.tolist()], dtype=torch.float64)


def tilted(law: Tensor, strength: float) -> Tensor:
    found = law.double() * (strength * REWARDS).exp()
    return found / found.sum()


def distance(first: Tensor, second: Tensor) -> float:
    """Total variation."""
    return float((first - second).abs().sum()) / 2


def weighted(out: SteeredText) -> Tensor:
    """The law of the weighted population [27]."""
    rows = torch.tensor(out.selection.rows[0])
    return torch.zeros(len(SEQUENCES), dtype=torch.float64).index_add(0, number(out.tokens[0]), out.selection.weights[0, rows])


def particles(method: FKSteering, joint: Tensor, **more: Any) -> SteeredText:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    return steer_text(method, exact_model(joint), prompt, table_reward, mask_id=HIDDEN, length=PLACES, **more)


K, STEPS = 8_000, 5
ORACLES = {
    "difference": (FKSteering(K, "difference", 1.0, ess=None, select="all"), 4),
    "difference, adaptive": (FKSteering(K, "difference", 1.0, ess=0.95, select="all"), 2),
    "difference, one completion": (FKSteering(K, "difference", 1.0, ess=None, resampling="ssp", select="all"), 1),
    "max": (FKSteering(K, "max", 0.7, start=0.4, ess=None, select="all"), 4),
    "sum": (FKSteering(K, "sum", 0.5, start=0.4, ess=None, select="all"), 4),
}


@pytest.mark.parametrize(("method", "completions"), ORACLES.values(), ids=list(ORACLES))
def test_the_weighted_population_has_the_tilted_probabilities(method: FKSteering, completions: int) -> None:
    """Within 0.04 of total variation; without the tilt it would be 0.18 at least, and from the model's own joint law it is 0.09."""
    law = sampler_law(MARKOV, STEPS)
    assert law.sum() == pytest.approx(1.0, abs=1e-5)
    wanted = tilted(law, method.lambda_)
    # Were these alike, the test could not tell them apart.
    assert distance(wanted, law) > 0.18 and distance(wanted, tilted(MARKOV, method.lambda_)) > 0.09
    out = particles(method, MARKOV, schedule=Ancestral(STEPS), completions=completions)
    assert distance(weighted(out), wanted) < 0.04
    assert out.report.facts["resampled"] >= 1 and out.report.facts["completion lambda"] == method.lambda_


def test_a_factorised_model_is_tilted_whatever_is_revealed_when() -> None:
    """Here one a step in random order, and steps do not matter: the law of the sampler is the product."""
    wanted = tilted(FACTORISED, 1.0)
    assert distance(wanted, FACTORISED.double()) > 0.2
    method = FKSteering(K, "difference", 1.0, start=0.3, ess=0.95, select="all")
    out = particles(method, FACTORISED, schedule=StaticDecoding("random"), completions=2)
    assert distance(weighted(out), wanted) < 0.04


def test_an_ancestral_step_reveals_each_mask_with_probability_t_minus_s_over_t() -> None:
    method = BestOfN(4_000, select="all")
    revealed: list[list[float]] = []

    class Watching:
        needs_noise = False

        def begin(self, run: Run) -> Any:
            controller = method.begin(run)
            told = controller.on_step

            def watched(info: Any) -> Any:
                revealed.append((info.latents != HIDDEN).float().mean(0).tolist())
                return told(info)

            controller.on_step = watched  # type: ignore[method-assign]
            return controller

    prompt = torch.zeros(1, 1, dtype=torch.int64)
    steer_text(Watching(), exact_model(MARKOV), prompt, table_reward, mask_id=HIDDEN, length=PLACES, schedule=Ancestral(4))
    assert len(revealed) == 4
    for step, shares in enumerate(revealed):
        assert shares == pytest.approx([step / 4] * PLACES, abs=0.03)


@given(
    st.lists(st.lists(st.floats(-40, 40) | st.just(-math.inf), min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.3, 2.0, 50.0]),
)
def test_completions_are_averaged_under_the_exponential(values: list[list[float]], strength: float) -> None:
    counts = torch.tensor([len(row) for row in values])
    flat = torch.tensor([value for row in values for value in row], dtype=torch.float64)
    found = soft_mean(flat, torch.arange(len(values)).repeat_interleave(counts), counts, strength)
    for row, mean in zip(values, found.tolist(), strict=True):
        if strength == 0 or max(row) == -math.inf:
            wanted = sum(row) / len(row)
        else:
            most = max(row)
            wanted = most + math.log(sum(math.exp(strength * (value - most)) for value in row) / len(row)) / strength
        assert mean == pytest.approx(wanted, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- against the plain loop

METHODS: list[SteeringMethod] = [
    BestOfN(5, select="all"),
    SuccessiveHalving(),
    FKSteering(particles=6, lambda_=3.0, ess=None, select="all"),
    FKSteering(particles=5, potential="max"),
    SVDD(children=4),
    SVDD(children=3, temperature=0.5),
    CoDe(branches=4, block=3),
]
PROMPTS = torch.tensor([[0, 0, 3, 4, 5], [6, 1, 2, 8, 9]])
PADS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LENGTH = 11


@dataclass
class Counting:
    """A model that notes its rows and whether it was shown the same row twice in a row."""

    model: Model = field(default_factory=lambda: Model(3))
    rows: list[int] = field(default_factory=list)
    shown: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        self.shown += [tuple(row) for row in tokens.tolist()]
        return self.model(tokens, valid, columns)


def evens(answers: Tensor) -> Tensor:
    return (answers % 2 == 0).double().mean(1) + 0.001 * answers[:, 0]


def run(method: SteeringMethod, **more: Any) -> SteeredText:
    arguments: dict[str, Any] = {"prompt_ids": PROMPTS, "prompt_mask": PADS, "eos_id": EOS, "block_length": 4, "aligned": True, "seed": 1}
    arguments |= {"schedule": Ancestral(4), "length": LENGTH, **more}
    model, verifier = arguments.pop("model", Model(3)), arguments.pop("verifier", evens)
    return steer_text(method, model, arguments.pop("prompt_ids"), verifier, mask_id=MASK, **arguments)


def same(first: SteeredText, second: SteeredText) -> bool:
    return first.selection.rows == second.selection.rows and all(map(torch.equal, first.tokens, second.tokens))


SCHEDULES: list[Schedule] = [Ancestral(1), Ancestral(7), StaticDecoding(tokens_per_step=2), StaticDecoding("margin", steps=3)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("block_length", "aligned"), [(None, False), (4, False), (4, True), (3, True)])
def test_particles_that_are_not_steered_are_what_the_decoding_loop_gives(
    schedule: Schedule, block_length: int | None, aligned: bool
) -> None:
    """Blocks, padding, end-of-text and lengths; and no particle depends on how many there are, or on its batch."""
    out = run(BestOfN(5, select="all"), schedule=schedule, block_length=block_length, aligned=aligned)
    seeds = [int(torch.randint(LARGEST_SEED, (1,), generator=stream(1, p, k))) for p in range(2) for k in range(5)]
    plain = decode(
        Model(3),
        PROMPTS.repeat_interleave(5, 0),
        schedule,
        FixedBlocks(block_length or LENGTH, aligned),
        sampling=Sampling(MASK, temperature=1.0),
        length=LENGTH,
        prompt_mask=PADS.repeat_interleave(5, 0),
        eos_id=EOS,
        seeds=seeds,
    )
    for p, rows in enumerate(out.selection.rows):
        assert torch.equal(out.tokens[p], plain.tokens[rows]) and torch.equal(out.lengths[p], plain.lengths[rows])
    assert len({tuple(row) for row in plain.tokens.tolist()}) >= 8 and int(plain.lengths.min()) < LENGTH
    assert out.report.facts["steps"] >= int(plain.forwards.max())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_same_seed_gives_the_same_answers_in_batches_of_any_size(method: SteeringMethod) -> None:
    whole = run(method)
    for size in (1, 3):
        parts = run(method, micro_batch=size)
        assert same(whole, parts) and parts.report.lineage.nodes == whole.report.lineage.nodes
        assert parts.report.meter.spent == whole.report.meter.spent
    assert not same(whole, run(method, seed=2))
    alone = run(method, prompt_ids=PROMPTS[:1], prompt_mask=PADS[:1])
    assert torch.equal(alone.tokens[0], whole.tokens[0])


def test_particles_do_not_depend_on_their_number_nor_on_scorings_when_nothing_is_resampled() -> None:
    many = run(BestOfN(9, select="all"))
    few = [run(BestOfN(3, select="all")), run(FKSteering(3, ess=1e-9, select="all"), completions=2), run(FKSteering(3, ess=1e-9))]
    for p, rows in enumerate(many.selection.rows):
        answers = dict(zip(rows, many.tokens[p].tolist(), strict=True))
        for out in few:
            for row, answer in zip(out.selection.rows[p], out.tokens[p].tolist(), strict=True):
                assert answer == answers[row - 3 * p + 9 * p]


def test_copies_part_and_dead_ends_are_left() -> None:
    """One particle takes over, and its copies go on with the noise of their own slots."""

    def begins_with(answers: Tensor) -> Tensor:
        return (answers[:, :4] == wanted).all(1).double()

    plain = run(BestOfN(8, select="all"), eos_id=None)
    wanted = plain.tokens[0][plain.selection.rows[0].index(5), :4]
    method = FKSteering(8, lambda_=50.0, start=0.5, end=0.5, ess=None, select="all")
    out = run(method, eos_id=None, verifier=begins_with, prompt_ids=PROMPTS[:1], prompt_mask=PADS[:1])
    assert (out.tokens[0][:, :4] == wanted).all()
    assert len({tuple(row) for row in out.tokens[0].tolist()}) == 8 and out.report.lineage.unique_ancestors() == 1


# ------------------------------------------------------------------------------------------------------------ what is spent


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_charged_is_what_was_done(method: SteeringMethod) -> None:
    model, judged = Counting(), []

    def judging(answers: Tensor) -> Tensor:
        assert not (answers == MASK).any()
        judged.append(len(answers))
        return evens(answers)

    out = run(method, model=model, verifier=judging, micro_batch=3, rows_per_step=2)
    spent = out.report.meter.spent
    assert (spent.particle_steps, spent.denoiser_rows) == (sum(model.rows), 2 * sum(model.rows))
    assert spent.decodes == spent.verifier_rows == sum(judged) and max(model.rows) <= 3 >= max(judged)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.integers(1, 200),
    st.integers(1, 60),
    st.sampled_from([Ancestral(2), StaticDecoding("random", tokens_per_step=3)]),
    st.integers(1, 5),
)
def test_no_budget_is_ever_exceeded(method: SteeringMethod, particle_steps: int, rows: int, schedule: Schedule, completions: int) -> None:
    model, judged = Counting(), []

    def judging(answers: Tensor) -> Tensor:
        judged.append(len(answers))
        return evens(answers)

    budget = Budget(particle_steps=particle_steps, verifier_rows=rows)
    options: dict[str, Any] = {"model": model, "verifier": judging, "budget": budget, "schedule": schedule, "completions": completions}
    try:
        out = run(method, **options)
    except BudgetError:
        steps = 2 * 4 if isinstance(schedule, Ancestral) else 4 + 3
        assert particle_steps < 2 * steps or rows < 2
        assert not model.rows
        return
    except SteeringError:
        assert isinstance(method, SuccessiveHalving | FKSteering) and not model.rows
        return
    assert sum(model.rows) <= particle_steps and sum(judged) <= rows
    assert all(len(found) >= 1 and not (found == MASK).any() for found in out.tokens)


def test_dropped_rows_are_not_computed() -> None:
    model = Counting()
    schedule = StaticDecoding(tokens_per_step=1)
    run(
        SuccessiveHalving(),
        model=model,
        schedule=schedule,
        eos_id=None,
        prompt_ids=PROMPTS[:1],
        prompt_mask=None,
        length=20,
        block_length=20,
    )
    assert model.rows == [8] * 7 + [4] * 5 + [2] * 4 + [1] * 4


def test_rows_are_forwarded_when_they_have_changed_and_not_else() -> None:
    """An ancestral chain of 60 steps for 11 tokens forwards a row at most 11 times, and a row that is done no more."""
    model = Counting()
    out = run(BestOfN(1), model=model, schedule=Ancestral(60), block_length=None, aligned=False, prompt_ids=PROMPTS[1:], prompt_mask=None)
    assert 1 < len(model.rows) <= LENGTH and len(set(model.shown)) == len(model.shown)
    assert out.report.meter.spent.particle_steps == len(model.rows)
    ended = Counting(Model(3))
    run(BestOfN(4), model=ended, schedule=StaticDecoding(), verifier=evens)
    assert sum(ended.rows) < 2 * 4 * LENGTH  # some came to their end-of-text early


def test_when_time_is_up_the_completions_are_the_answers() -> None:
    ticks = iter(range(10_000))
    meter = Meter(Budget(seconds=80.0), clock=lambda: float(next(ticks)))
    out = run(FKSteering(4, lambda_=3.0), budget=meter, completions=2)
    assert any("the budget ran out" in warning for warning in out.report.warnings)
    for answers in out.tokens:
        assert answers.shape == (1, LENGTH) and not (answers == MASK).any()
        # Behind the first end-of-text there is nothing else.
        assert all(EOS not in row or set(row[row.index(EOS) :]) == {EOS} for row in answers.tolist())


# --------------------------------------------------------------------------------------------------------------- verifiers


def test_verifiers_take_texts_and_prompts_and_may_return_lists() -> None:
    seen: list[tuple[str, str]] = []

    def words(texts: list[str], prompts: list[str]) -> list[float]:
        seen.extend(zip(texts, prompts, strict=True))
        return [text.count("c") - text.count("d") for text in texts]

    def decoded(answers: Tensor) -> list[str]:
        return ["".join("abcdefghijkl"[token] for token in row) for row in answers.tolist()]

    out = run(FKSteering(3), verifier=words, decode=decoded, prompts=["one", "two"])
    assert {prompt for _, prompt in seen} == {"one", "two"} and all(len(text) == LENGTH and "l" not in text for text, _ in seen)
    for p, answers in enumerate(out.tokens):
        assert words(decoded(answers), [""])[0] == out.report.rewards[p]


def test_the_reward_of_a_particle_is_the_mean_over_its_completions() -> None:
    judged: list[Tensor] = []

    def noting(answers: Tensor) -> Tensor:
        judged.append(evens(answers))
        return judged[-1]

    options: dict[str, Any] = {
        "verifier": noting,
        "prompt_ids": PROMPTS[:1],
        "prompt_mask": None,
        "schedule": StaticDecoding(),
        "eos_id": None,
    }
    cases: list[tuple[SteeringMethod, dict[str, Any], float]] = [
        (FKSteering(3, lambda_=6.0, reward_std=2.0), {}, 3.0),
        (SVDD(3, temperature=0.25), {}, 4.0),
        (SVDD(3), {}, 0.0),
        (SuccessiveHalving(3, ((0.5, 1),)), {"lambda_": 7.0}, 7.0),
    ]
    for method, more, strength in cases:
        judged.clear()
        out = run(method, completions=5, **options, **more)
        first = judged[0]
        wanted = soft_mean(first, torch.arange(3).repeat_interleave(5), torch.tensor([5] * 3), strength)
        nodes = out.report.lineage.nodes[:3]
        assert [node.reward for node in nodes] == pytest.approx(wanted.tolist()) and len(first) == 15
        assert float(first.view(3, 5).std(1).min()) > 0


def test_answers_that_cannot_be_judged_lose() -> None:
    def broken(answers: Tensor) -> Tensor:
        return torch.where(answers[:, 0] < 5, torch.nan, evens(answers))

    every = run(BestOfN(8, select="all"), verifier=evens)
    with pytest.warns(RewardWarning, match="broken returned NaN or infinity for"):
        out = run(BestOfN(8), verifier=broken)
    for p, answers in enumerate(out.tokens):
        assert answers[0, 0] >= 5 and (every.tokens[p][:, 0] < 5).any()
    with pytest.warns(RewardWarning):
        run(FKSteering(4), verifier=lambda answers: torch.full((len(answers),), torch.nan))
    with pytest.raises(VerifierError, match=r"must return one score per answer, shape \[10\], not \[\]"):
        run(BestOfN(5), verifier=lambda answers: evens(answers).mean())
    with pytest.raises(VerifierError, match="must return one number for each answer, not list"):
        run(BestOfN(5), verifier=lambda answers: ["good"] * len(answers))


def test_mixes_of_verifiers_are_scored_over_the_candidate_set() -> None:
    def large(answers: Tensor) -> Tensor:
        return answers.double().sum(1)

    for mix in (WeightedSum((evens, large), (1.0, 0.01)), MeanRank((evens, large))):
        out = run(FKSteering(4), verifier=mix)
        assert same(out, run(FKSteering(4), verifier=mix, micro_batch=2))
        assert out.report.meter.spent.verifier_rows == 2 * out.report.meter.spent.decodes


# ------------------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("error", "message", "method", "more"),
    [
        (ValueError, "length must be a whole number", BestOfN(), {"length": 0}),
        (ValueError, "completions must be a whole number of at least 1, not 0", BestOfN(), {"completions": 0}),
        (ValueError, "lambda_ must be at least 0 and finite", BestOfN(), {"lambda_": -1.0}),
        (ValueError, "prompts must have one text for each of the 2 rows", BestOfN(), {"prompts": ["one"]}),
        (ValueError, "micro_batch must be", BestOfN(), {"micro_batch": 0}),
        (ValueError, "prompt_mask must be of the shape of prompt_ids", BestOfN(), {"prompt_mask": PADS.flip(1)}),
        (ValueError, "prompt_mask must be of the shape of prompt_ids", BestOfN(), {"prompt_mask": PADS[:, 1:]}),
        (ValueError, "prompt_ids must be", BestOfN(), {"prompt_ids": PROMPTS[0]}),
        (ValueError, "schedule must be Ancestral or StaticDecoding", BestOfN(), {"schedule": 4}),
        (ValueError, "temperature must be", BestOfN(), {"temperature": -1.0}),
        (SteeringError, "draws no noise", FKSteering(), {"temperature": 0.0, "schedule": StaticDecoding()}),
        (SteeringError, "too few", SuccessiveHalving(), {"schedule": Ancestral(1), "block_length": None}),
        (BudgetError, "raise particle_steps", BestOfN(), {"budget": Budget(particle_steps=10)}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, method: SteeringMethod, more: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        run(method, **more)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        Ancestral(0)


def test_without_temperature_only_the_order_is_drawn_and_one_completion_is_enough() -> None:
    out = run(FKSteering(3, select="all"), temperature=0.0, schedule=Ancestral(4))
    assert out.report.facts["completions"] == 1 and int(torch.cat(out.tokens).max()) < VOCABULARY
    sure = run(BestOfN(3, select="all"), temperature=0.0, schedule=StaticDecoding())
    assert all(len({tuple(row) for row in answers.tolist()}) == 1 for answers in sure.tokens)
