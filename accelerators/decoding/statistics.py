"""What a schedule sees of the logits: a few numbers for each position, from one pass over the vocabulary.

Every rule works on these alone, never on [rows, positions, vocabulary]; a fused kernel that returns the same numbers can stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.noise import Key, gumbel, uniform
from hasten.accelerators.fusing import fuses
from hasten.kernels import ops
from hasten.kernels.arguments import Noise

Score = Literal["low_confidence", "margin", "entropy", "random"]
"""How positions are ranked: by p of the chosen token, p1 - p2, the negative entropy, or by lot."""

_LOWEST = torch.finfo(torch.float32).min


def check_score(name: str) -> None:
    """Raises ValueError where there is no such score."""
    if name not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}, not {name!r}")


def check_probability_score(name: str) -> None:
    """Raises ValueError where the score cannot be held against a threshold between 0 and 1."""
    check_score(name)
    if name not in ("low_confidence", "margin"):
        why = "is at most 0" if name == "entropy" else "says nothing of the model's confidence"
        raise ValueError(f"score={name!r} {why} and cannot be compared with a probability; low_confidence and margin can")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from logits.

    Attributes:
        mask_id: The mask token; it is never chosen.
        suppressed: Further ids that are never chosen, such as padding.
        temperature: Of the Gumbel noise; 0 takes the most probable token.
        tempered: Confidences come from the softmax at `temperature` (as in Dream and diffusers), not from the plain one (as in LLaDA).

    Raises:
        ValueError: A value is out of range.
    """

    mask_id: int
    suppressed: tuple[int, ...] = ()
    temperature: float = 0.0
    tempered: bool = False

    def __post_init__(self) -> None:
        for token in (self.mask_id, *self.suppressed):
            if type(token) is not int or token < 0:
                raise ValueError(f"mask_id and suppressed must be token ids of at least 0, not {token!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0, not {self.temperature!r}")
        if self.tempered and self.temperature == 0:
            raise ValueError("tempered=True needs a temperature above 0: at 0 every confidence would be 1")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Numbers of each position, [R, W] unless told otherwise; probabilities are float32.

    Attributes:
        current: int64, the tokens that the model was shown.
        masked: bool, where `current` is the mask.
        tokens: int64, the chosen tokens, never the mask. Ties go to the lowest id.
        log_p: Log-probability of `tokens`.
        best: int64, the most probable tokens; the same as `tokens` at temperature 0.
        log_p1: Log-probability of `best`.
        p2: The second largest probability.
        entropy: In nats.
        logsumexp: Of the logits.
        p_current: Probability of `current`; 0 where that is the mask or otherwise suppressed.
        probe_log_p: [R, W, J] log-probabilities of the ids that the schedule asked for; -inf where the id was -1.
        top_ids, top_log_p: [R, W, K] the K most probable tokens; -1 and -inf where the vocabulary has fewer.
        uniform: A number in (0, 1) by lot.
        shadow: Probability of `current` as seen by who cannot see it (WINO's shadow block).
        token_noise, best_noise, probe_noise: Temperature times Gumbel noise at these tokens; None at temperature 0.
    """

    current: Tensor
    masked: Tensor
    tokens: Tensor
    log_p: Tensor
    best: Tensor
    log_p1: Tensor
    p2: Tensor
    entropy: Tensor
    logsumexp: Tensor
    p_current: Tensor
    probe_log_p: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_p: Tensor | None = None
    uniform: Tensor | None = None
    shadow: Tensor | None = None
    token_noise: Tensor | None = None
    best_noise: Tensor | None = None
    probe_noise: Tensor | None = None

    @property
    def p(self) -> Tensor:
        """Probability of `tokens`."""
        return self.log_p.exp()

    @property
    def p1(self) -> Tensor:
        """The largest probability."""
        return self.log_p1.exp()

    def reindex(self, rows: Tensor) -> Statistics:
        """Those of the given rows, int64 [n]."""
        return self.map(lambda value: value[rows])

    def map(self, f: Callable[[Tensor], Tensor]) -> Statistics:
        """The same with `f` of each tensor."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else f(value) for name, value in found.items()}
        return Statistics(**changed)

    def score(self, name: Score) -> Tensor:
        """Ranking score [R, W], higher commits earlier; not a number counts as the lowest.

        Raises:
            ValueError: It is "random" and the statistics were measured without lots.
        """
        if name == "low_confidence":
            found = self.p
        elif name == "margin":
            found = self.p1 - self.p2
        elif name == "entropy":
            found = -self.entropy
        elif self.uniform is not None:
            found = self.uniform
        else:
            raise ValueError("score='random' needs statistics that were measured with lots=True")
        return found.nan_to_num(nan=_LOWEST, neginf=_LOWEST)


def measure(
    logits: Tensor,
    current: Tensor,
    sampling: Sampling,
    *,
    key: Key | None = None,
    probes: Tensor | None = None,
    top: int = 0,
    lots: bool = False,
    shadow: Tensor | None = None,
) -> Statistics:
    """Statistics of logits, in float32 whatever their type.

    What is not a number counts as the smallest finite logit, as does -inf, and +inf as the largest: a position of nothing else is uniform
    over the tokens allowed.

    Args:
        logits: [R, W, V].
        current: int64 [R, W], the tokens that the model was shown.
        sampling: How tokens are chosen.
        key: What the noise belongs to; needed at a temperature above 0 and for lots.
        probes: int64 [R, W, J] ids whose log-probability is wanted; -1 for none.
        top: Length K of the list of the most probable tokens.
        lots: Whether to draw `uniform`.
        shadow: [R, W, V] logits of positions that cannot see their own token.

    Raises:
        ValueError: Shapes disagree, no token is allowed, or there is noise without a key.
    """
    if logits.ndim != 3 or current.shape != logits.shape[:2]:
        raise ValueError(f"logits must be [rows, positions, vocabulary] for current, not {tuple(logits.shape)} for {tuple(current.shape)}")
    if (sampling.temperature > 0 or lots) and key is None:
        raise ValueError(f"temperature={sampling.temperature} and lots={lots} need a key, which says whose noise it is")
    if probes is None and not top and logits.dtype in ops.STREAMS and fuses(logits, current):
        return _fused(logits, current, sampling, key, lots, shadow)
    z = _cleaned(logits, sampling)
    largest, best = z.max(-1)
    log_sum = (z - largest[..., None]).exp().sum(-1).log()
    # The largest is taken off first: a logit of 1e30 would leave nothing of a log-probability otherwise.
    log_p = (z - largest[..., None]) - log_sum[..., None]
    vocabulary = z.shape[-1]
    entropy = -(log_p.exp() * log_p.clamp(min=_LOWEST)).sum(-1)

    def at(values: Tensor, ids: Tensor) -> Tensor:
        """Values [R, W, V] at ids [R, W, J]; -inf where an id is no token."""
        inside = (ids >= 0) & (ids < vocabulary)
        return values.gather(-1, ids.clamp(0, vocabulary - 1)).masked_fill(~inside, -torch.inf)

    if sampling.temperature == 0 or key is None:
        tokens, noise = best, None
    else:
        noise = gumbel(key, vocabulary) * (1.0 if sampling.tempered else sampling.temperature)
        tokens = (log_p + noise).argmax(-1)
    top_log_p, top_ids = log_p.topk(min(top, vocabulary), -1) if top else (None, None)
    if top_log_p is not None and top_ids is not None and top > vocabulary:
        missing = (0, top - vocabulary)
        top_log_p = torch.nn.functional.pad(top_log_p, missing, value=-torch.inf)
        top_ids = torch.nn.functional.pad(top_ids, missing, value=-1)
    shown = current[..., None]
    return Statistics(
        current=current,
        masked=current == sampling.mask_id,
        tokens=tokens,
        log_p=at(log_p, tokens[..., None])[..., 0],
        best=best,
        log_p1=-log_sum,
        p2=log_p.scatter(-1, best[..., None], -torch.inf).amax(-1).exp(),
        entropy=entropy,
        logsumexp=largest + log_sum,
        p_current=at(log_p, shown)[..., 0].exp(),
        probe_log_p=None if probes is None else at(log_p, probes),
        top_ids=top_ids,
        top_log_p=top_log_p,
        uniform=uniform(key) if lots and key is not None else None,
        shadow=None if shadow is None else at(_cleaned(shadow, sampling).log_softmax(-1), shown)[..., 0].exp(),
        token_noise=None if noise is None else at(noise, tokens[..., None])[..., 0],
        best_noise=None if noise is None else at(noise, best[..., None])[..., 0],
        probe_noise=None if noise is None or probes is None else at(noise, probes),
    )


def _fused(logits: Tensor, current: Tensor, sampling: Sampling, key: Key | None, lots: bool, shadow: Tensor | None) -> Statistics:
    """The same from one launch, where no more of the vocabulary is asked for."""
    suppressed = _suppressed(logits, sampling)
    divisor, scale = (sampling.temperature, 1.0) if sampling.tempered else (1.0, sampling.temperature)
    noise = None if sampling.temperature == 0 or key is None else Noise(scale, *key)
    seen = ops.token_stats(logits, current, suppressed, divisor=divisor, noise=noise)._asdict()
    if noise is None:
        seen |= {"token_noise": None, "best_noise": None}
    lot = uniform(key) if lots and key is not None else None
    hidden = None if shadow is None else ops.token_stats(shadow, current, suppressed, divisor=divisor).p_current
    return Statistics(current=current, masked=current == sampling.mask_id, uniform=lot, shadow=hidden, **seen)


def _suppressed(logits: Tensor, sampling: Sampling) -> list[int]:
    """Ids that are never chosen, ascending."""
    suppressed, vocabulary = {sampling.mask_id, *sampling.suppressed}, logits.shape[-1]
    if len({token for token in suppressed if token < vocabulary}) == vocabulary:
        raise ValueError(f"every token of a vocabulary of {vocabulary} is suppressed")
    return sorted(suppressed)


def _cleaned(logits: Tensor, sampling: Sampling) -> Tensor:
    """float32 logits, tempered where wanted, without NaN, and -inf only where a token is suppressed."""
    suppressed = _suppressed(logits, sampling)
    z = logits.float()
    if sampling.tempered:
        z = z / sampling.temperature
    z = z.nan_to_num(nan=_LOWEST)  # and infinities become the largest finite numbers
    for token in suppressed:
        # One fill for each id: an index tensor would be copied to the device at every step.
        if token < logits.shape[-1]:
            z[..., token].fill_(-torch.inf)
    return z


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance as in LLaDA: u + (scale + 1)(c - u); `scale` 0 is no guidance. Shapes [R, W, V], before `measure`."""
    return unconditional + (scale + 1) * (conditional - unconditional)


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits [R, W, V] with -inf outside the `top_k` most probable tokens and outside the least set that holds `top_p` of the mass.

    As in diffusers, top-k goes first, and the token that crosses `top_p` is kept. Temperature comes before: divide the logits.

    Raises:
        ValueError: A value is out of range.
    """
    if top_k is not None:
        check_whole(1, top_k=top_k)
        if top_k < logits.shape[-1]:
            least = logits.topk(top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p!r}")
        ordered, order = logits.float().sort(-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the mass of those before
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits
