"""`hasten bench decoding`: every decoding schedule on `puzzles`, for accuracy and for tokens per forward.

All schedules answer the same prompts, which training never saw, and an exact checker says which answers are right. Tokens are counted up
to the end-of-text, that one included; forwards until the row is done. A front of several settings stands for each schedule, and each is
held against threshold decoding at the same number of tokens per forward.

    python -m hasten.benchmarks.decoding --quick
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.decoding.adablock import AdaBlock
from hasten.accelerators.decoding.ccd import CCD
from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.entropy_bound import EntropyBoundDecoding
from hasten.accelerators.decoding.factor import FactorDecoding
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.generate import Decoded, Executor, decode
from hasten.accelerators.decoding.geometry import FixedBlocks, Geometry
from hasten.accelerators.decoding.hierarchical import HierarchicalDecoding
from hasten.accelerators.decoding.klass import KLASS
from hasten.accelerators.decoding.rcr import RCR
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO
from hasten.benchmarks import decoding_speed
from hasten.benchmarks.decoding_page import comparison_table, page, pictures, rows_table
from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Results,
    bars_table,
    command_line,
    conduct,
    paired_difference,
    publish,
    read_results,
    refused,
    results_page,
    steady_memory,
    surroundings,
    wilson,
)
from hasten.pipelines.text import TextPipeline
from hasten.pipelines.zoo.puzzles import BLOCK_LENGTH, GEN_LENGTH, TASKS, check, load_puzzles, validation_puzzles

SPEEDUP, POINTS, SOLVED, WORSE, FEWER_FORWARDS = 3.0, 1.0, 0.9, 0.1, 1.3
"""The bars: tokens per forward over static, points of accuracy that may be lost for it, what static decoding must solve of each task, how
much less a block at once must solve, and static's forwards over FreeDave's."""

STATIC, THRESHOLD = "static", "threshold"
SEED = 3
"""Of the prompts: neither those that training was watched with nor those of the model's card."""

NAME = "decoding"
PAGE = results_page(NAME)

ONE, AT_ONCE = StaticDecoding(), StaticDecoding(steps=1)


@dataclass(frozen=True)
class Entry:
    """A setting of a schedule."""

    family: str
    text: str
    schedule: Schedule | Executor


