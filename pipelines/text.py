"""Text from diffusion language models: prompts in, answers out, with a decoding schedule and a cache.

    pipe = TextPipeline.from_pretrained("puzzles", CreditDecoding(0.9))
    print(pipe(["3? + ? = 91", "483 + 759 = ?"], gen_length=32).texts)

Rows of different length share a batch and do not touch each other's answers; what was spent on each is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.decoding.compatibility import Cache
from hasten.accelerators.decoding.engine import FINAL, MASKED, Engine, Generated, Step
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.generate import LogitsFn
from hasten.accelerators.decoding.geometry import FixedBlocks, Geometry
from hasten.accelerators.decoding.hex import HEX, Votes, vote
from hasten.accelerators.decoding.models import Attention, adapt
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.steering.budget import Budget
from hasten.accelerators.steering.controller import SteeringMethod
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.text import COMPLETIONS, Ancestral, SteeredText, steer_text
from hasten.accelerators.steering.verifiers import Verifier
from hasten.pipelines.decoding_schedulers import DecodingScheduler

Prompts = str | Tensor | Sequence[Any]
"""A text or several; token ids of one prompt or of several; the messages of one chat or of several."""


@dataclass(frozen=True)
class TextOutput:
    """Answers and what they cost. Lists have an entry for each prompt.

    Attributes:
        texts: Without special tokens.
        tokens: Token ids up to the first end-of-text, that one included.
        steps: For each token the step of the schedule, from 1, that gave it.
        forwards: Forwards of the model that the row was part of until it was done; none for its prompt alone.
        wasted: Forwards that it was in for nothing, since it was not known yet that it was done.
        calls: Of the model, for the whole batch.
        read_backs: After how many of them the host waited for the device.
        seconds: For everything but the tokenizer.
        exact: Whether the tokens are those that there would be without a cache.
    """

    texts: list[str]
    tokens: list[list[int]]
    steps: list[list[int]]
    forwards: list[int]
    wasted: list[int]
    calls: int
    read_backs: int
    seconds: float
    exact: bool

    @property
    def tokens_per_forward(self) -> list[float]:
        """Of each row; neither its prompt nor any padding counts."""
        return [len(tokens) / forwards for tokens, forwards in zip(self.tokens, self.forwards, strict=True)]


@dataclass(frozen=True)
class TextUpdate:
    """A row after a step.

    Attributes:
        row: Which prompt it answers.
        step: Of the schedule, from 1.
        tokens: Token ids of the answer as they stand, with the model's guess at masks that it was asked about.
        marks: For each what it is: MASKED, GUESSED, COMMITTED or FINAL of the engine. What is committed may still be revised, or cut off by
            an end-of-text in front of it; what is final stays.
        final: Text of the final tokens at the beginning. It only grows.
        text: Text of all tokens but the masks.
        done: Whether this is the row's last update.
    """

    row: int
    step: int
    tokens: list[int]
    marks: list[int]
    final: str
    text: str
    done: bool


class TextPipeline:
    """A diffusion language model with its tokenizer, a schedule and a cache.

    Args:
        model: A causal language model of transformers that was trained as a diffusion model, or LLaDA or Dream from remote code.
        tokenizer: Its tokenizer.
        schedule: What is committed at which step: a schedule, a scheduler that stands for one, or FreeDave, which holds one.
            `ThresholdDecoding(0.9)` unless told.
        block_length: The model's own where its configuration names it, else 32.
        geometry: In place of `block_length`: AdaBlock, DAEDAL.
        aligned: Whether blocks are counted from the first token of the prompt, as LLaDA2 and SDAR were trained, or from the first one of
            the answer. The former for block-causal models unless told.
        attention: "block-causal" unless told; LLaDA and Dream are "bidirectional".
        shifted: Whether a token is predicted at the position before its own.
        cache: "block-append" for block-causal models and "none" for others unless told, which are exact. "prefix", "dual" and "vicinity"
            are approximate.
        mask_id: The mask token; the tokenizer's or the configuration's unless told.
        eos_id: End-of-text; the tokenizer's unless told. A row is done as soon as nothing is masked before its first one.
        sync_every: Forwards between two read-backs of which rows are done.
        wide_cost: As in `Engine`.

    Raises:
        ValueError: These do not go together, or there is no mask token; the message says what to pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        schedule: Schedule | FreeDave | DecodingScheduler | None = None,
        *,
        block_length: int | None = None,
        geometry: Geometry | None = None,
        aligned: bool | None = None,
        attention: Attention | None = None,
        shifted: bool = False,
        cache: Cache | None = None,
        mask_id: int | None = None,
        eos_id: int | None = None,
        sync_every: int = 4,
        wide_cost: float | None = None,
    ) -> None:
        schedule = ThresholdDecoding(0.9) if schedule is None else schedule
        if isinstance(schedule, DecodingScheduler):
            schedule = schedule.schedule
        if isinstance(schedule, HEX):
            raise ValueError("schedule cannot be HEX, which votes over answers: use pipe.vote(prompts, HEX(...), answer=...)")
        if not isinstance(schedule, Schedule | FreeDave):
            raise ValueError(f"schedule must be a decoding schedule such as ThresholdDecoding(0.9), not {schedule!r}")
        if geometry is not None and (block_length is not None or aligned is not None):
            raise ValueError(f"geometry={geometry!r} says already where blocks are: leave block_length and aligned out")
        config = getattr(model, "config", None)
        self.tokenizer = tokenizer
        self.model = adapt(model, attention=attention, shifted=shifted)
        causal = self.model.attention == "block-causal"
        if geometry is None:
            length = block_length or getattr(config, "block_length", None) or 32
            geometry = FixedBlocks(length, aligned=causal if aligned is None else aligned)
        found = (mask_id, getattr(tokenizer, "mask_token_id", None), getattr(config, "mask_token_id", None))
        mask_id = next((token for token in found if token is not None), None)
        if mask_id is None:
            raise ValueError("neither the tokenizer nor the model's configuration has a mask token: pass mask_id, the id of the mask token")
        self.mask_id = mask_id
        self.eos_id: int | None = getattr(tokenizer, "eos_token_id", None) if eos_id is None else eos_id
        cache = ("block-append" if causal else "none") if cache is None else cache
        self.engine = Engine(self.model, schedule, geometry, cache, sync_every, wide_cost)
        self._device = getattr(model, "device", None)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        schedule: Schedule | FreeDave | DecodingScheduler | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> TextPipeline:
        """Loads model and tokenizer.

        Args:
            name: "puzzles" for the small model that ships, else a folder or an id on the hub.
            schedule: As in `TextPipeline`.
            dtype: Of the weights; "auto" is what the files hold, and float32 for "puzzles".
            device: Where the model goes.
            trust_remote_code: Whether code that comes with the weights may be run; LLaDA, Dream and SDAR need it.
            revision: Of the repository on the hub.
            local_files_only: Whether nothing may be downloaded.
            attn_implementation: "sdpa" or "eager"; others take no 4-D mask.
            options: Of `TextPipeline`.

        Raises:
            OSError: There is no such model, as transformers says it.
            ValueError: As `TextPipeline`.
        """
        if str(name) == "puzzles":
            from hasten.pipelines.zoo.puzzles import load_puzzles

            model, tokenizer = load_puzzles(torch.float32 if isinstance(dtype, str) else dtype, device)
            return cls(model, tokenizer, schedule, **options)
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        source: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "local_files_only": local_files_only}
        config = AutoConfig.from_pretrained(name, **source)
        # Dream's code registers a plain model only.
        code = getattr(config, "auto_map", None) or {"AutoModelForCausalLM": None}
        loader = AutoModelForCausalLM if "AutoModelForCausalLM" in code else AutoModel
        known = {} if str(config.model_type).lower() in ("llada", "dream") else {"attn_implementation": attn_implementation}
        model = loader.from_pretrained(name, config=config, dtype=dtype, **known, **source).to(device).eval()
        return cls(model, AutoTokenizer.from_pretrained(name, **source), schedule, **options)

    @property
    def exact(self) -> bool:
        """Whether the tokens are those that there would be without a cache."""
        return self.engine.exact

    def __call__(
        self,
        prompts: Prompts,
        *,
        gen_length: int | None = None,
        temperature: float = 0.0,
        tempered: bool = False,
        seeds: int | Sequence[int] | None = None,
        suppressed: Sequence[int] = (),
        stream: Callable[[TextUpdate], None] | None = None,
    ) -> TextOutput:
        """Answers prompts as one batch.

        Args:
            prompts: A text or a list of texts; messages of a chat (dictionaries with role and content) or a list of such lists, for which
                the tokenizer's chat template is used; token ids, as lists of numbers or a tensor without padding.
            gen_length: Tokens of an answer at most, a multiple of the block length; 128 unless told, and None under DAEDAL.
            temperature: Of the Gumbel noise; 0 takes the most probable tokens.
            tempered: Whether confidences come from the distribution at that temperature.
            seeds: One for each row, or the first one's. A row's noise depends on its seed and not on its batch-mates.
            suppressed: Token ids that are never chosen.
            stream: Called for every row after each step. Every step is read back then.

        Raises:
            ValueError: An argument is out of range, a prompt is empty or too long; the message says what to pass.
        """
        if stream is not None:
            options: dict[str, Any] = {"tempered": tempered, "seeds": seeds, "suppressed": suppressed}
            updates = self.stream(prompts, gen_length=gen_length, temperature=temperature, **options)
            while True:
                try:
                    stream(next(updates))
                except StopIteration as end:
                    output: TextOutput = end.value
                    return output
        rows, call = self._prepared(prompts, gen_length, temperature, tempered, seeds, suppressed)
        began = time.perf_counter()
        found = self.engine.generate(rows, **call)
        return self._output(found, began)

    def stream(
        self,
        prompts: Prompts,
        *,
        gen_length: int | None = None,
        temperature: float = 0.0,
        tempered: bool = False,
        seeds: int | Sequence[int] | None = None,
        suppressed: Sequence[int] = (),
    ) -> Generator[TextUpdate, None, TextOutput]:
        """Yields every row after each step; the generator returns what `__call__` does. Arguments and errors as there.

        Raises:
            ValueError: As there; and FreeDave, which tells of no steps.
        """
        rows, call = self._prepared(prompts, gen_length, temperature, tempered, seeds, suppressed)
        began = time.perf_counter()
        steps = replace(self.engine, every=1).stream(rows, **call)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return self._output(end.value, began)
            yield from self._updates(step)

    def vote(
        self,
        prompts: Prompts,
        experts: HEX,
        answer: Callable[[str], Hashable | None],
        *,
        gen_length: int = 256,
        temperature: float = 0.0,
        seeds: int | Sequence[int] | None = None,
    ) -> Votes:
        """Decodes every prompt under every block length of HEX in one batch, and lets the answers vote.

        Args:
            experts: The block lengths and the schedule, which is used in place of the pipeline's.
            answer: From a text to what is voted on; None where there is no answer.
            prompts, gen_length, temperature, seeds: As in `__call__`; seeds are for each prompt and block length.

        Raises:
            ValueError: As in `__call__`; and ties that are broken by likelihood, where the model sees only block by block.
        """
        found, n = self._tokens(prompts), len(experts.block_lengths)
        for length in experts.block_lengths:
            self._check_length(gen_length, length)
        sampling = Sampling(self.mask_id, temperature=temperature)
        numbers = self._seeds(seeds, n * len(found))
        if experts.tie == "likelihood":
            if self.model.attention == "block-causal" or self.engine.cache != "none":
                raise ValueError(
                    "tie='likelihood' needs a bidirectional model without a cache, which sees the whole answer at once: pass tie='first'"
                )
            return self._voted(found, experts, answer, sampling, gen_length, numbers)
        aligned = isinstance(self.engine.geometry, FixedBlocks) and self.engine.geometry.aligned
        blocks = FixedBlocks(tuple(experts.block_lengths) * len(found), aligned)
        engine = replace(self.engine, schedule=experts.schedule, geometry=blocks)
        rows = [row for row in found for _ in range(n)]
        runs = engine.generate(rows, sampling=sampling, length=gen_length, eos_id=self.eos_id, seeds=numbers, device=self._device)
        texts = [self._text(row[:end]) for row, end in zip(runs.tokens.tolist(), runs.lengths.tolist(), strict=True)]
        answers = [[answer(text) for text in texts[i : i + n]] for i in range(0, len(texts), n)]
        return Votes(answers, [vote(each) for each in answers], runs)

    def steer(
        self,
        prompts: Prompts,
        verifier: Verifier | Callable[..., Any],
        method: SteeringMethod | None = None,
        *,
        gen_length: int = 128,
        schedule: Ancestral | StaticDecoding | None = None,
        temperature: float = 1.0,
        suppressed: Sequence[int] = (),
        completions: int = COMPLETIONS,
        budget: Budget | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
    ) -> SteeredText:
        """Answers prompts with several particles each, which are judged on the way; see `steer_text`.

        Rows are forwarded whole, without the pipeline's cache, and its schedule is not used.

        Args:
            prompts: As in `__call__`.
            verifier: What is maximised: a callable f(answers, prompts) on texts, with one number for each answer.
            method: `FKSteering` unless told.
            gen_length: As in `__call__`.
            schedule: What a step reveals: `Ancestral(steps)` or `StaticDecoding`; see `steer_text`.
            temperature, suppressed, completions, budget, seed, micro_batch: As in `steer_text`.

        Raises:
            ValueError: As in `__call__`; and blocks that are not all of one length.
            BudgetError, SteeringError, VerifierError: As in `steer_text`.
        """
        geometry = self.engine.geometry
        if not isinstance(geometry, FixedBlocks) or not isinstance(geometry.block_length, int):
            raise ValueError(f"steering needs blocks of one length, and this pipeline has {geometry}: pass block_length to it")
        self._check_length(gen_length, geometry.block_length)
        found = self._tokens(prompts)
        ids, mask = self._padded(found)
        return steer_text(
            method if method is not None else FKSteering(),
            self.model,
            ids,
            verifier,
            mask_id=self.mask_id,
            length=gen_length,
            schedule=schedule,
            temperature=temperature,
            suppressed=suppressed,
            block_length=geometry.block_length,
            aligned=geometry.aligned,
            prompt_mask=mask,
            eos_id=self.eos_id,
            completions=completions,
            decode=lambda answers: [self._text(row) for row in answers.tolist()],
            prompts=[self.tokenizer.decode(row, skip_special_tokens=True) for row in found],
            budget=budget,
            seed=seed,
            micro_batch=micro_batch,
        )

    def _voted(
        self,
        rows: list[list[int]],
        experts: HEX,
        answer: Callable[[str], Hashable | None],
        sampling: Sampling,
        length: int,
        seeds: Sequence[int],
    ) -> Votes:
        ids, mask = self._padded(rows)
        logits_fn: LogitsFn = self.model
        return experts.decode(
            logits_fn,
            ids,
            lambda tokens: answer(self._text(tokens)),
            sampling=sampling,
            length=length,
            prompt_mask=mask,
            eos_id=self.eos_id,
            seeds=seeds,
        )

    # -------------------------------------------------------------------------------------------------------- in and out

    def _prepared(
        self,
        prompts: Prompts,
        gen_length: int | None,
        temperature: float,
        tempered: bool,
        seeds: int | Sequence[int] | None,
        suppressed: Sequence[int],
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Token ids, and the other arguments of the engine."""
        geometry, rows = self.engine.geometry, self._tokens(prompts)
        if gen_length is None and not geometry.inserts:
            gen_length = 128
        if isinstance(geometry, FixedBlocks) and gen_length is not None:
            for length in geometry.block_length if isinstance(geometry.block_length, tuple) else (geometry.block_length,):
                self._check_length(gen_length, length)
        sampling = Sampling(self.mask_id, tuple(suppressed), temperature, tempered)
        numbers = self._seeds(seeds, len(rows))
        return rows, {"sampling": sampling, "length": gen_length, "eos_id": self.eos_id, "seeds": numbers, "device": self._device}

    def _tokens(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        several = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        if several and isinstance(several[0], Mapping | int):
            several = [several]
        if not several:
            raise ValueError("prompts must be at least one: pass a text, messages of a chat, or token ids")
        rows = [self._encoded(prompt) for prompt in several]
        context = self.model.context
        for row, prompt in zip(rows, several, strict=True):
            if not row:
                raise ValueError(f"prompt {prompt!r} is empty: pass at least one token")
            if context is not None and len(row) >= context:
                raise ValueError(f"a prompt has {len(row)} tokens and the model's context {context}: pass a shorter one")
        return rows

    def _encoded(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids) if prompt.strip() else []
        if isinstance(prompt, list | tuple) and prompt and all(isinstance(message, Mapping) for message in prompt):
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise ValueError("the tokenizer has no chat template for messages: pass texts or token ids")
            return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
        if isinstance(prompt, list | tuple) and all(type(token) is int and token >= 0 for token in prompt):
            return list(prompt)
        raise ValueError(f"prompts must be texts, messages of a chat (role and content), or token ids, not {prompt!r}")

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids [N, n] padded on the left, and a mask [N, n] that is False at the padding."""
        longest = max(map(len, rows))
        missing = torch.tensor([longest - len(row) for row in rows], device=self._device)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self._device)
        return ids, torch.arange(longest, device=ids.device) >= missing[:, None]

    @staticmethod
    def _check_length(gen_length: int, block_length: int) -> None:
        if type(gen_length) is not int or gen_length < 1 or gen_length % block_length:
            raise ValueError(f"gen_length must be a multiple of the block length, {block_length}, not {gen_length!r}")

    @staticmethod
    def _seeds(seeds: int | Sequence[int] | None, rows: int) -> Sequence[int]:
        if seeds is None or isinstance(seeds, int):
            return range(seeds or 0, (seeds or 0) + rows)
        return seeds

    def _text(self, tokens: list[int]) -> str:
        """What stands before the first end-of-text."""
        end = tokens.index(self.eos_id) if self.eos_id is not None and self.eos_id in tokens else len(tokens)
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))

    def _output(self, found: Generated, began: float) -> TextOutput:
        rows = list(zip(found.tokens.tolist(), found.steps.tolist(), found.lengths.tolist(), strict=True))
        seconds = time.perf_counter() - began  # what was read just now has waited for the device
        return TextOutput(
            texts=[self._text(tokens[:length]) for tokens, _, length in rows],
            tokens=[tokens[:length] for tokens, _, length in rows],
            steps=[steps[:length] for _, steps, length in rows],
            forwards=found.forwards.tolist(),
            wasted=found.wasted.tolist(),
            calls=found.calls,
            read_backs=found.read_backs,
            seconds=seconds,
            exact=self.exact,
        )

    def _updates(self, step: Step) -> list[TextUpdate]:
        rows = zip(*(values.tolist() for values in (step.index, step.clock, step.tokens, step.marks, step.done)), strict=True)
        return [self._update(*row) for row in rows]

    def _update(self, row: int, clock: int, tokens: list[int], marks: list[int], done: bool) -> TextUpdate:
        final = next((place for place, mark in enumerate(marks) if mark != FINAL), len(marks))
        known = [token for token, mark in zip(tokens, marks, strict=True) if mark != MASKED]
        # A character of several tokens that is not whole yet is held back.
        return TextUpdate(row, clock, tokens, marks, self._text(tokens[:final]).rstrip("\ufffd"), self._text(known), done)


__all__ = ["TextOutput", "TextPipeline", "TextUpdate"]
