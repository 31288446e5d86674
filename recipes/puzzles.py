"""Trains the `puzzles` model: `python recipes/puzzles.py`. See the card for what was measured.

    train     a block-causal Qwen3 on puzzles of all tasks, masked at random inside one block
    export    bf16 weights, 2,000 unseen prompts per task decoded token by token and block by block, the card

Checkpoints lie in runs/puzzles; give the same command again to resume. Prompts that training may not see are told by their hash.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shared
import torch
import torch.nn.functional as F
from denoising import ZOO, git_hash
from diffusers import BlockRefinementScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from hasten.pipelines.zoo.puzzles import (
    BLOCK_LENGTH,
    GEN_LENGTH,
    TASKS,
    Puzzle,
    check,
    draw,
    load_puzzles,
    new_config,
    new_tokenizer,
    validation_puzzles,
)
from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesConfig, PuzzlesForMaskedLM
from hasten.pipelines.zoo.puzzles.world import bare

WORK = Path("runs/puzzles")
STEPS, BATCH, PARTS, RATE = 8_000, 128, 4, 2e-3
"""A batch is sorted by length and done in parts, so that short rows are not padded to the longest."""

MIX = {"addends": 0.35, "sudoku": 0.15, "brackets": 0.4, "addition": 0.1}
BLOCK_LENGTHS = {8: 0.2, BLOCK_LENGTH: 0.6, 32: 0.2}
"""Other lengths than the model's own are trained as well: schedules that choose their blocks pass masks of their own."""

WATCH_SEED, WATCHED = 1, 128
"""Validation prompts that only serve to watch the training; the export draws others."""

TAILS = (1, 2, 3, 4, 6, 8, 12, GEN_LENGTH)
WIDTHS = (24, 32, 40, 48, 56)
"""Rows are filled up to one of a few widths, since each is compiled; the longest prompt takes 23 and what follows it GEN_LENGTH."""


# --------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Rows:
    """Training samples.

    Attributes:
        ids: [B, T] tokens, masks among them.
        labels: [B, T] what stands under the masks, -100 elsewhere.
        blocks: [B, T] the block that each position belongs to.
        weight: [B] 1 / (t n), where n positions of the block may be masked and the share t of them is.
    """

    ids: Tensor
    labels: Tensor
    blocks: Tensor
    weight: Tensor


class Samples:
    """Draws puzzles and masks one block of each answer.

    The blocks before it are clean, those after it are not seen, and the prompt is never masked. Where the first block begins is drawn as
    well: it depends on the padding, which a prompt shares with its batch-mates.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        # Looked up here, since the tokenizer takes longer over a batch than drawing it does.
        self.vocabulary, self.rng = tokenizer.get_vocab(), random.Random(seed)
        self.eos, self.sep, self.mask = tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id

    def batch(self, n: int, parts: int) -> list[Rows]:
        """`n` samples sorted by length, in `parts` equal parts."""
        puzzles = [draw(task, self.rng) for task in self.rng.choices([*MIX], [*MIX.values()], k=n)]
        rows = sorted((self.masked(puzzle) for puzzle in puzzles), key=lambda row: len(row[0]))
        return [self.collate(rows[at : at + n // parts]) for at in range(0, n, n // parts)]

    def masked(self, puzzle: Puzzle) -> tuple[list[int], list[int], list[int]]:
        """Tokens up to the end of the chosen block, what is masked among them, and the block that each position belongs to."""
        rng = self.rng
        prompt = [self.vocabulary[character] for character in bare(puzzle.prompt)] + [self.sep]
        answer = [self.vocabulary[character] for character in puzzle.answer]
        first = len(prompt)
        length = rng.choices([*BLOCK_LENGTHS], [*BLOCK_LENGTHS.values()])[0]
        phase = rng.randrange(length)
        # A position of the answer or its end tells the block, so blocks are drawn by what they hold; now and then it is one further on,
        # where there is nothing but ends.
        block = (first + rng.randrange(len(answer) + 1 if rng.random() < 0.97 else GEN_LENGTH) + phase) // length
        begin, end = max(first, block * length - phase), min((block + 1) * length - phase, first + GEN_LENGTH)
        # How far a block goes on behind the answer varies, and is mostly cut short: there is nothing to learn from.
        end = min(end, max(begin, first + len(answer)) + rng.choice(TAILS))
        ids = (prompt + answer + [self.eos] * GEN_LENGTH)[:end]
        chosen = set(rng.sample(range(begin, end), rng.randint(1, end - begin)))
        labels = [token if i in chosen else -100 for i, token in enumerate(ids)]
        ids = [self.mask if i in chosen else token for i, token in enumerate(ids)]
        return ids, labels, [(i + phase) // length for i in range(end)]

    def collate(self, rows: Sequence[tuple[list[int], list[int], list[int]]]) -> Rows:
        """Fills up to one width with blocks that no other sees."""
        width = next(width for width in WIDTHS if width >= len(rows[-1][0]))
        fill = (self.eos, -100, GEN_LENGTH)
        ids, labels, blocks = (torch.tensor([row[i] + [fill[i]] * (width - len(row[i])) for row in rows]) for i in range(3))
        return Rows(ids, labels, blocks, 1 / (labels >= 0).sum(1))


# ---------------------------------------------------------------------------------------------------------------- train


def loss_of(model: PuzzlesForMaskedLM, rows: Rows) -> Tensor:
    """Cross-entropy of the masked tokens, weighted by 1 / t: the bound on a block's negative log-likelihood, per token."""
    seen = (rows.blocks[:, :, None] >= rows.blocks[:, None])[:, None]
    # Plain products: the fused kernel's backward is slow on short sequences.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        logits = model(rows.ids, attention_mask=seen).logits
    each = F.cross_entropy(logits.float().flatten(0, 1), rows.labels.flatten(), reduction="none").view(rows.labels.shape)
    return (each.sum(1) * rows.weight).mean()


