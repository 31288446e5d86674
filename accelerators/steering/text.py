"""Steering masked diffusion language models: FK steering's text section (arXiv 2501.06848), with any other controller as well.

A particle is an answer with masks in it. A step of the masked chain (MDLM, arXiv 2406.07524) reveals some of them with tokens drawn from
the model, and to estimate what a particle will become, its masks are filled at once, a few times over: the reward is the logarithm of the
mean of exp(lambda * r) over these completions, divided by lambda. Blocks, prompts and end-of-text are those of the decoding loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.generate import Logits, LogitsFn, Loop, Rows, Sequential, begin, check
from hasten.accelerators.decoding.geometry import Extent, FixedBlocks, window
from hasten.accelerators.decoding.models import CausalLM, LanguageModel, adapt
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.controller import Population, Run, Selection, SteeringMethod, StepInfo
from hasten.accelerators.steering.loop import Scorer, checked_micro_batch, micro_batches
from hasten.accelerators.steering.mixes import Mix, Panel
from hasten.accelerators.steering.noise import LARGEST_SEED, NoiseStreams
from hasten.accelerators.steering.report import SearchReport
from hasten.accelerators.steering.verifiers import RewardWarning, Verifier, VerifierError, as_verifier, name_of

COMPLETIONS = 4
"""Completions of each particle at a scoring; the authors' code takes 4 or 16."""


@dataclass(frozen=True)
class Ancestral(Rule):
    """The reverse step of MDLM: every mask of the block is revealed with probability (t - s) / t, whatever the model thinks of it.

    Time runs evenly from 1 to 0 over the steps of a block, as under MDLM's log-linear schedule. A step may reveal nothing; the last one
    reveals all that is left.

    Attributes:
        steps: Of each block. The paper takes 1000 for 128 tokens.

    Raises:
        ValueError: `steps` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps)

    @property
    def wants(self) -> Needs:
        return Needs(lots=True)

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        share = 1 / (self.steps - view.step).clamp(min=1)
        return view.candidates & (view.statistics.score("random") < share[:, None]), memory


@dataclass(frozen=True)
class SteeredText:
    """What a steered run returns.

    Attributes:
        tokens: For every prompt its answers, int64 [n, length], best first; after the first end-of-text there is nothing else.
        lengths: For every prompt int64 [n], tokens up to the first end-of-text, that one included.
        selection: Rows, weights and rewards.
        report: What was done, at what cost.
    """

    tokens: list[Tensor]
    lengths: list[Tensor]
    selection: Selection
    report: SearchReport


@torch.no_grad()
def steer_text(
    method: SteeringMethod,
    model: Any,
    prompt_ids: Tensor,
    verifier: Verifier | Callable[..., Any],
    *,
    mask_id: int,
    length: int,
    schedule: Ancestral | StaticDecoding | None = None,
    temperature: float = 1.0,
    suppressed: Sequence[int] = (),
    block_length: int | None = None,
    aligned: bool | None = None,
    prompt_mask: Tensor | None = None,
    eos_id: int | None = None,
    completions: int = COMPLETIONS,
    lambda_: float | None = None,
    decode: Callable[[Tensor], Any] | None = None,
    prompts: Sequence[str] | None = None,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
) -> SteeredText:
    """Answers prompts with a steering method.

    A row is forwarded only when a token of it has changed, and its logits [length, vocabulary] are kept until then. Completions are drawn
    from these, in blocks that are yet to come as well, and take no forward of their own. In what the controller sees, `latents` are the
    answers with their masks, and `x0` the first completion where there is a scoring, else the same again.

    All prompts take the steps of the one with the most blocks; a row that is done before waits, and costs nothing but its scorings.

    Args:
        method: Settings such as `FKSteering()`.
        model: A model that `hasten.accelerators.decoding.models.adapt` takes, or a `LogitsFn`.
        prompt_ids: int64 [P, n], padded on the left.
        verifier: What is maximised: any callable (or object with `score`) from answers and prompts to one number for each answer. Answers
            are int64 [N, length], or what `decode` makes of them; a list of numbers will do in place of a tensor.
        mask_id: The mask token.
        length: Tokens of an answer.
        schedule: What a step reveals: `Ancestral(steps)`, or the best-ranked masks, `StaticDecoding(score, steps)`. `Ancestral` with as
            many steps as a block has positions unless told.
        temperature: Of the Gumbel noise. 1 samples from the model; at 0 only `Ancestral` and the random order draw anything.
        suppressed: Further ids that are never chosen.
        block_length: Positions of a block, for models that were trained with blocks; the whole answer is one unless told.
        aligned: Whether blocks are counted from the first token of the prompt; for block-causal models they are unless told.
        prompt_mask: bool [P, n], False where there is padding.
        eos_id: End-of-text. A row is done as soon as no mask is left before its first one.
        completions: M of each particle at a scoring. 1 where nothing is drawn or nothing is masked any more.
        lambda_: Of the mean over completions; 0 is the plain mean. Unless told, what the controller weighs with: lambda over the reward's
            standard deviation, one over SVDD's temperature, and 0 where it only ranks.
        decode: From answers, int64 [N, length], to what the verifier is given.
        prompts: What the verifier is told of each prompt; nothing unless told.
        budget: Of the whole call, or a meter that has one. A verifier row is one completion or finished answer.
        seed: A particle's noise depends on it, its prompt and its slot alone.
        micro_batch: Rows at a time in the model and in the verifier; None for all.
        rows_per_step: Model rows that a row counts for; 2 under guidance.

    Raises:
        BudgetError: The budget does not suffice for one answer to every prompt.
        SteeringError: The method needs noise, and there is none at these settings; or there are too few steps for it.
        ValueError: An argument is out of range, or arguments do not go together; the message says which.
        VerifierError: The verifier does not return one number for each answer.
    """
    if prompt_ids.ndim != 2 or not len(prompt_ids):
        raise ValueError(f"prompt_ids must be [prompts, positions] with at least one prompt, not {tuple(prompt_ids.shape)}")
    if prompts is not None and len(prompts) != len(prompt_ids):
        raise ValueError(f"prompts must have one text for each of the {len(prompt_ids)} rows of prompt_ids, not {len(prompts)}")
    check_whole(1, length=length, completions=completions, rows_per_step=rows_per_step)
    if lambda_ is not None and not 0 <= lambda_ < float("inf"):
        raise ValueError(f"lambda_ must be at least 0 and finite, or None for the method's own, not {lambda_!r}")
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        model = adapt(model)
    causal = isinstance(model, LanguageModel) and model.attention == "block-causal"
    context, total = getattr(model, "context", None), prompt_ids.shape[1] + length
    if context is not None and total > context:
        raise ValueError(f"prompt and answer take {total} positions and the model's context has {context}: pass a shorter length")
    if causal and block_length is None:
        raise ValueError("block_length must be given for a block-causal model: it sees blocks of the length it was trained with")
    geometry = FixedBlocks(length if block_length is None else block_length, aligned=causal if aligned is None else aligned)
    schedule = Ancestral(geometry.width(length)) if schedule is None else schedule
    if not isinstance(schedule, Ancestral | StaticDecoding):
        raise ValueError(f"schedule must be Ancestral or StaticDecoding, whose steps are known in advance, not {schedule!r}")
    check(prompt_ids, Sequential(schedule), geometry, length, eos_id)
    sampling = Sampling(mask_id, tuple(suppressed), temperature)
    origin = _origin(prompt_ids, prompt_mask)
    masks = _masks(geometry, origin.tolist(), prompt_ids.shape[1], length)
    random = isinstance(schedule, Ancestral) or schedule.score == "random"

    meter = budget if isinstance(budget, Meter) else Meter(budget or Budget())
    judge = as_verifier(verifier)
    told = [""] * len(prompt_ids) if prompts is None else prompts
    scorer = Scorer(judge if isinstance(judge, Mix) else _PerAnswer(judge), told, meter, decode, checked_micro_batch(micro_batch))
    run = _TextRun(
        len(prompt_ids),
        max(sum(_most_steps(schedule, count) for count in counts) for counts in masks),
        meter,
        seed,
        stochastic=temperature > 0 or random,
        rows_per_step=rows_per_step,
        verifiers=scorer.panel.calls,
        reward_std=Panel(judge).reward_std,
        completions=completions if temperature > 0 else 1,
    )
    controller = _begun(method, run)
    strength = _strength(controller) if lambda_ is None else lambda_
    controller.facts |= {"steps": run.steps, "completions": run.completions, "completion lambda": strength}

    population = _Population(
        Loop(
            _block_causal(model, geometry, prompt_ids.shape[1]) if causal and isinstance(model, CausalLM) else model,
            schedule,
            geometry,
            sampling,
            geometry.width(length),
            eos_id,
        ),
        prompt_ids.repeat_interleave(controller.particles, 0),
        origin.repeat_interleave(controller.particles),
        length,
        _noise_seeds(seed, len(prompt_ids), controller.particles, run.completions),
        meter,
        scorer.micro_batch,
        rows_per_step,
    )
    owners = torch.arange(len(prompt_ids)).repeat_interleave(controller.particles)
    for step in range(run.steps):
        population.forward()
        answers = estimates = population.answers()
        rewards = None
        if controller.scores_at(step):
            estimates, rewards = population.judged(scorer, owners, run.completions, strength)
        action = controller.on_step(StepInfo(step, answers, estimates, rewards))
        if action.index is not None:
            population.copy(action.index)
        if action.alive is not None:
            population.keep(action.alive)
        if action.stop:
            population.finish()
            break
        population.step()
    answers, rewards = population.judged(scorer, owners, 1, 0.0)
    selection = controller.finish(rewards)
    tokens = [answers[rows] for rows in selection.rows]
    # Without end-of-text no token is -1, and an answer is as long as it can be.
    ends = -1 if eos_id is None else eos_id
    lengths = [(((found == ends).cumsum(-1) == 0).sum(-1) + 1).clamp(max=length) for found in tokens]
    return SteeredText(tokens, lengths, selection, controller.report())


# ------------------------------------------------------------------------------------------------------------ the particles


class _Population:
    """The rows that are alive, with the logits of each; which slot of the run a row is, `rows.index` says.

    Two loops share the rows: one takes the steps; the other, to which the answer is a single block, completes it at once.
    """

    def __init__(
        self,
        loop: Loop,
        prompt_ids: Tensor,
        origin: Tensor,
        length: int,
        seeds: Tensor,
        meter: Meter,
        micro_batch: int | None,
        rows_per_step: int,
    ) -> None:
        self.loop, self.length = loop, length
        self.meter, self.micro_batch, self.rows_per_step = meter, micro_batch, rows_per_step
        self.seeds = seeds.to(prompt_ids.device)
        self.completing = replace(loop, schedule=StaticDecoding(steps=1), geometry=FixedBlocks(length), width=length)
        self.rows = begin(loop, prompt_ids, length, origin, seeds[:, 0].tolist())
        self.slots = len(prompt_ids)
        self.stale = torch.ones_like(self.rows.done)
        self.logits: Tensor | None = None

    def answers(self) -> Tensor:
        """int64 [slots, length]; masks in the slots that are not alive."""
        return self._spread(self._answer(self.rows))

    def forward(self) -> None:
        """Runs the model on the rows that have changed."""
        places = (self.stale & ~self.rows.done).nonzero()[:, 0]
        self.meter.charge(Cost(particle_steps=len(places), denoiser_rows=len(places) * self.rows_per_step))
        for part in micro_batches(len(places), self.micro_batch):
            with self.meter.timing("denoise"):
                found, _ = self.completing.forward(self._whole(self.rows.reindex(places[part])))
            if self.logits is None:
                self.logits = found.window.new_zeros(len(self.stale), *found.window.shape[1:])
            self.logits[places[part]] = found.window
        self.stale = torch.zeros_like(self.stale)

    def step(self) -> None:
        """One step of the chain."""
        rows = self.rows
        columns = window(rows.canvas, rows.extent.start, self.loop.width) - rows.canvas.prompt
        with self.meter.timing("denoise"):
            self.rows, _ = self.loop.transition(rows, Logits(self._logits().take_along_dim(columns[..., None], 1)))
        self.stale = (self.rows.canvas.tokens != rows.canvas.tokens).any(-1)

    def copy(self, index: Tensor) -> None:
        """Every slot that is alive goes on from slot `index`, int64 [slots], which is alive too; its noise stays its own."""
        rows = self.rows
        place = torch.full((self.slots,), -1, device=rows.index.device)
        place[rows.index] = torch.arange(len(rows.index), device=rows.index.device)
        source = place[index.to(rows.index.device)[rows.index]]
        self.rows = replace(rows.reindex(source), index=rows.index, seeds=rows.seeds)
        self.logits, self.stale = self._logits()[source], self.stale[source]

    def keep(self, alive: Tensor) -> None:
        """Drops the slots that are not alive, bool [slots]."""
        places = alive.to(self.rows.index.device)[self.rows.index].nonzero()[:, 0]
        self.rows, self.logits, self.stale = self.rows.reindex(places), self._logits()[places], self.stale[places]

    def finish(self) -> None:
        """Takes a completion of each row for its answer."""
        rows, canvas = self.rows, self.rows.canvas
        answers = self._completed(torch.arange(len(rows.index), device=rows.index.device), torch.zeros_like(rows.index))
        canvas = canvas._replace(tokens=torch.cat([canvas.tokens[:, : canvas.prompt], answers], 1))
        self.rows = replace(rows, canvas=canvas, done=torch.ones_like(rows.done))

    def judged(self, scorer: Scorer, owners: Tensor, completions: int, strength: float) -> tuple[Tensor, Tensor]:
        """A completion of each slot, int64 [slots, length], and the rewards [slots] in float64, -inf in the slots that are not alive.

        Args:
            scorer: Judges answers.
            owners: int64 [slots], numbers of the prompts.
            completions: Of each row that is not done.
            strength: Lambda of the mean over them.
        """
        rows = self.rows
        counts = torch.where(rows.done, 1, completions)
        places = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        firsts = counts.cumsum(0) - counts
        lots = torch.arange(len(places), device=counts.device) - firsts[places]
        answers = self._completed(places, lots)
        slots = rows.index.cpu()
        values = scorer.rewards(answers, owners[slots[places.cpu()]])
        rewards = torch.full((self.slots,), -torch.inf, dtype=torch.float64)
        rewards[slots] = soft_mean(values, places.cpu(), counts.cpu(), strength)
        return self._spread(answers[firsts]), rewards

    # ---------------------------------------------------------------------------------------------------------- completions

    def _completed(self, places: Tensor, lots: Tensor) -> Tensor:
        """Completions, int64 [q, length], of the rows at `places`, int64 [q], drawn by their noise number `lots`, int64 [q]."""
        parts = micro_batches(len(places), self.micro_batch)
        return torch.cat([self._complete(places[part], lots[part]) for part in parts])

    def _complete(self, places: Tensor, lots: Tensor) -> Tensor:
        rows = self._whole(self.rows.reindex(places))
        rows = replace(rows, seeds=self.seeds[rows.index, 1 + lots])
        with self.meter.timing("decode"):
            rows, _ = self.completing.transition(rows, Logits(self._logits()[places]))
        return self._answer(rows)

    def _whole(self, rows: Rows) -> Rows:
        """The rows as the completing loop sees them."""
        start = torch.full_like(rows.extent.start, rows.canvas.prompt)
        state = self.completing.schedule.init(len(start), self.length, start.device)
        extent = Extent(start, start, torch.full_like(start, self.length))
        return replace(rows, extent=extent, fresh=torch.ones_like(rows.done), state=state)

    def _logits(self) -> Tensor:
        assert self.logits is not None  # nothing is asked before the first forward
        return self.logits

    def _answer(self, rows: Rows) -> Tensor:
        return rows.canvas.tokens[:, rows.canvas.prompt :]

    def _spread(self, answers: Tensor) -> Tensor:
        """Those of the rows that are alive, in their slots."""
        spread = torch.full((self.slots, self.length), self.loop.sampling.mask_id, device=answers.device)
        spread[self.rows.index] = answers
        return spread


def soft_mean(values: Tensor, places: Tensor, counts: Tensor, strength: float) -> Tensor:
    """log(mean(exp(strength * value))) / strength over each row's values, float64 [r]; at strength 0 its limit, the mean.

    Args:
        values: float64 [q].
        places: int64 [q], the row that each belongs to, ascending.
        counts: int64 [r], values of each row, at least 1.
        strength: At least 0.
    """
    if strength == 0:
        return torch.zeros(len(counts), dtype=torch.float64).index_add(0, places, values) / counts
    grid = torch.full((len(counts), int(counts.max())), -torch.inf, dtype=torch.float64)
    grid[places, torch.arange(len(places)) - (counts.cumsum(0) - counts)[places]] = strength * values
    return (grid.logsumexp(1) - counts.double().log()) / strength


# ----------------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class _TextRun(Run):
    """A run whose estimates are judged by several completions each.

    Attributes:
        completions: Of a particle at a scoring.
    """

    completions: int = 1

    def cost(self, particle_steps: int, scored: int) -> Cost:
        """At most. Controllers count finished samples among those that are scored, one at least, and these are judged as they are."""
        finished = min(scored, 1)
        return super().cost(particle_steps, finished + (scored - finished) * self.completions)


def _begun(method: SteeringMethod, run: _TextRun) -> Population:
    """The controller, which may count on cheap scorings where it judges nothing but finished samples."""
    controller = method.begin(replace(run, completions=1))
    return method.begin(run) if any(map(controller.scheduled, range(run.steps))) else controller


def _strength(controller: Population) -> float:
    """Lambda of the exp(lambda * reward) that a controller weighs with; 0 where it only ranks."""
    temperature = getattr(controller, "temperature", None)
    return float(getattr(controller, "strength", 0.0) if temperature is None else 1 / temperature)


def _noise_seeds(seed: int, prompts: int, particles: int, completions: int) -> Tensor:
    """int64 [slots, 1 + completions]: of each slot's own steps, which no other argument changes, and of its completions."""
    generators = NoiseStreams(seed, prompts, particles).generators
    sizes = (1, completions)
    return torch.stack([torch.cat([torch.randint(LARGEST_SEED, (size,), generator=each) for size in sizes]) for each in generators])


