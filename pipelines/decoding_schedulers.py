"""Decoding schedules as schedulers of diffusers, for a pipeline that stays as it is: `pipe.scheduler = CreditDecoding(threshold=0.9)`.

`LLaDA2Pipeline` hands each step the block's logits and tokens, and writes what comes back. That is enough for every schedule but WINO,
which must run the model on a shadow block. `DiffusionGemmaPipeline` has no mask token: there, what is not committed is drawn anew at
random, and which positions are committed is remembered here.

How these schedulers differ from `BlockRefinementScheduler`: the mask token is never committed; a block ends with the step that settles it,
without a forward more; a row that has ended holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from hasten.accelerators.decoding import ccd, credit, editing, entropy_bound, factor, hierarchical, klass, rcr, saber, static, threshold
from hasten.accelerators.decoding.noise import Key
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Memory, Needs, Parts, Rule, Schedule, State, View
from hasten.accelerators.decoding.statistics import Sampling, Score, Statistics, measure, truncated

SEEDS = 2**62
"""Seeds of rows are drawn below this from the caller's generator."""


@dataclass
class DecodingSchedulerOutput(BaseOutput):
    """What a step returns; the fields of diffusers' `BlockRefinementSchedulerOutput`.

    Attributes:
        prev_sample: int64 [R, K], the block's tokens after the step.
        transfer_index: bool [R, K], masked positions that were committed.
        editing_transfer_index: bool [R, K], positions that were edited, or masked again.
        sampled_tokens: int64 [R, K], what would have been committed.
        sampled_probs: float32 [R, K], their probabilities.
        pred_logits: [R, K, V], the logits that were given.
    """

    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


@dataclass(frozen=True)
class Pace(Rule):
    """Another rule that commits in each step at least the even share of a block: its length over the steps, one more in the first ones.

    Attributes:
        rule: The other rule.
        length: Positions of a block.
        steps: Steps that it is spread over.
    """

    rule: Rule
    length: int
    steps: int

    @property
    def wants(self) -> Needs:
        return self.rule.wants

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return self.rule.initial(rows, length, device)

    def asks(self, memory: Memory) -> Tensor | None:
        return self.rule.asks(memory)

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        commits, memory = self.rule.choose(view, memory)
        share, more = divmod(self.length, self.steps)
        score: Score = getattr(self.rule, "score", "low_confidence")
        return commits | top(view.statistics.score(score), view.candidates, share + (view.step < more).long()), memory


@dataclass(frozen=True)
class Paced(Schedule):
    """A schedule whose rule keeps a pace; `length` and `steps` as in `Pace`."""

    schedule: Schedule
    length: int
    steps: int

    @cached_property
    def parts(self) -> Parts:
        parts = self.schedule.parts
        return replace(parts, rule=Pace(parts.rule, self.length, self.steps))


# Pipelines load their parts by looking up the base class, `SchedulerMixin`, in the module of the part.
class DecodingScheduler(SchedulerMixin, ConfigMixin):
    """A schedule as a scheduler; the classes below are one schedule each.

    Settings are those of the schedule, by keyword, and `block_length`, which a pipeline takes where the call says nothing. They are saved
    and loaded as diffusers does it, and they hold whatever the pipeline passes: its own `threshold`, `editing_threshold` and
    `minimal_topk` always have a value, meant or not, and are not read. Where a schedule stands on another one, `rule` takes that one's
    scheduler: `EditingDecoding(rule=CreditDecoding(threshold=0.7))`.

    `num_inference_steps` of a call is the slowest pace: each step commits at least block_length / num_inference_steps tokens. It is no
    limit, since a block is never left with masks in it. `temperature`, `top_k`, `top_p`, `sampling_method` and `generator` are obeyed; the
    noise is keyed by row, position and step, and the generator only gives each row its seed.

    Attributes:
        key: The schedule's name.
        method: What makes the schedule from its settings.
        schedule: The schedule.

    Raises:
        ValueError: A setting is out of range.
        TypeError: There is no such setting.
    """

    order = 1
    key: ClassVar[str]
    method: ClassVar[Callable[..., Schedule]]

    def __init_subclass__(cls, *, key: str, method: Callable[..., Schedule], **options: Any) -> None:
        super().__init_subclass__(**options)
        settings = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(method).parameters.values()]
        settings.append(Parameter("block_length", Parameter.KEYWORD_ONLY, default=32, annotation=int))
        known = Signature([Parameter("self", Parameter.POSITIONAL_ONLY), *settings])

        def __init__(self: DecodingScheduler, **given: Any) -> None:
            bound = known.bind(self, **given)
            bound.apply_defaults()
            self._configure(**bound.kwargs)

        # diffusers reads from the signature which entries of a configuration file are settings.
        __init__.__dict__["__signature__"] = known
        cls.key, cls.method, cls.__init__ = key, staticmethod(method), __init__  # type: ignore[method-assign, assignment]

    def _configure(self, *, block_length: int, **settings: Any) -> None:
        if type(block_length) is not int or block_length < 1:
            raise ValueError(f"block_length must be a whole number of at least 1, not {block_length!r}")
        if isinstance(settings.get("rule"), DecodingScheduler):
            settings["rule"] = settings["rule"]._described()
        self.register_to_config(block_length=block_length, **settings)
        self.schedule: Schedule = _made(type(self), settings)
        self.num_inference_steps = block_length
        self.timesteps = torch.arange(block_length - 1, -1, -1)
        self._paced: Schedule = self.schedule
        self._forget()

    def _described(self) -> dict[str, Any]:
        """What another scheduler's `rule` remembers of this one."""
        return {"schedule": self.key, **{name: self.config[name] for name in signature(type(self).method).parameters}}

    def _forget(self) -> None:
        self._state: State | None = None
        self._seeds: Tensor | None = None
        self._settled = torch.zeros(0, dtype=torch.bool)
        self._committed = torch.zeros(0, 0, dtype=torch.bool)
        self._clock = 0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None) -> None:
        """Prepares for a call of the pipeline.

        Args:
            num_inference_steps: Slowest pace: steps that a block may take where nothing is ever sure.
            device: Of `timesteps`.
            block_length: Positions of a block; the configured ones unless told.

        Raises:
            ValueError: A number is below 1.
        """
        length = self.config.block_length if block_length is None else block_length
        for name, value in (("num_inference_steps", num_inference_steps), ("block_length", length)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        # Every rule commits one position at least, so that a pace of one changes nothing.
        self._paced = self.schedule if num_inference_steps >= length else Paced(self.schedule, length, num_inference_steps)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DecodingSchedulerOutput | tuple[Tensor, ...]:
        """One step in a block.

        Args:
            model_output: [R, K, V], logits of the block.
            timestep: Steps of this block before; 0 begins a new one.
            sample: int64 [R, K], the block's tokens.
            mask_token_id: The mask token. None is uniform noise: each position has some token, and those not committed are drawn anew.
            temperature: 0 takes the most probable tokens.
            top_p, top_k: Cut the distribution that is drawn from; None, and 1 or 0, leave it whole.
            sampling_method: "greedy" takes the most probable tokens whatever the temperature.
            threshold, editing_threshold, minimal_topk: Not read; the scheduler has its own.
            prompt_mask: bool [K], positions that belong to the prompt.
            generator: Gives the rows their seeds, once in a call, and draws uniform noise.
            return_dict: False gives the output's fields as a tuple.

        Raises:
            ValueError: A value is out of range.
        """
        place, mask_id = int(timestep), model_output.shape[-1] if mask_token_id is None else mask_token_id
        if place == 0 or self._state is None or self._committed.shape != sample.shape:
            self._state = self._paced.init(len(sample), sample.shape[1], sample.device)
            self._settled = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
            self._committed = torch.zeros_like(sample, dtype=torch.bool)
        current = sample.masked_fill(~self._committed, mask_id) if mask_token_id is None else sample
        greedy = sampling_method == "greedy"
        statistics = self._measured(model_output, current, mask_id, 0.0 if greedy else temperature, top_k, top_p, generator, self._state)
        # The pipeline goes on until the last row is done; those that are must not change any more.
        active = (~self._settled[:, None]).expand_as(sample)
        if prompt_mask is not None:
            active = active & ~prompt_mask
        decision, self._state = self._paced.select(statistics, self._state, active)
        self._settled = self._settled | decision.settled
        self._clock += 1
        after, commits = decision.apply(current, mask_id), decision.commits
        if mask_token_id is None:
            if place + 1 >= self.num_inference_steps:
                left = after == mask_id
                after, commits = torch.where(left, decision.tokens, after), commits | left
            self._committed = after != mask_id
            noise = torch.randint(mask_id, after.shape, device=after.device, generator=generator)
            after = torch.where(self._committed, after, noise)
        edits = decision.edits | decision.remasks
        output = DecodingSchedulerOutput(after, commits, edits, decision.tokens, statistics.p, model_output)
        return output if return_dict else output.to_tuple()

    def _measured(
        self,
        logits: Tensor,
        current: Tensor,
        mask_id: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
        state: State,
    ) -> Statistics:
        schedule, (rows, length), device = self._paced, current.shape, current.device
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0, not {temperature!r}")
        key = None
        if temperature > 0 or schedule.needs.lots:
            if self._seeds is None or len(self._seeds) != rows:
                drawn = torch.randint(SEEDS, (rows,), generator=generator, device=device if generator is None else generator.device)
                self._seeds = drawn.to(device)
            steps = torch.full((rows,), self._clock, device=device)
            key = Key(self._seeds, torch.arange(length, device=device), steps)
        if temperature > 0:
            logits = logits.float() / temperature
            if mask_id < logits.shape[-1]:  # it must not take up a place among the top k
                logits[..., mask_id].fill_(-torch.inf)
            logits = truncated(logits, top_k=top_k or None, top_p=None if top_p is None or top_p >= 1 else top_p)
        return measure(
            logits,
            current,
            Sampling(mask_id, temperature=1.0 if temperature > 0 else 0.0),
            key=key,
            probes=schedule.probes(state),
            top=schedule.needs.top,
            lots=schedule.needs.lots,
        )

    def check_eos_finished(
        self,
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """Rows that have ended, bool [R]: nothing is masked before their first generated end-of-text.

        It does not matter in which step that was committed: a mask in front of it may be filled later.

        Args:
            cur_x: int64 [R, L], all tokens up to the end of the present block.
            sampled_tokens, final_transfer: Of this step; not read.
            finished: bool [R], rows that had ended before.
            eos_token_id, mask_token_id: End-of-text and mask token.
            prompt_length: Positions of the prompt.
        """
        answer = cur_x[:, prompt_length:]
        ends = answer == eos_token_id
        masked = (answer == mask_token_id) & (ends.cumsum(-1) == 0)
        return finished | ends.any(-1) & ~masked.any(-1)

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool | Tensor,
        editing_enabled: bool,
        editing_transfer_index: Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,
    ) -> bool:
        """Whether the block needs another step: a row that has not ended is not settled yet.

        Args:
            step_idx, editing_enabled, editing_transfer_index: Not read.
            masks_remaining: Whether there were masks in the block before this step.
            post_steps, max_post_steps: Steps that found no mask, and how many of them the call allows.
            finished: bool [R], rows that have ended.
        """
        if not masks_remaining and post_steps > max_post_steps:
            return False
        return not bool((self._settled | finished).all())


def _editing(
    threshold: float = 0.7, editing_threshold: float | None = 0.5, max_post_steps: int = 16, rule: Schedule | None = None
) -> Schedule:
    return editing.TokenEditing(editing_threshold, _threshold_rule(threshold) if rule is None else rule, max_post_steps)


def _rcr(score: Score = "low_confidence", rule: Schedule | None = None) -> Schedule:
    return rcr.RCR(score, static.StaticDecoding() if rule is None else rule)


_threshold_rule = threshold.ThresholdDecoding


class StaticDecoding(DecodingScheduler, key="static", method=static.StaticDecoding):
    """A fixed number of tokens a step (LLaDA, arXiv 2502.09992); settings of `accelerators.decoding.static`."""


class ThresholdDecoding(DecodingScheduler, key="threshold", method=_threshold_rule):
    """What the model is sure of (Fast-dLLM, arXiv 2505.22618); settings of `accelerators.decoding.threshold`."""


class FactorDecoding(DecodingScheduler, key="factor", method=factor.FactorDecoding):
    """The more at once, the surer (Fast-dLLM, arXiv 2505.22618); settings of `accelerators.decoding.factor`."""


class HierarchicalDecoding(DecodingScheduler, key="hierarchical", method=hierarchical.HierarchicalDecoding):
    """Spread out over the block (dInfer, arXiv 2510.08666); settings of `accelerators.decoding.hierarchical`."""


class EntropyBoundDecoding(DecodingScheduler, key="entropy-bound", method=entropy_bound.EntropyBoundDecoding):
    """Bounded mutual information (EB-sampler, arXiv 2505.24857); settings of `accelerators.decoding.entropy_bound`."""


class KLASSDecoding(DecodingScheduler, key="klass", method=klass.KLASS):
    """Stable and sure (KLASS, arXiv 2511.05664); settings of `accelerators.decoding.klass`."""


class CCDDecoding(DecodingScheduler, key="ccd", method=ccd.CCD):
    """Averages over the history (CCD, arXiv 2512.02044); settings of `accelerators.decoding.ccd`."""


class CreditDecoding(DecodingScheduler, key="credit", method=credit.CreditDecoding):
    """Credit for what persists (CreditDecoding, arXiv 2510.06133); settings of `accelerators.decoding.credit`."""


class SaberDecoding(DecodingScheduler, key="saber", method=saber.Saber):
    """Adaptive threshold with backtracking (Saber, arXiv 2510.18165); settings of `accelerators.decoding.saber`."""


class RCRDecoding(DecodingScheduler, key="rcr", method=_rcr):
    """Remasking by running confidence (MDPO, arXiv 2508.13148); settings of `accelerators.decoding.rcr`."""


class EditingDecoding(DecodingScheduler, key="editing", method=_editing):
    """Token editing (LLaDA2.1, arXiv 2602.08676).

    Settings of `accelerators.decoding.editing`, whose threshold is `editing_threshold` here; `threshold` is that of the filling rule,
    which `rule` takes the place of. The pipeline's own `max_post_steps` is a limit as well.
    """


SCHEDULERS: dict[str, type[DecodingScheduler]] = {
    cls.key: cls
    for cls in (
        StaticDecoding,
        ThresholdDecoding,
        FactorDecoding,
        HierarchicalDecoding,
        EntropyBoundDecoding,
        KLASSDecoding,
        CCDDecoding,
        CreditDecoding,
        SaberDecoding,
        RCRDecoding,
        EditingDecoding,
    )
}
"""All schedulers by name."""


def decoding_scheduler(name: str, **settings: Any) -> DecodingScheduler:
    """The scheduler of a schedule.

    Args:
        name: One of `SCHEDULERS`.
        settings: Of its class.

    Raises:
        ValueError: There is no such schedule, or a setting is out of range.
        TypeError: There is no such setting.
    """
    return _class_of(name)(**settings)


def _class_of(name: Any) -> type[DecodingScheduler]:
    if name == "wino":
        raise ValueError("schedule 'wino' runs the model on a shadow block, which no scheduler can ask of its pipeline")
    if name not in SCHEDULERS:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULERS)}, not {name!r}")
    return SCHEDULERS[name]


def _made(cls: type[DecodingScheduler], settings: Mapping[str, Any]) -> Schedule:
    """The schedule of some settings, in which another one may be described."""
    rule = settings.get("rule")
    if rule is None:
        return cls.method(**settings)
    if not isinstance(rule, Mapping) or "schedule" not in rule:
        raise ValueError(f"rule must be a decoding scheduler, or its description with 'schedule' and settings, not {rule!r}")
    inner = _made(_class_of(rule["schedule"]), {name: value for name, value in rule.items() if name != "schedule"})
    return cls.method(**{**settings, "rule": inner})
