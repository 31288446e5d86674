"""Models to time: something that runs one call of a denoiser, plain or under a plan, on noise that is fixed in advance.

`ShapesSubject` is a whole pipeline, `RandomSubject` a denoiser of a published size in a DDIM loop of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.report import RunReport
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.trace import Trace, trace_module
from hasten.accelerators.dispatch import Call, Handler, intercept
from hasten.accelerators.scheduler_hook import hooked
from hasten.benchmarks.harness import Timing
from hasten.pipelines.accelerated import AcceleratedPipeline, accelerate, trace
from hasten.pipelines.zoo.loading import call_defaults
from hasten.pipelines.zoo.shapes.world import sample_scenes

CAPTION_SEED, NOISE_SEED, WEIGHT_SEED = 20_260_101, 20_260_102, 20_260_103
"""Fixed before the first measurement."""

GUIDANCE_SCALE = 4.5
"""The default of `PixArtAlphaPipeline`, where a model recommends none of its own."""

SIZES = {"tiny": (4, 2, 16), "s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
"""Blocks, heads and width of a head: the DiT sizes, of which "xl" is PixArt-alpha's, and one to try things out."""


# ---------------------------------------------------------------------------------------------------------- block times


@contextmanager
def block_clock(denoiser: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, float]]:
    """Adds up the seconds of every block while the bare model runs inside."""
    spent = dict.fromkeys(sites, 0.0)

    def timed(path: str) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            began = time.perf_counter()
            out = call(*args, **kwargs)
            spent[path] += time.perf_counter() - began
            return out

        return handle

    with intercept({denoiser.get_submodule(path): timed(path) for path in sites}):
        yield spent


@dataclass
class Costs:
    """Block times on the bare model, from several plain runs: seconds of every site and of all else, as shares of each run.

    Shares of one run are told well even where the machine's speed changes between runs.
    """

    sites: tuple[str, ...]
    shares: list[list[float]]

    @classmethod
    def empty(cls, sites: tuple[str, ...]) -> Costs:
        """No measurement yet."""
        return cls(sites, [])

    def add(self, spent: Mapping[str, float], loop: float) -> None:
        """One plain run: what its blocks took, and the whole loop."""
        self.shares.append([spent[path] / loop for path in self.sites])

    def of(self, plan: Plan) -> float:
        """Speed-up of the loop if reuse under `plan` were free."""
        blocks = [statistics.median(column) for column in zip(*self.shares, strict=True)]
        return plan.speedup_bound((blocks, max(0.0, 1.0 - sum(blocks))))

    @property
    def share(self) -> float:
        """Part of the loop that is spent in blocks."""
        return statistics.median(sum(row) for row in self.shares)


# ------------------------------------------------------------------------------------------------------------ the models


@dataclass(frozen=True)
class Output:
    """What a variant made in one round: final latents, pictures (uint8) where there are any, and the runtime's report."""

    latents: Tensor
    pictures: Tensor | None = None
    report: RunReport | None = None


class Subject(Protocol):
    """A model under test: runs a variant in a round.

    Attributes:
        trace: Of its denoiser.
        steps: Of the plain run.
    """

    name: str
    trace: Trace
    steps: int

    def run(self, r: int, steps: int, method: DeltaDiT | Plan | None = None, *, force_store: bool = False) -> tuple[Timing, Output]:
        """One call on the noise of round `r`; plain without a method."""
        ...

    def run_timed_blocks(self, r: int, steps: int) -> tuple[dict[str, float], float]:
        """A plain run: seconds of every block, and of the loop."""
        ...


class LoopClock:
    """From the moment the scheduler knows its timesteps to the end of its last step."""

    def __init__(self) -> None:
        self.began = self.ended = self.processor_began = self.processor_ended = 0.0

    def timesteps_set(self, scheduler: Any) -> None:
        self.began, self.processor_began = time.perf_counter(), time.process_time()

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        pass

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        pass

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        self.ended, self.processor_ended = time.perf_counter(), time.process_time()

    def timing(self, call_seconds: float) -> Timing:
        """What was timed, within a call of so many seconds."""
        return Timing(self.ended - self.began, call_seconds, self.processor_ended - self.processor_began)