ENTRIES = (
    Entry(STATIC, "1 token a step", ONE),
    *(Entry(STATIC, f"{n} tokens a step", StaticDecoding(tokens_per_step=n)) for n in (2, 3, 4, 6)),
    Entry(STATIC, "a block at once", AT_ONCE),
    Entry("static, margin", "1 token a step", StaticDecoding("margin")),
    Entry("static, entropy", "1 token a step", StaticDecoding("entropy")),
    Entry("static, random", "1 token a step", StaticDecoding("random")),
    *(Entry(THRESHOLD, f"{t:g}", ThresholdDecoding(t)) for t in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
    *(Entry("factor", f"{f:g}", FactorDecoding(f)) for f in (0.1, 0.5, 1.0, 2.0)),
    *(Entry("hierarchical", f"{a:g}, {b:g}", HierarchicalDecoding(a, b)) for a, b in ((0.4, 0.9), (0.62, 0.9), (0.8, 0.95))),
    *(Entry("entropy bound", f"{b:g}", EntropyBoundDecoding(b)) for b in (0.01, 0.1, 0.5, 1.0)),
    *(Entry("KLASS", f"{t:g}, {d:g}, {w}", KLASS(t, d, w)) for t, d, w in ((0.9, 0.01, 2), (0.7, 0.05, 1), (0.5, 0.1, 1))),
    Entry("CCD", "1 token a step", CCD()),
    Entry("CCD", "dynamic, 0.1", CCD(dynamic=True)),
    Entry("CCD", "dynamic, 8 places, 0.5", CCD(dynamic=True, positions=8, bound=0.5)),
    *(Entry("CCD", f"threshold {t:g}", CCD(rule=ThresholdDecoding(t))) for t in (0.7, 0.9)),
    *(Entry("credit", f"{t:g}", CreditDecoding(t)) for t in (0.7, 0.9, 0.95, 0.99)),
    Entry("Saber", "2", Saber()),
    Entry("Saber", "2, committed", Saber(signal="committed")),
    Entry("Saber", "2, no backtracking", Saber(backtrack=False)),
    *(Entry("RCR", f"{n} a step", RCR(rule=StaticDecoding(tokens_per_step=n))) for n in (2, 4)),
    *(Entry("WINO", f"{a:g}, {b:g}", WINO(a, b)) for a, b in ((0.5, 0.8), (0.6, 0.9), (0.7, 0.9))),
    *(Entry("editing", f"{t:g}, {e:g}", TokenEditing(e, ThresholdDecoding(t))) for t, e in ((0.5, 0.5), (0.7, 0.5), (0.9, 0.9))),
    Entry("FreeDave", "4 drafts", FreeDave(drafts=4)),
    Entry("FreeDave", "4 drafts of threshold 0.9", FreeDave(ThresholdDecoding(0.9), drafts=4)),
)

SHOWN: dict[str, Schedule] = {
    "static": ONE,
    "threshold": ThresholdDecoding(0.9),
    "factor": FactorDecoding(),
    "hierarchical": HierarchicalDecoding(),
    "entropy-bound": EntropyBoundDecoding(),
    "klass": KLASS(0.7, 0.05, 1),
    "ccd": CCD(dynamic=True),
    "credit": CreditDecoding(),
    "saber": Saber(),
    "rcr": RCR(rule=StaticDecoding(tokens_per_step=2)),
    "wino": WINO(),
    "editing": TokenEditing(),
}
"""What the pictures of the documentation show."""

PICTURED = "depth 3 ?(??????????"
"""The prompt of these pictures."""


@dataclass(frozen=True)
class Limit:
    """A setting at which a schedule becomes another one."""

    name: str
    schedule: Schedule | Executor
    other: Schedule
    geometry: Geometry = FixedBlocks(BLOCK_LENGTH)  # noqa: RUF009  frozen
    forwards: bool = True


LIMITS = (
    Limit("threshold above 1 is static", ThresholdDecoding(1.1), ONE),
    Limit("threshold 0 is a block at once", ThresholdDecoding(0.0), AT_ONCE),
    Limit("factor 0 is static", FactorDecoding(0.0), ONE),
    Limit("hierarchical at 1 is static", HierarchicalDecoding(1.0, 1.0), ONE),
    Limit("entropy bound 0 is static by entropy", EntropyBoundDecoding(0.0), StaticDecoding("entropy"), forwards=False),
    Limit("KLASS with confidence out of reach is static", KLASS(threshold=1.1), ONE),
    Limit("CCD without a history is static by entropy", CCD(history=1), StaticDecoding("entropy")),
    Limit("CCD without a history on a rule is the rule", CCD(history=1, rule=ThresholdDecoding(0.9)), ThresholdDecoding(0.9)),
    Limit("credit without weight is threshold", CreditDecoding(0.9, alpha=0.0), ThresholdDecoding(0.9)),
    Limit("credit without weight is its rule", CreditDecoding(alpha=0.0, rule=FactorDecoding()), FactorDecoding()),
    Limit("Saber that takes nothing back is its rule", Saber(n=1, rule=ThresholdDecoding(1.1)), ONE),
    Limit("Saber without backtracking is its rule", Saber(backtrack=False, rule=FactorDecoding()), FactorDecoding()),
    Limit("RCR in one step is a block at once", RCR(rule=AT_ONCE), AT_ONCE),
    Limit("WINO with wide in above 1 is static", WINO(wide=1.1), ONE),
    Limit("WINO with narrow out at 0 is its rule", WINO(narrow=0.0, rule=ThresholdDecoding(0.9)), ThresholdDecoding(0.9)),
    Limit("editing off is threshold", TokenEditing(None, ThresholdDecoding(0.9)), ThresholdDecoding(0.9)),
    Limit("FreeDave with one draft is static", FreeDave(drafts=1), ONE),
    Limit("AdaBlock with an infinite threshold is fixed blocks", ONE, ONE, AdaBlock((0,), float("inf"), BLOCK_LENGTH)),
)


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        prompts: For each task.
        batch: Rows that are decoded together.
        equal_prompts: For each task, on which the equivalences and the engine are tried.
        freedave_prompts: For each task, on which FreeDave is compared with static decoding in fp32.
        freedave_batches: Rows that are decoded together in that comparison.
        drafts: Of FreeDave.
        draws: Of the bootstrap.
        bf16: Whether the table is measured under bf16 autocast. FreeDave's comparison and the equivalences are always in fp32.
    """

    prompts: int = 1_000
    batch: int = 128
    equal_prompts: int = 32
    freedave_prompts: int = 500
    freedave_batches: tuple[int, ...] = (1, 32)
    drafts: tuple[int, ...] = (4,)
    draws: int = 1_000
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("prompts", "batch", "equal_prompts", "freedave_prompts", "draws"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} must be at least 1, not {getattr(self, name)}")


QUICK = Settings(prompts=64, equal_prompts=4, freedave_prompts=12, drafts=(4, 8), draws=300)
FULL = Settings()


# -------------------------------------------------------------------------------------------------------------- the model


class Reader:
    """The model as the loop calls it. Blocks are counted from the first column, so that a prompt takes whole blocks.

    Attributes:
        seen: Where not None, the rows' tokens at every forward are kept there.
    """

    def __init__(self, model: Any, mask_id: int) -> None:
        self.model, self.mask_id = model, mask_id
        self.seen: list[Tensor] | None = None

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(tokens.clone())
        begin, mask = self._visible(valid, columns)
        hidden = self.model.model(input_ids=tokens[:, begin : begin + mask.shape[-1]], attention_mask=mask[:, None]).last_hidden_state
        return self.model.lm_head(hidden.take_along_dim((columns - begin)[..., None], 1))

    def shadow(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """Further masks in the places of the columns; each sees itself and what its column sees, but not that column's token."""
        (rows, width), lowest = columns.shape, torch.finfo(self.model.dtype).min
        begin, seen = self._visible(valid, columns)
        length, place = seen.shape[-1], (columns - begin)[..., None]
        beside = seen.take_along_dim(place.expand(-1, -1, length), 1).scatter(-1, place, lowest)
        alone = torch.full((width, width), lowest).fill_diagonal_(0).expand(rows, -1, -1)
        unseen = torch.full((rows, length, width), lowest)
        mask = torch.cat([torch.cat([seen, unseen], 2), torch.cat([beside, alone], 2)], 1)[:, None]
        ids = torch.cat([tokens[:, begin : begin + length], torch.full_like(columns, self.mask_id)], 1)
        positions = torch.cat([torch.arange(length).expand(rows, -1), columns - begin], 1)
        hidden = self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        return self.model.lm_head(hidden[:, length:])

    def _visible(self, valid: Tensor, columns: Tensor) -> tuple[int, Tensor]:
        """The first column that is not padding in every row, and the additive mask [r, n, n] from there to the last of the columns."""
        begin, end = int(valid.any(0).int().argmax()), int(columns.max()) + 1
        return begin, self.model.block_causal_mask(valid[:, :end], end)[:, 0, begin:, begin:]


@dataclass(frozen=True)
class Answers:
    """What a schedule made of some prompts, in their order.

    Attributes:
        tokens: int64 [N, GEN_LENGTH].
        lengths, forwards: int64 [N].
        solved: Whether the checker finds the answer right.
    """

    tokens: Tensor
    lengths: Tensor
    forwards: Tensor
    solved: list[bool]

    @property
    def tokens_per_forward(self) -> float:
        """Of all rows together."""
        return float(self.lengths.sum() / self.forwards.sum())


class Subject:
    """The `puzzles` model with its tokenizer and checkers."""

    def __init__(self, folder: Path | None = None) -> None:
        self.model, self.tokenizer = load_puzzles(folder=folder)
        self.eos_id, self.mask_id = self.tokenizer.eos_token_id, self.tokenizer.mask_token_id
        self.reader = Reader(self.model, self.mask_id)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [N, P] and where they are no padding; P is the least multiple of the block length that holds the longest."""
        ids = [self.tokenizer(prompt).input_ids for prompt in prompts]
        width = -(-max(map(len, ids)) // BLOCK_LENGTH) * BLOCK_LENGTH
        pad = self.tokenizer.pad_token_id
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], dtype=torch.bool)
        return torch.tensor([[pad] * (width - len(row)) + row for row in ids]), mask

    def decode(self, schedule: Schedule | Executor, prompts: Sequence[str], geometry: Geometry | None = None) -> Decoded:
        """Answers to prompts as one batch."""
        ids, mask = self.encode(prompts)
        geometry = FixedBlocks(BLOCK_LENGTH) if geometry is None else geometry
        sampling = Sampling(self.mask_id)
        options: dict[str, Any] = {"prompt_mask": mask, "eos_id": self.eos_id, "shadow_fn": self.reader.shadow}
        return decode(self.reader, ids, schedule, geometry, sampling=sampling, length=GEN_LENGTH, **options)

    def text(self, tokens: Sequence[int]) -> str:
        """What stands before the first end-of-text."""
        found = list(tokens)
        return str(self.tokenizer.decode(found[: found.index(self.eos_id)] if self.eos_id in found else found))

    def answer(
        self, schedule: Schedule | Executor, prompts: Sequence[str], batch: int, *, geometry: Geometry | None = None, bf16: bool = False
    ) -> Answers:
        """Answers to prompts in batches of similar length."""
        size = [len(self.tokenizer(prompt).input_ids) for prompt in prompts]
        widths = [-(-n // BLOCK_LENGTH) for n in size]
        order = sorted(range(len(prompts)), key=lambda i: size[i])
        tokens = torch.full((len(prompts), GEN_LENGTH), self.eos_id)
        lengths, forwards = torch.zeros(len(prompts), dtype=torch.int64), torch.zeros(len(prompts), dtype=torch.int64)
        at = 0
        while at < len(order):
            chosen = [i for i in order[at : at + batch] if widths[i] == widths[order[at]]]
            at += len(chosen)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = self.decode(schedule, [prompts[i] for i in chosen], geometry)
            tokens[chosen, : found.tokens.shape[1]] = found.tokens
            lengths[chosen], forwards[chosen] = found.lengths, found.forwards
        solved = [check(prompt, self.text(row)).solved for prompt, row in zip(prompts, tokens.tolist(), strict=True)]
        return Answers(tokens, lengths, forwards, solved)

    def order(self, schedule: Schedule, prompt: str) -> tuple[list[str], np.ndarray]:
        """How an answer came about.

        Returns:
            The characters that each position ends with, and int64 [steps, positions]: the step, from 1, that committed what stood at a
            position after each step; 0 where that was masked.
        """
        ids, mask = self.encode([prompt])
        self.reader.seen = []
        try:
            options: dict[str, Any] = {"prompt_mask": mask, "shadow_fn": self.reader.shadow}
            length = min(GEN_LENGTH, BLOCK_LENGTH)
            found = decode(self.reader, ids, schedule, FixedBlocks(BLOCK_LENGTH), sampling=Sampling(self.mask_id), length=length, **options)
            shown = [tokens[0, ids.shape[1] :] for tokens in self.reader.seen] + [found.tokens[0]]
        finally:
            self.reader.seen = None
        grid, last = [], torch.zeros_like(found.tokens[0])
        for step, (before, after) in enumerate(pairwise(shown), 1):
            last = torch.where(after == before, last, step).masked_fill(after == self.mask_id, 0)
            grid.append(last)
        characters = ["" if token == self.eos_id else str(self.tokenizer.decode([token])) for token in found.tokens[0].tolist()]
        return characters, torch.stack(grid).numpy()


def subject_of(model: Path | None) -> Subject:
    """The model in a folder; the one that ships unless told.

    Raises:
        BenchError: There is none.
    """
    try:
        return Subject(model)
    except (OSError, ValueError) as error:
        raise BenchError(f"--model: no puzzles model could be loaded: {str(error).splitlines()[0]}") from None


# ------------------------------------------------------------------------------------------------------------------ rows


def rows_of(entries: Sequence[Entry], found: Sequence[Answers], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each setting: together, and under `tasks` for each task.

    Args:
        entries: The first is static decoding, which the others are compared with.
        found: For each entry.
        tasks: For each prompt.
    """
    rows = []
    names = list(dict.fromkeys(tasks))
    for entry, answers in zip(entries, found, strict=True):
        row: dict[str, Any] = {
            "model": "puzzles",
            "variant": f"{entry.family}: {entry.text}",
            "family": entry.family,
            "setting": entry.text,
        }
        row |= _figures(answers, found[0], range(len(tasks)))
        row["tasks"] = {name: _figures(answers, found[0], [i for i, task in enumerate(tasks) if task == name]) for name in names}
        rows.append(row)
    return rows


def _figures(answers: Answers, static: Answers, chosen: Sequence[int]) -> dict[str, float]:
    """Accuracy and tokens per forward on some prompts."""
    right = [answers.solved[i] for i in chosen]
    low, high = wilson(sum(right), len(right))
    change = paired_difference([static.solved[i] for i in chosen], right)
    index = list(chosen)
    tokens, forwards = int(answers.lengths[index].sum()), int(answers.forwards[index].sum())
    base = int(static.lengths[index].sum()) / int(static.forwards[index].sum())
    return {
        "prompts": len(right),
        "accuracy": sum(right) / len(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "change": 100 * change.value,
        "change_low": 100 * change.low,
        "change_high": 100 * change.high,
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards,
        "speedup": tokens / forwards / base,
    }


def comparisons(entries: Sequence[Entry], found: Sequence[Answers], tasks: Sequence[str], draws: int) -> list[dict[str, Any]]:
    """For each schedule by how much its accuracy exceeds that of threshold decoding at the same number of tokens per forward.

    Threshold decoding's accuracy is read between its settings, static decoding (a threshold above 1) and a block at once (0) among them.
    The value of a schedule is the mean over its settings; intervals are from prompts drawn with replacement within each task.

    Returns:
        For each schedule: `family`, `points`, `low`, `high`, and `settings` with the same for each setting.
    """
    curve = [i for i, entry in enumerate(entries) if entry.family == THRESHOLD or entry.schedule in (ONE, AT_ONCE)]
    weights = _weights(tasks, draws)
    right = np.stack([np.array(answers.solved, dtype=float) for answers in found], 1)
    tokens, forwards = (
        np.stack([getattr(answers, name).numpy() for answers in found], 1).astype(float) for name in ("lengths", "forwards")
    )
    accuracy, speed = weights @ right / len(tasks), (weights @ tokens) / (weights @ forwards)  # [1 + draws, settings], the first as it is
    results = []
    for family in dict.fromkeys(entry.family for entry in entries):
        mine = [i for i, entry in enumerate(entries) if entry.family == family and i not in curve]
        if not mine:
            continue
        excess = np.empty((len(weights), len(mine)))
        for draw in range(len(weights)):
            line = sorted(zip(speed[draw, curve], accuracy[draw, curve], strict=True))
            x, y = (np.array(column) for column in zip(*line, strict=True))
            excess[draw] = 100 * (accuracy[draw, mine] - np.interp(speed[draw, mine], x, y))
        each = [{"setting": entries[i].text, **_interval(excess[:, j])} for j, i in enumerate(mine)]
        results.append({"family": family, **_interval(excess.mean(1)), "settings": each})
    return results


def _weights(tasks: Sequence[str], draws: int) -> np.ndarray:
    """[1 + draws, prompts]: how often each prompt is drawn; once each in the first."""
    random, found = np.random.default_rng(0), np.ones((1 + draws, len(tasks)))
    for name in dict.fromkeys(tasks):
        index = np.flatnonzero(np.array(tasks) == name)
        found[1:, index] = random.multinomial(len(index), np.full(len(index), 1 / len(index)), draws)
    return found


def _interval(values: np.ndarray) -> dict[str, float]:
    """The first value and the 95% interval of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {"points": float(values[0]), "low": float(low), "high": float(high)}


def equivalences(subject: Subject, prompts: Sequence[str], batch: int, done: Callable[[], None]) -> list[dict[str, Any]]:
    """For each limit how many answers differ."""
    known: dict[Any, Answers] = {}
    rows = []
    for limit in LIMITS:
        if limit.other not in known:
            known[limit.other] = subject.answer(limit.other, prompts, batch)
        other, mine = known[limit.other], subject.answer(limit.schedule, prompts, batch, geometry=limit.geometry)
        differ = (mine.tokens != other.tokens).any(1)
        if limit.forwards:
            differ |= mine.forwards != other.forwards
        rows.append({"name": limit.name, "prompts": len(prompts), "differ": int(differ.sum())})
        done()
    return rows


def losslessness(
    subject: Subject, prompts: Sequence[str], batches: Sequence[int], drafts: Sequence[int], done: Callable[[], None]
) -> list[dict[str, Any]]:
    """For each batch and number of drafts: answers that differ from static decoding's in the same batch, and how many forwards it took."""
    rows = []
    for batch in batches:
        static = subject.answer(ONE, prompts, batch)
        done()
        for d in drafts:
            mine = subject.answer(FreeDave(drafts=d), prompts, batch)
            rows.append({
                "batch": batch,
                "drafts": d,
                "prompts": len(prompts),
                "differ": int((mine.tokens != static.tokens).any(1).sum()),
                "fewer_forwards": int(static.forwards.sum()) / int(mine.forwards.sum()),
            })  # fmt: skip
            done()
    return rows


def engine_rows(subject: Subject, prompts: Sequence[str], done: Callable[[], None]) -> list[dict[str, Any]]:
    """For each schedule how many of the engine's answers differ from the loop's, and its forwards over the loop's.

    The loop has no cache; the engine's exact one may take a forward more to keep a finished block.
    """
    schedules: dict[str, Schedule | FreeDave] = {**SHOWN, "freedave": FreeDave(drafts=4)}
    rows = []
    for name, schedule in schedules.items():
        loop = subject.answer(schedule, prompts, len(prompts))
        pipe = TextPipeline(subject.model, subject.tokenizer, schedule, block_length=BLOCK_LENGTH, aligned=False)
        out = pipe(list(prompts), gen_length=GEN_LENGTH)
        expected = [row[:length] for row, length in zip(loop.tokens.tolist(), loop.lengths.tolist(), strict=True)]
        rows.append({
            "schedule": name,
            "prompts": len(prompts),
            "differ": sum(mine != theirs for mine, theirs in zip(out.tokens, expected, strict=True)),
            "forwards": sum(out.forwards) / int(loop.forwards.sum()),
        })  # fmt: skip
        done()
    return rows


# ------------------------------------------------------------------------------------------------------------------ bars


def bars_of(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Bar]:
    """The bars.

    Args:
        rows: Of the schedules; the first is static decoding.
        measured: "equivalences", "freedave", "engine" and "speed" of a result's settings.
    """
    equal, lossless, engine = measured["equivalences"], measured["freedave"], measured["engine"]
    static = rows[0]
    least = min(static["tasks"], key=lambda name: static["tasks"][name]["accuracy"])
    worst = static["tasks"][least]
    note = f"the least is {least}, {worst['prompts']} prompts, 95% interval {worst['accuracy_low']:.3f} to {worst['accuracy_high']:.3f}"
    bars = [Bar.at_least("static decoding solves of each task", worst["accuracy"], SOLVED, note)]
    at_once = next((row for row in rows if row["setting"] == "a block at once"), None)
    if at_once is not None:
        drops = {name: figures["accuracy"] - at_once["tasks"][name]["accuracy"] for name, figures in static["tasks"].items()}
        note = ", ".join(f"{name} {-100 * drop:+.1f}" for name, drop in drops.items())
        bars.append(Bar.at_least("tasks on which a block at once is 10 points worse", sum(d >= WORSE for d in drops.values()), 3, note))
    near = [row for row in rows if row["change"] >= -POINTS]
    best = max(near, key=lambda row: row["speedup"])
    note = f"{best['variant']}: {best['tokens_per_forward']:.2f} tokens per forward against {static['tokens_per_forward']:.2f}; change "
    note += f"{best['change']:+.1f} points, 95% interval {best['change_low']:+.1f} to {best['change_high']:+.1f}"
    bars.append(Bar.at_least("tokens per forward over static's, within a point of its accuracy", best["speedup"], SPEEDUP, note))
    for batch in dict.fromkeys(row["batch"] for row in lossless):
        mine = [row for row in lossless if row["batch"] == batch]
        note = f"of {mine[0]['prompts']:,} prompts, fp32, each with {' and '.join(str(row['drafts']) for row in mine)} drafts"
        bars.append(Bar.at_most(f"FreeDave, batch {batch}: answers unlike static's", sum(row["differ"] for row in mine), 0, note))
        best = max(mine, key=lambda row: row["fewer_forwards"])
        note = "; ".join(f"{row['drafts']} drafts {row['fewer_forwards']:.2f}" for row in mine)
        bars.append(Bar.at_least(f"FreeDave, batch {batch}: static's forwards over its own", best["fewer_forwards"], FEWER_FORWARDS, note))
    unlike = [f"{row['name']}: {row['differ']}" for row in equal if row["differ"]]
    note = f"{len(equal)} equivalences on {equal[0]['prompts']} prompts" if equal else "none was tried"
    note += "; " + "; ".join(unlike) if unlike else ""
    bars.append(Bar.at_most("equivalences: answers or forwards unlike", sum(row["differ"] for row in equal), 0, note))
    note = f"{len(engine)} schedules on {engine[0]['prompts']} prompts, fp32, exact cache"
    bars.append(Bar.at_most("engine: answers unlike the loop's", sum(row["differ"] for row in engine), 0, note))
    bars.append(decoding_speed.bar_of(measured["speed"]))
    return bars


# ------------------------------------------------------------------------------------------------------------------- run


def execute(
    settings: Settings,
    note: Note,
    *,
    quick: bool,
    model: Path | None = None,
    entries: Sequence[Entry] = ENTRIES,
    speed: decoding_speed.Settings | None = None,
) -> Results:
    """Measures and returns the results, rows and bars filled in.

    Args:
        settings: What is run.
        quick: Only for what the results say of themselves.
        model: Folder of the `puzzles` model; the one that ships unless told.
        entries: The first must be static decoding.
        speed: How the engine is timed.

    Raises:
        BenchError: There is no model.
    """
    subject = subject_of(model)
    steady_memory()
    results = Results(NAME, quick, settings={**asdict(settings), "block_length": BLOCK_LENGTH, "gen_length": GEN_LENGTH})
    puzzles = [puzzle for task in TASKS for puzzle in validation_puzzles(task, settings.prompts, SEED)]
    prompts, tasks = [puzzle.prompt for puzzle in puzzles], [puzzle.task for puzzle in puzzles]
    tick, found = note("schedules", len(entries)), []
    for entry in entries:
        found.append(subject.answer(entry.schedule, prompts, settings.batch, bf16=settings.bf16))
        tick()
    results.rows = rows_of(entries, found, tasks)
    results.settings["comparisons"] = comparisons(entries, found, tasks, settings.draws)
    some = [puzzle.prompt for task in TASKS for puzzle in validation_puzzles(task, settings.equal_prompts, SEED)]
    equal = equivalences(subject, some, settings.batch, note("equivalences", len(LIMITS)))
    some = [puzzle.prompt for task in TASKS for puzzle in validation_puzzles(task, settings.freedave_prompts, SEED)]
    tick = note("FreeDave against static", len(settings.freedave_batches) * (1 + len(settings.drafts)))
    lossless = losslessness(subject, some, settings.freedave_batches, settings.drafts, tick)
    results.settings |= {"equivalences": equal, "freedave": lossless}
    some = [puzzle.prompt for task in TASKS for puzzle in validation_puzzles(task, settings.equal_prompts, SEED)]
    results.settings["engine"] = engine_rows(subject, some, note("the engine against the loop", len(SHOWN) + 1))
    tick = note("the engine against LLaDA2Pipeline", 1)
    results.settings["speed"] = decoding_speed.measure(speed)
    tick()
    results.bars = bars_of(results.rows, results.settings)
    return results


def draw(results: Results, folder: Path, model: Path | None = None) -> None:
    """The page's pictures: the settings, and the order in which each schedule decodes."""
    subject = subject_of(model)
    orders = {name: subject.order(schedule, PICTURED) for name, schedule in SHOWN.items()}
    pictures(results.rows, orders, PICTURED, folder)


def shown(results: Results) -> str:
    """What is printed: the tables, the bars last."""
    tables = [rows_table(results.rows), comparison_table(results.settings["comparisons"]), bars_table(results.bars)]
    return "\n\n".join([surroundings(results), *tables])


def assemble(file: Path, docs: Path, model: Path | None = None) -> None:
    """Writes the page and the pictures from results that were measured before; bars are computed anew.

    Raises:
        BenchError: The file holds no results of this benchmark, or there is no model.
    """
    data = read_results(file, NAME)
    results = Results(NAME, data["quick"], data["settings"], data["rows"], machine=data["machine"], versions=data["versions"])
    results.bars = bars_of(results.rows, results.settings)
    publish(results, docs, page, partial(draw, model=model))


def run(
    quick: bool = False,
    json_path: Path | None = None,
    docs: Path | None = None,
    *,
    settings: Settings | None = None,
    model: Path | None = None,
    entries: Sequence[Entry] = ENTRIES,
    speed: decoding_speed.Settings | None = None,
) -> int:
    """Runs the benchmark, prints the tables (bars last) and writes the results.

    Args:
        quick: Fewer prompts, within ten minutes on two cores; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes, its pictures beside it; in a source checkout docs/results/decoding.md, after a full run.
        settings: In place of the quick or full ones.
        model: Folder of the `puzzles` model; the one that ships unless told.
        entries: The settings of schedules; the first must be static decoding.
        speed: How the engine is timed.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    docs = docs if docs is not None or quick else PAGE
    chosen = {"settings": settings or (QUICK if quick else FULL), "quick": quick, "model": model, "entries": entries, "speed": speed}
    pictured = partial(draw, model=model)
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs, pictures=pictured, shown=shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.decoding`."""
    parser = command_line("decoding", "Decoding schedules on puzzles.")
    parser.add_argument("--quick", action="store_true", help="within ten minutes on two cores")
    parser.add_argument("--prompts", type=int, help="for each task")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another puzzles model")
    parser.add_argument("--assemble", type=Path, metavar="FILE", help="run nothing: the page and the pictures from this JSON")
    options = parser.parse_args(arguments)
    if options.assemble is not None:
        docs = options.docs if options.docs is not None else PAGE
        if docs is None:
            parser.error("--assemble needs --docs where hasten is installed")
        try:
            assemble(options.assemble, docs, options.model)
        except BenchError as error:
            return refused(NAME, error)
        return 0
    if options.prompts is not None and not 1 <= options.prompts <= 4_000:
        parser.error(f"--prompts must be from 1 to 4000, not {options.prompts}")
    settings = QUICK if options.quick else FULL
    settings = settings if options.prompts is None else replace(settings, prompts=options.prompts)
    return run(options.quick, options.json, options.docs, settings=settings, model=options.model)


if __name__ == "__main__":
    raise SystemExit(main())
