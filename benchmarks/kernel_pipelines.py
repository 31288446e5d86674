"""Whole pipelines of published sizes with random weights in bfloat16, made on the device: plain, compiled, Delta-DiT and planned.

Time does not depend on what the weights are. Text encoders and VAEs are left out: text is random numbers of its size, and pictures stay
latents.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.scheduler_hook import SchedulerListener, hooked
from hasten.benchmarks.harness import Timing, Variant, interleave
from hasten.benchmarks.peers import DBCache, Peer
from hasten.pipelines.accelerated import AcceleratedPipeline, ComputeAll, accelerate
from hasten.pipelines.planning import plan

PROMPTS = ("a red circle", "a blue square")

Text = Callable[["Subject", Tensor], tuple[Any, ...]]
"""What a pipeline's `encode_prompt` returns, made from embeddings [1, tokens, channels]."""


@dataclass(frozen=True)
class Subject:
    """A pipeline of a published size.

    Attributes:
        name: What it is called.
        pipeline: Its class in diffusers.
        transformer: That of its denoiser.
        config: Of the denoiser, where it is not the class's own.
        scheduler: Its class in diffusers.
        text: (tokens, channels) of the text.
        pooled: Channels of the pooled text, where there is one.
        encode: What `encode_prompt` returns.
        call: Arguments of a call.
    """

    name: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    scheduler: str
    text: tuple[int, int]
    encode: Text
    call: Mapping[str, Any]
    pooled: int = 0


def _flux_text(subject: Subject, text: Tensor) -> tuple[Any, ...]:
    return text, text.new_zeros(1, subject.pooled), text.new_zeros(text.shape[1], 3)


def _pixart_text(subject: Subject, text: Tensor) -> tuple[Any, ...]:
    mask = text.new_ones(text.shape[:2])
    return text, mask, -text, mask


def _sd3_text(subject: Subject, text: Tensor) -> tuple[Any, ...]:
    pooled = text.new_ones(1, subject.pooled)
    return text, -text, pooled, -pooled


def _wan_text(subject: Subject, text: Tensor) -> tuple[Any, ...]:
    return text, -text


PIPELINES = {
    "FLUX.1-dev": Subject(
        "FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}, "FlowMatchEulerDiscreteScheduler", (512, 4096),
        _flux_text, {"height": 1024, "width": 1024, "num_inference_steps": 28}, 768,
    ),
    "PixArt-alpha-XL": Subject(
        "PixArt-alpha-XL", "PixArtAlphaPipeline", "PixArtTransformer2DModel", {"sample_size": 64, "caption_channels": 4096},
        "DPMSolverMultistepScheduler", (120, 4096), _pixart_text,
        {"height": 512, "width": 512, "num_inference_steps": 20, "use_resolution_binning": False},
    ),
    "SD3-medium": Subject(
        "SD3-medium", "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        "FlowMatchEulerDiscreteScheduler", (333, 4096), _sd3_text, {"height": 1024, "width": 1024, "num_inference_steps": 28}, 2048,
    ),
    "Wan2.1-1.3B": Subject(
        "Wan2.1-1.3B", "WanPipeline", "WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        "FlowMatchEulerDiscreteScheduler", (512, 4096), _wan_text,
        {"height": 480, "width": 832, "num_frames": 33, "num_inference_steps": 20},
    ),
}  # fmt: skip
"""The sizes of the published checkpoints; 33 frames and 20 steps keep the video short."""