def train(steps: int) -> None:
    torch.manual_seed(6)
    tokenizer = new_tokenizer()
    model = PuzzlesForMaskedLM(new_config(tokenizer))
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    training = shared.Training(WORK / "model.pt", {"model": model}, hidden, steps=steps, rate=RATE, falling=0.5)
    if training.finished:
        return
    start = training.start
    samples = Samples(tokenizer, 7_000_000 + start)
    for layer in model.model.layers:  # all of them share one graph for each width
        layer.compile(fullgraph=True, dynamic=False)
    began = time.time()
    with shared.progress() as bar:
        task = bar.add_task("train", total=steps, completed=start, note="")
        for step in range(start, steps):
            loss = 0.0
            for rows in samples.batch(BATCH, PARTS):
                part = loss_of(model, rows) / PARTS
                part.backward()
                loss += part.item()
            training.step(step)
            if (step + 1) % 10 == 0:
                bar.update(task, completed=step + 1, note=f"loss {loss:.4f}")
            if (step + 1) % 100 == 0:
                per_step = (time.time() - began) / (step + 1 - start)
                shared.log(WORK, stage="train", step=step + 1, loss=round(loss, 5), seconds=round(per_step, 4))
            if (step + 1) % 500 == 0 or step + 1 == steps:
                training.save(step + 1)
                watched = PuzzlesForMaskedLM(new_config(tokenizer))
                watched.load_state_dict(training.average)
                shared.log(WORK, stage="validate", step=step + 1, **measure(watched.eval(), tokenizer, WATCHED, WATCH_SEED))