def _origin(prompt_ids: Tensor, prompt_mask: Tensor | None) -> Tensor:
    """The first column of each prompt, int64 [P]."""
    prompt = prompt_ids.shape[1]
    if prompt_mask is None:
        return torch.zeros(len(prompt_ids), dtype=torch.int64, device=prompt_ids.device)
    origin = prompt - prompt_mask.sum(-1)
    if not torch.equal(prompt_mask.bool(), torch.arange(prompt, device=prompt_ids.device) >= origin[:, None]):
        raise ValueError("prompt_mask must be of the shape of prompt_ids, False for padding on the left and True from there on")
    return origin


def _masks(geometry: FixedBlocks, origins: Sequence[int], prompt: int, length: int) -> list[list[int]]:
    """For every prompt the masks of each block."""
    size, found = geometry.width(length), []
    for origin in origins:
        first = min(length, size - (prompt - origin) % size if geometry.aligned else size)
        whole, rest = divmod(length - first, size)
        found.append([first] + [size] * whole + [rest] * (rest > 0))
    return found


def _most_steps(schedule: Ancestral | StaticDecoding, masks: int) -> int:
    """Steps that a block takes at most."""
    if isinstance(schedule, Ancestral):
        return schedule.steps
    return -(-masks // schedule.tokens_per_step) if schedule.steps is None else min(schedule.steps, masks)


def _block_causal(model: CausalLM, geometry: FixedBlocks, prompt: int) -> LogitsFn:
    """The model under the mask that it was trained with."""
    size = geometry.width(0)

    def logits(tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        every = torch.arange(tokens.shape[1], device=tokens.device)
        origin = valid.int().argmax(-1, keepdim=True)
        block = (every - (origin if geometry.aligned else prompt)).div(size, rounding_mode="floor").expand(len(tokens), -1)
        # Padding sees the first token: seeing nothing would give NaN.
        seen = valid[:, None] & (block[:, None] <= block[..., None]) | (every == origin)[:, None]
        return model.read(tokens, seen, (every - origin).clamp(min=0), (columns - model.lead).clamp(min=0))

    return logits


@dataclass(frozen=True)
class _PerAnswer:
    """A verifier of texts or tokens, which may return a list, as the scorer takes it."""

    verifier: Verifier
    differentiable = False
    range_hint = None

    def score(self, answers: Any, prompts: Sequence[str]) -> Tensor:
        """float64 [N], NaN and +inf replaced by -inf with a warning: such an answer loses."""
        found: Any = self.verifier.score(answers, prompts)
        try:
            scores = torch.as_tensor(found, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise VerifierError(f"{name_of(self.verifier)} must return one number for each answer, not {type(found).__name__}") from error
        if scores.shape != (len(prompts),):
            raise VerifierError(
                f"{name_of(self.verifier)} must return one score per answer, shape [{len(prompts)}], not {list(scores.shape)}"
            )
        broken = scores.isnan() | scores.isposinf()
        if broken.any():
            warnings.warn(
                f"{name_of(self.verifier)} returned NaN or infinity for {int(broken.sum())} of {len(prompts)} answers; they lose (-inf)",
                RewardWarning,
                stacklevel=2,
            )
        return torch.where(broken, -torch.inf, scores)
