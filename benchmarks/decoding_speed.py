"""Time per token of the engine against diffusers' own pipeline, with the same model, schedule and tokens.

`LLaDA2Pipeline` forwards the whole prefix at every step and computes logits for all of it. The engine forwards the block. Weights are
random: speed does not depend on what they say, and the schedule commits a number of tokens in every step whatever the confidence is.

    python -m hasten.benchmarks.decoding_speed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import LLaDA2Pipeline
from torch import Tensor

from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.benchmarks.harness import Bar, steady_memory
from hasten.pipelines import decoding_schedulers
from hasten.pipelines.text import TextPipeline
from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesConfig, PuzzlesForMaskedLM

LIMIT = 1 / 3
"""The bar: the engine's time per token over the pipeline's."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        width, layers, heads, inner, vocabulary: Of the model: 53 million weights in its layers, 5 more in the embedding.
        prompt, answer: Tokens; together the length that is reached.
        block_length: 32 in LLaDA2.
        minimum: Tokens that each step commits at least.
        batch: Rows.
        repeats: Runs of each variant, which take turns.
    """

    width: int = 640
    layers: int = 10
    heads: int = 10
    inner: int = 1920
    vocabulary: int = 8192
    prompt: int = 256
    answer: int = 256
    block_length: int = 32
    minimum: int = 8
    batch: int = 1
    repeats: int = 1


def new_model(settings: Settings) -> Any:
    """A block-causal Qwen3 with random weights, which takes the pipeline's 2-D mask and the engine's 4-D one."""
    torch.manual_seed(0)
    config = PuzzlesConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.width // settings.heads,
        max_position_embeddings=settings.prompt + settings.answer,
        tie_word_embeddings=True,
        block_length=settings.block_length,
    )
    return PuzzlesForMaskedLM(config).eval()


def measure(settings: Settings | None = None) -> list[dict[str, Any]]:
    """A row for the pipeline, first, and one for the engine: the median time per token, model calls and whether the tokens are the same."""
    settings = settings or Settings()
    steady_memory()
    model, mask_id = new_model(settings), settings.vocabulary - 1
    prompts = torch.randint(0, mask_id, (settings.batch, settings.prompt), generator=torch.Generator().manual_seed(1))
    scheduler = decoding_schedulers.ThresholdDecoding(threshold=0.9, minimum=settings.minimum, block_length=settings.block_length)
    pipe = LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    schedule = ThresholdDecoding(0.9, minimum=settings.minimum)
    # The ids are all that is compared.
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "", eos_token_id=None)
    engine = TextPipeline(model, tokenizer, schedule, mask_id=mask_id, block_length=settings.block_length)
    calls = []

    def theirs() -> Tensor:
        steps = settings.block_length
        options: dict[str, Any] = {"editing_threshold": None, "eos_early_stop": False, "output_type": "seq"}
        out = pipe(input_ids=prompts, gen_length=settings.answer, num_inference_steps=steps, mask_token_id=mask_id, **options)
        return out.sequences

    def ours() -> Tensor:
        return torch.tensor(engine(prompts, gen_length=settings.answer).tokens)

    variants: dict[str, Callable[[], Tensor]] = {"LLaDA2Pipeline": theirs, "engine": ours}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, Tensor] = {}
    counter = model.model.register_forward_hook(lambda *_: calls.append(1))
    counts: dict[str, int] = {}
    with torch.no_grad():
        model(prompts[:, : settings.block_length])  # the first forward of a process is slower
        for _ in range(settings.repeats):
            for name, run in variants.items():
                calls.clear()
                began = time.perf_counter()
                found[name] = run()
                seconds[name].append(time.perf_counter() - began)
                counts[name] = len(calls)
    counter.remove()
    tokens = settings.batch * settings.answer
    return [
        {
            "model": f"Qwen3, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M",
            "variant": name,
            "length": settings.prompt + settings.answer,
            "batch": settings.batch,
            "seconds": sorted(times)[len(times) // 2],
            "seconds_per_token": sorted(times)[len(times) // 2] / tokens,
            "calls": counts[name],
            "tokens_unlike": int((found[name] != found["LLaDA2Pipeline"]).sum()),
        }
        for name, times in seconds.items()
    ]


def bar_of(rows: Sequence[Mapping[str, Any]]) -> Bar:
    """The bar, from the rows of `measure`."""
    theirs, ours = rows
    note = f"{1e3 * ours['seconds_per_token']:.1f} ms against {1e3 * theirs['seconds_per_token']:.1f} ms, {ours['model']}, "
    note += f"length {ours['length']}, batch {ours['batch']}; {ours['tokens_unlike']} tokens unlike"
    return Bar.at_most("engine: time per token over LLaDA2Pipeline's", ours["seconds_per_token"] / theirs["seconds_per_token"], LIMIT, note)


if __name__ == "__main__":
    bar = bar_of(measure())
    print(f"{bar.name}: {bar.value:.3f}, at most {bar.limit:.3f} ({bar.note})")