# ------------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def decode(model: PuzzlesForMaskedLM, tokenizer: PreTrainedTokenizerFast, prompts: Tensor, *, at_once: bool) -> Tensor:
    """Answers [B, GEN_LENGTH] to prompts [B, P] of one length, block by block.

    Each forward commits the most confident token of a row's block, or with `at_once` the whole block. A row that has ended keeps its
    masks.
    """
    eos, mask, width = tokenizer.eos_token_id, tokenizer.mask_token_id, prompts.shape[1]
    x = F.pad(prompts, (0, GEN_LENGTH), value=mask)
    for start in range(width // BLOCK_LENGTH * BLOCK_LENGTH, x.shape[1], BLOCK_LENGTH):
        end = min(start + BLOCK_LENGTH, x.shape[1])
        while True:
            answer = x[:, width:end]
            ended = ((answer == eos) & ((answer == mask).cumsum(1) == 0)).any(1)
            rows = (~ended & (x[:, start:end] == mask).any(1)).nonzero()[:, 0]
            if not len(rows):
                break
            logits = model(x[rows, :end]).logits[:, start:].float()
            logits[..., mask] = -torch.inf
            confidence, token = logits.softmax(-1).max(-1)
            block = x[rows, start:end]
            commit = block == mask
            if not at_once:
                best = confidence.masked_fill(~commit, -1.0).argmax(1, keepdim=True)
                commit = torch.zeros_like(commit).scatter_(1, best, True)
            x[rows, start:end] = torch.where(commit, token, block)
    return x[:, width:]


def texts_of(tokenizer: PreTrainedTokenizerFast, answers: Tensor) -> list[str]:
    """What stands before the first end of each row [B, GEN_LENGTH]."""
    ends = ((answers == tokenizer.eos_token_id).cumsum(1) == 0).sum(1).tolist()
    return [tokenizer.decode(row[:end]) for row, end in zip(answers, ends, strict=True)]


def solved(model: PuzzlesForMaskedLM, tokenizer: PreTrainedTokenizerFast, puzzles: Sequence[Puzzle], *, at_once: bool) -> int:
    """How many of the puzzles are solved. Prompts of one length go together, so that each is decoded as it would be alone."""
    by_length: dict[int, list[tuple[str, list[int]]]] = {}
    for puzzle in puzzles:
        ids = tokenizer(puzzle.prompt).input_ids
        by_length.setdefault(len(ids), []).append((puzzle.prompt, ids))
    good = 0
    for group in by_length.values():
        for at in range(0, len(group), 256):
            prompts, ids = zip(*group[at : at + 256], strict=True)
            answers = texts_of(tokenizer, decode(model, tokenizer, torch.tensor(ids), at_once=at_once))
            good += sum(check(prompt, answer).solved for prompt, answer in zip(prompts, answers, strict=True))
    return good


def measure(model: PuzzlesForMaskedLM, tokenizer: PreTrainedTokenizerFast, prompts: int, seed: int) -> dict[str, dict[str, float]]:
    """The share of validation prompts solved for each task, static (one token a forward) and all at once."""
    out: dict[str, dict[str, float]] = {"static": {}, "at_once": {}}
    for task in TASKS:
        puzzles = validation_puzzles(task, prompts, seed)
        for name in out:
            with torch.autocast("cpu", torch.bfloat16):
                out[name][task] = solved(model, tokenizer, puzzles, at_once=name == "at_once") / prompts
    return out


# --------------------------------------------------------------------------------------------------------------- export


def export(prompts: int) -> None:
    """Saves the averaged weights in bf16, decodes validation prompts with what was saved, and writes the card."""
    state = torch.load(WORK / "model.pt")
    tokenizer = new_tokenizer()
    model = PuzzlesForMaskedLM(new_config(tokenizer))
    model.load_state_dict(state["average"])
    with shared.replacing(ZOO / "puzzles") as scratch:
        # The code goes with the weights, and config.json says where it is.
        PuzzlesConfig.register_for_auto_class()
        PuzzlesForMaskedLM.register_for_auto_class("AutoModelForCausalLM")
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        BlockRefinementScheduler(block_length=BLOCK_LENGTH, num_inference_steps=BLOCK_LENGTH).save_pretrained(scratch / "scheduler")
        recommended = {"steps": BLOCK_LENGTH, "gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH}
        (scratch / "hasten.json").write_text(json.dumps(recommended) + "\n")
        loaded, tokenizer = load_puzzles(folder=scratch)
        results: dict[str, Any] = {
            "step": state["step"],
            "samples": state["step"] * BATCH,
            "git": git_hash(),
            "prompts": prompts,
            "block_length": BLOCK_LENGTH,
            "gen_length": GEN_LENGTH,
            **measure(loaded, tokenizer, prompts, seed=0),
        }
        shared.log(WORK, **{"stage": "export", **results})
        print(json.dumps(results))
        shared.describe(scratch, WORK, results, card(results, sum(p.numel() for p in model.parameters())))


CARD = """# puzzles

A block-diffusion language model for tasks whose answers can be checked exactly, most of them with many right answers. A Qwen3 of {layers}
layers of width {width}, {parameters:,} parameters, one token a character, trained from nothing by `recipes/puzzles.py`. Within a block of
{block_length} positions every token sees every other; later blocks are unseen. `modeling_puzzles.py` makes such a mask from the 2-D one
that a pipeline passes, and takes a 4-D mask as it is.

```python
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
scheduler = BlockRefinementScheduler.from_pretrained(FOLDER, subfolder="scheduler")
pipe = LLaDA2Pipeline(model, scheduler, AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True))
pipe("3? + ? = 91", gen_length={gen_length}, num_inference_steps={block_length}, threshold=2.0, editing_threshold=None).texts
```

| task | prompt | one right answer |
|---|---|---|
{examples}

Trained for {step:,} steps of {batch} puzzles ({samples:,} in all), git {git}. Share solved of {prompts:,} prompts per task that training
never saw (one in 16, told by the prompt's hash), greedy, under bf16 autocast:

| task | static: one token a forward | all at once: one forward a block |
|---|---|---|
{accuracy}

The training log is `training_log.jsonl`; the figures are in `results.json`.
"""


def card(results: dict[str, Any], parameters: int) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    config = new_config(new_tokenizer())
    examples = [validation_puzzles(task, 1)[0] for task in TASKS]
    return CARD.format(
        **results,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        parameters=parameters,
        batch=BATCH,
        examples="\n".join(f"| {puzzle.task} | `{puzzle.prompt}` | `{puzzle.answer}` |" for puzzle in examples),
        accuracy="\n".join(f"| {task} | {100 * results['static'][task]:.1f}% | {100 * results['at_once'][task]:.1f}% |" for task in TASKS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2_000, help="prompts per task that the export is judged by (default: %(default)s)")
    shared.run_stages(parser, {"train": lambda args: train(args.steps), "export": lambda args: export(args.prompts)}, [WORK])


if __name__ == "__main__":
    main()