class ShapesSubject:
    """The pipeline that ships, loaded by plain diffusers in fp32, called as its folder recommends."""

    name = "shapes"

    def __init__(self, folder: Path, *, captions: int, batch: int, steps: int) -> None:
        from diffusers import DiffusionPipeline

        self.pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.steps, self.batch = steps, batch
        self.defaults = {"guidance_scale": GUIDANCE_SCALE, **call_defaults(folder)}
        self.guidance_scale: float = self.defaults["guidance_scale"]
        scenes = sample_scenes(captions, torch.Generator().manual_seed(CAPTION_SEED), held_out=False, placed=False)
        self.captions = [str(caption) for caption in scenes.captions()]
        size, channels = self.pipe.transformer.config.sample_size, self.pipe.transformer.config.in_channels
        self.noise = torch.randn(captions, channels, size, size, generator=torch.Generator().manual_seed(NOISE_SEED))
        self._fast: dict[tuple[DeltaDiT | Plan, bool], AcceleratedPipeline] = {}
        # Traced once and shared: a wrapper would trace in its first call, and that call may be a timed one.
        self.trace = trace(self.pipe, denoiser="transformer", **self._arguments(0, 1))

    def _arguments(self, r: int, steps: int) -> dict[str, Any]:
        part = slice(r * self.batch, (r + 1) * self.batch)
        return {
            **self.defaults,
            "prompt": self.captions[part],
            "num_inference_steps": steps,
            "latents": self.noise[part].to(self.pipe.transformer.dtype),
            "output_type": "pt",
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _wrapper(self, method: DeltaDiT | Plan, force_store: bool) -> AcceleratedPipeline:
        key = (method, force_store)
        if key not in self._fast:
            self._fast[key] = accelerate(self.pipe, method, denoiser="transformer", force_store=force_store)
            self._fast[key].traces["transformer"] = self.trace
        return self._fast[key]

    def _call(self, target: Any, r: int, steps: int) -> tuple[Timing, Output]:
        final: list[Tensor] = []
        arguments = self._arguments(r, steps)
        clock = LoopClock()
        with hooked(self.pipe.scheduler, clock):
            began = time.perf_counter()
            images = target(**arguments, callback=lambda step, timestep, latents: final.append(latents), callback_steps=1).images
            call_seconds = time.perf_counter() - began
        pictures = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        report = target.report if isinstance(target, AcceleratedPipeline) else None
        return clock.timing(call_seconds), Output(final[-1].float(), pictures, report)

    def run(self, r: int, steps: int, method: DeltaDiT | Plan | None = None, *, force_store: bool = False) -> tuple[Timing, Output]:
        return self._call(self._wrapper(method, force_store) if method is not None else self.pipe, r, steps)

    def run_timed_blocks(self, r: int, steps: int) -> tuple[dict[str, float], float]:
        with block_clock(self.pipe.transformer, self.trace.sites) as spent:
            timing, _ = self._call(self.pipe, r, steps)
        return spent, timing.seconds


class RandomSubject:
    """A PixArt denoiser with random weights in bf16, on 256 tokens, one picture under guidance (batch 2), in a DDIM loop."""

    TEXT = (120, 4096)

    def __init__(self, size: str, *, steps: int) -> None:
        from diffusers import DDIMScheduler

        self.name, self.steps = size, steps
        blocks, heads, width = SIZES[size]
        self.denoiser = random_denoiser(blocks, heads, width, self.TEXT[1])
        self.scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
        generator = torch.Generator().manual_seed(NOISE_SEED)
        self.noise = torch.randn(1, 4, 32, 32, generator=generator).bfloat16()
        self.text = torch.randn(2, *self.TEXT, generator=generator).bfloat16()
        self.mask = torch.ones(2, self.TEXT[0], dtype=torch.bfloat16)
        self.trace = trace_module(self.denoiser, (torch.cat([self.noise] * 2),), self._inputs(torch.tensor(500)))

    def _inputs(self, t: Tensor) -> dict[str, Any]:
        return {
            "encoder_hidden_states": self.text,
            "encoder_attention_mask": self.mask,
            "timestep": t.expand(2),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    @torch.no_grad()
    def _loop(self, steps: int, at: Callable[[int], Any] | None = None) -> tuple[Timing, Tensor]:
        self.scheduler.set_timesteps(steps)
        latents = self.noise
        began, processor_began = time.perf_counter(), time.process_time()
        for i, t in enumerate(self.scheduler.timesteps):
            if at is not None:
                at(i)
            out = self.denoiser(torch.cat([latents] * 2), **self._inputs(t))[0].chunk(2, dim=1)[0]
            without, given = out.chunk(2)
            latents = self.scheduler.step(without + GUIDANCE_SCALE * (given - without), t, latents, return_dict=False)[0]
        seconds = time.perf_counter() - began
        return Timing(seconds, seconds, time.process_time() - processor_began), latents

    def run(self, r: int, steps: int, method: DeltaDiT | Plan | None = None, *, force_store: bool = False) -> tuple[Timing, Output]:
        if method is None:
            timing, latents = self._loop(steps)
            return timing, Output(latents)
        began = time.perf_counter()
        with attach(self.denoiser, method, num_inference_steps=steps, trace=self.trace, force_store=force_store) as session:
            timing, latents = self._loop(steps, session.set_step)
        return replace(timing, call_seconds=time.perf_counter() - began), Output(latents, report=session.report)

    def run_timed_blocks(self, r: int, steps: int) -> tuple[dict[str, float], float]:
        with block_clock(self.denoiser, self.trace.sites) as spent:
            timing, _ = self._loop(steps)
        return spent, timing.seconds


def random_denoiser(blocks: int, heads: int, width: int, caption_channels: int) -> nn.Module:
    """A `PixArtTransformer2DModel` in bf16 with seeded random weights: 32x32x4 latents, patch 2."""
    from diffusers import PixArtTransformer2DModel

    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHT_SEED)
        try:
            torch.set_default_dtype(torch.bfloat16)  # made in bf16 at once: the XL size would need 2.4 GB in fp32
            model = PixArtTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width,
                in_channels=4,
                out_channels=8,
                num_layers=blocks,
                cross_attention_dim=heads * width,
                caption_channels=caption_channels,
                sample_size=32,
                patch_size=2,
                use_additional_conditions=False,
            )
        finally:
            torch.set_default_dtype(before)
    return model.eval()