@contextmanager
def _made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(subject: Subject, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pipeline of diffusers, its denoiser made at random on the device, its text encoders replaced by random text."""
    torch.manual_seed(0)
    with _made_in(dtype, device):
        denoiser = getattr(diffusers, subject.transformer)(**subject.config).eval()
    kind = getattr(diffusers, subject.pipeline)
    parts: dict[str, Any] = dict.fromkeys(kind._get_signature_keys(kind)[0])
    parts |= {"transformer": denoiser, "scheduler": getattr(diffusers, subject.scheduler)()}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)

    def encode(prompt: str | Sequence[str], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        made = []
        for words in [prompt] if isinstance(prompt, str) else prompt:
            generator = torch.Generator().manual_seed(zlib.crc32(words.encode()))
            text = torch.randn(1, *subject.text, generator=generator).to(device, dtype)
            made.append(subject.encode(subject, text))
        return tuple(torch.cat(column) if len(column[0]) == 1 else column[0] for column in zip(*made, strict=True))  # ids are no batch

    pipe.encode_prompt = encode
    return pipe


@dataclass(frozen=True)
class Way:
    """One way to run a pipeline.

    Attributes:
        pipe: What is called.
        kernels: Whether the fused kernels may be used.
        peer: Another project's cache, put on for each run.
        warmups: Runs that are not counted: with graphs three, after which all of them are made.
    """

    pipe: Any
    kernels: bool = True
    peer: Peer | None = None
    warmups: int = 1

    @property
    def bound(self) -> float | None:
        """The most that its plan allows; 1 for the plain pipeline, None where nobody says."""
        if self.peer is not None:
            return None
        return self.pipe.report.bound if isinstance(self.pipe, AcceleratedPipeline) else 1.0

    def timed(self, subject: Subject, device: torch.device, seed: int) -> float:
        """Seconds of a run."""
        with ExitStack() as stack:
            if not self.kernels:
                stack.enter_context(_environment("HASTEN_KERNELS", "reference"))
            if self.peer is not None:
                stack.enter_context(self.peer.on(self.pipe, steps=subject.call["num_inference_steps"]))
            begin = time.perf_counter()
            self.pipe(PROMPTS[0], generator=torch.Generator().manual_seed(seed), output_type="latent", **subject.call)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


COMPUTED = "all computed"
"""Nothing is reused: what the blocks' kernels alone are worth."""


def ways_of(pipe: Any, planned: Plan) -> dict[str, Way]:
    """Plain, Delta-DiT and a plan, each with and without graphs and kernels where that makes a difference, and cache-dit if it is here."""
    eight = accelerate(pipe, planned, state="int8")
    ways = {
        "plain": Way(pipe),
        COMPUTED: Way(accelerate(pipe, ComputeAll())),
        "Delta-DiT": Way(accelerate(pipe, DeltaDiT())),
        "Delta-DiT, graphs": Way(accelerate(pipe, DeltaDiT(), graphs=True), warmups=3),
        "Delta-DiT, without kernels": Way(accelerate(pipe, DeltaDiT()), kernels=False),
        "planner": Way(accelerate(pipe, planned)),
        "planner, graphs": Way(accelerate(pipe, planned, graphs=True), warmups=3),
        "planner, without kernels": Way(accelerate(pipe, planned), kernels=False),
        "planner, int8 state": Way(eight),
        "planner, int8 state, without kernels": Way(eight, kernels=False),
    }
    peer = DBCache(threshold=0.12, warmup=8, continuous=-1)
    return ways | ({"cache-dit": Way(pipe, peer=peer)} if peer.version is not None else {})


class OutOfTime(RuntimeError):
    """There is too little time left to measure something; the message says how much it needs."""


def time_pipeline(
    subject: Subject, device: torch.device, compiled: bool, deadline: float = float("inf"), rounds: int = 3, speedup: float = 2.0
) -> list[dict[str, Any]]:
    """A row for each variant; the runs of all take turns.

    Args:
        subject: What is built; its memory is free again afterwards.
        device: Where it runs.
        compiled: Compile blocks one by one and time that, too, if there is time left.
        deadline: Of `time.monotonic`; nothing is begun that is expected to end after it.
        rounds: How often each runs.
        speedup: What the planner is asked for.

    Raises:
        OutOfTime: There is too little time for any of it.
        ValueError: That speed-up is out of reach.
    """
    try:
        return _rows(subject, device, compiled, deadline, rounds, speedup)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(subject: Subject, device: torch.device, compiled: bool, deadline: float, rounds: int, speedup: float) -> list[dict[str, Any]]:
    _fits(BUILDING, deadline)
    pipe = build(subject, device)
    plain = min(Way(pipe).timed(subject, device, r) for r in range(2))
    # Ten ways, together as long as seven plain runs, and what the planner tries.
    whole = plain * (7 * (rounds + 1) + 16)
    _fits(whole, deadline)
    planned = plan(pipe, PROMPTS, speedup=speedup, replays=1, batch=1, progress=False, **subject.call)
    ways = ways_of(pipe, planned)
    rows = _timed(subject, ways, pipe.scheduler, device, rounds, "")
    if compiled:
        try:
            _fits(whole + COMPILING, deadline)
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
            # What cache-dit puts on does not go with blocks that were compiled before.
            ours = {name: way for name, way in ways.items() if way.peer is None}
            rows += _timed(subject, ours, pipe.scheduler, device, rounds, ", compiled")
        except RuntimeError as error:  # the compiler's too: what was measured before is not lost
            rows.append(not_run(subject, "compiled", error))
    return [{**row, "speedup": rows[0]["seconds"] / row["seconds"] if row["seconds"] else None} for row in rows]


BUILDING, COMPILING = 30.0, 60.0
"""Seconds that making a pipeline and compiling its blocks are given."""


def _fits(seconds: float, deadline: float) -> None:
    """Raises OutOfTime where there are fewer."""
    left = deadline - time.monotonic()
    if seconds > left:
        raise OutOfTime(f"about {seconds:.0f} s are needed, {max(left, 0.0):.0f} s are left")


def not_run(subject: Subject, variant: str, error: Exception) -> dict[str, Any]:
    """A row that says why there is no number."""
    why = " ".join(str(error).partition(". ")[0].split())[:120]
    return {"part": "pipelines", "name": subject.name, "variant": f"{variant}: not run, {why}", **dict.fromkeys(NUMBERS)}


NUMBERS = ("seconds", "bound", "waits", "speedup")


def _timed(
    subject: Subject, ways: Mapping[str, Way], scheduler: Any, device: torch.device, rounds: int, suffix: str
) -> list[dict[str, Any]]:
    waits: dict[str, int | None] = {}

    def variant(name: str, way: Way) -> Variant:
        def run(r: int) -> Timing:
            took = way.timed(subject, device, r)
            return Timing(took, took)

        for r in range(way.warmups - 1):
            run(r)
        waits[name] = synchronisations(lambda: run(way.warmups - 1), scheduler, subject.call["num_inference_steps"], device)
        return Variant(name, run)

    timings = interleave([variant(name, way) for name, way in ways.items()], rounds)
    rows = []
    for name, way in ways.items():
        took = statistics.median(timing.seconds for timing in timings[name])
        row = {"part": "pipelines", "name": subject.name, "variant": f"{name}{suffix}", "seconds": took, "bound": way.bound}
        rows.append({**row, "waits": waits[name]})
    return rows


def synchronisations(run: Callable[[], object], scheduler: Any, steps: int, device: torch.device) -> int | None:
    """How often the host waits for the device between the first step of a run and the last, as far as PyTorch tells; None where there is
    no such device. What is done once for a run (weights that are compared with a plan's, a trace) is before and behind."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said, hooked(scheduler, _Between(steps, before)):
        warnings.simplefilter("always")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


class _Between(SchedulerListener):
    """Has PyTorch tell of waits from the end of a run's first step to that of its last but one."""

    def __init__(self, steps: int, before: int) -> None:
        self.steps, self.before, self.done = steps, before, 0

    def timesteps_set(self, scheduler: Any) -> None:
        self.done = 0

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        return None

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        self.done += 1
        torch.cuda.set_sync_debug_mode("warn" if self.done < self.steps - 1 else self.before)

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        return None
