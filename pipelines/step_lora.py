"""Step LoRAs: the adapters that distillation trains, in the format of diffusers, with what they were trained for beside them.

    lora = StepLoRA.load("runs/steps")
    with lora.applied(pipe, steps=4) as call:
        image = pipe("a red circle", **call).images[0]

Pipelines that load LoRAs take the file too (`pipe.load_lora_weights`); some, as PixArt's, have no such method, and are served here.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.accelerators.caching.trace import config_hash, weight_facts
from hasten.accelerators.distillation.adapters import carried
from hasten.accelerators.distillation.dmd import few_nodes
from hasten.accelerators.distillation.grid import Grid
from hasten.pipelines.particle_rows import default
from hasten.pipelines.solver_schedulers import GammaScheduler

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
"""What `pipe.load_lora_weights(folder)` looks for."""
FACTS = "hasten"
"""Key of the facts in the file's metadata."""
_CONFIG, _WEIGHTS = "config", "weights"


@dataclass(frozen=True)
class StepLoRA:
    """Adapters of one denoiser for a few numbers of steps.

    Attributes:
        denoiser: Name of the network in its pipeline ("transformer", "unet").
        factors: By the names that diffusers gives them, without the denoiser's: A [rank, in] and B [out, rank], whose scale is 1.
        facts: Plain data: class, config hash and weight hash of the base, method, rank, the range of guidance that is folded in, and for
            each number of steps its timesteps and gamma.
    """

    denoiser: str
    factors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Of every adapter."""
        return int(self.facts["rank"])

    @property
    def guidance(self) -> tuple[float, float]:
        """Lowest and highest guidance scale that was folded in."""
        low, high = self.facts["guidance"]
        return float(low), float(high)

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps it was trained for."""
        return tuple(sorted(int(count) for count in self.facts["steps"]))

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are adapted."""
        return list(dict.fromkeys(name.rsplit(".", 2)[0] for name in self.factors))

    @property
    def hash(self) -> str:
        """Of the factors."""
        digest = hashlib.sha256()
        for name, factor in sorted(self.factors.items()):
            digest.update(name.encode() + factor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def timesteps(self, steps: int) -> list[float]:
        """Of the scheduler, for a number of steps.

        Raises:
            ValueError: It was not trained for that many.
        """
        if str(steps) not in self.facts["steps"]:
            raise ValueError(f"steps must be one of {', '.join(map(str, self.steps))}, which the LoRA was trained for, not {steps!r}")
        return [float(time) for time in self.facts["steps"][str(steps)]["timesteps"]]

    def gamma(self, steps: int) -> float:
        """Of `GammaScheduler`, for a number of steps."""
        self.timesteps(steps)
        return float(self.facts["steps"][str(steps)]["gamma"])

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Writes one safetensors file, whole or not at all.

        Args:
            path: The file, or a folder, in which it gets the name that diffusers looks for.
            dtype: Of the factors; as they are by default.

        Returns:
            The file.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / WEIGHTS_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{self.denoiser}.{name}": factor.to(dtype or factor.dtype).contiguous() for name, factor in self.factors.items()}
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(tensors, scratch, {"format": "pt", FACTS: json.dumps({**self.facts, "denoiser": self.denoiser}, sort_keys=True)})
        os.replace(scratch, file)
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepLoRA:
        """Reads what `save` wrote.

        Raises:
            ValueError: It is no safetensors file, or not one of ours.
            FileNotFoundError: There is none.
        """
        file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"no step LoRA at {file}")
        try:
            with safe_open(file, "pt") as opened:
                facts = json.loads((opened.metadata() or {})[FACTS])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no step LoRA saved by hasten ({error}); other LoRAs are loaded by the pipeline") from None
        denoiser = facts.pop("denoiser")
        return cls(denoiser, {name.removeprefix(f"{denoiser}."): tensor for name, tensor in tensors.items()}, facts)

    def check(self, pipe: Any, allow_mismatch: bool = False) -> nn.Module:
        """The pipeline's denoiser, if the adapters are for it.

        Args:
            pipe: A diffusers pipeline.
            allow_mismatch: Lets pass a base of the same architecture with other weights.

        Raises:
            ValueError: They are for another base; the error says what differs.
        """
        network = getattr(pipe, self.denoiser, None)
        if not isinstance(network, nn.Module):
            raise ValueError(f"the LoRA is for a {self.facts['base']}, a pipeline's {self.denoiser}, and {type(pipe).__name__} has none")
        if (kind := type(network).__name__) != self.facts["base"]:
            raise ValueError(f"the LoRA is for another base: a {self.facts['base']}, not this {kind}")
        if (found := config_hash(network)) != self.facts[_CONFIG]:
            raise ValueError(f"the LoRA is for another base: a {kind} of config {self.facts[_CONFIG]}, not {found}")
        if (found := weights_hash(network)) != self.facts[_WEIGHTS] and not allow_mismatch:
            raise ValueError(
                f"the LoRA is for another base: the {kind} has weights {found}, not {self.facts[_WEIGHTS]}; allow_mismatch=True applies it "
                "all the same, to a fine-tuned copy for instance"
            )
        return network

    def call(self, pipe: Any, steps: int, guidance_scale: float | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call.

        Args:
            pipe: The pipeline.
            steps: One of `steps`.
            guidance_scale: That the pictures shall have; it is folded in, and the pipeline applies none of its own.

        Raises:
            ValueError: It was not trained for that many steps or for that guidance.
        """
        self.timesteps(steps)
        low, high = self.guidance
        if guidance_scale is not None and not low <= guidance_scale <= high:
            side = "above" if guidance_scale > high else "below"
            trained = f"{high:g}" if low == high else f"{low:g} to {high:g}"
            raise ValueError(
                f"guidance_scale {guidance_scale:g} is {side} what the student was trained for, {trained}; that is folded into its weights"
            )
        folded = {} if default(pipe, "guidance_scale") is None or self.facts["embedded"] else {"guidance_scale": 1.0}
        return {"num_inference_steps": steps, **folded}

    def scheduler(self, pipe: Any, steps: int, gamma: float | None = None) -> GammaScheduler:
        """The scheduler for a number of steps, on the noise schedule of the pipeline's own.

        Args:
            pipe: The pipeline.
            steps: One of `steps`.
            gamma: From 0 (deterministic) to 1 (all noise anew); what it was found best with by default.
        """
        made: GammaScheduler = GammaScheduler.from_config(
            pipe.scheduler.config, grid=self.timesteps(steps), gamma=self.gamma(steps) if gamma is None else gamma
        )
        return made

    @contextmanager
    def applied(
        self,
        pipe: Any,
        steps: int,
        *,
        gamma: float | None = None,
        guidance_scale: float | None = None,
        allow_mismatch: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Within the block the pipeline takes few steps; after it all is as before.

        Args:
            pipe: A diffusers pipeline, of any class.
            steps, gamma, guidance_scale, allow_mismatch: See `scheduler`, `call` and `check`.

        Yields:
            Arguments for the pipeline's call.

        Raises:
            ValueError: The LoRA is for another base, or was not trained for this.
        """
        network = self.check(pipe, allow_mismatch)
        call, scheduler = self.call(pipe, steps, guidance_scale), self.scheduler(pipe, steps, gamma)
        before = pipe.scheduler
        with carried(network, self.factors, "hasten_steps"), _drawn_by_the_call(pipe, scheduler):
            try:
                pipe.scheduler = scheduler
                yield call
            finally:
                pipe.scheduler = before


@contextmanager
def _drawn_by_the_call(pipe: Any, scheduler: GammaScheduler) -> Iterator[None]:
    """Within the block the scheduler's noise comes from the generator of the pipeline's call: pipelines of flows hand none to its steps."""
    prepare, own = getattr(pipe, "prepare_latents", None), "prepare_latents" in vars(pipe)
    if prepare is None or "generator" not in (signature := inspect.signature(prepare)).parameters:
        yield
        return

    @functools.wraps(prepare)
    def noted(*args: Any, **kwargs: Any) -> Any:
        scheduler.generator = signature.bind(*args, **kwargs).arguments.get("generator")
        return prepare(*args, **kwargs)

    pipe.prepare_latents = noted
    try:
        yield
    finally:
        if own:
            pipe.prepare_latents = prepare
        else:
            del pipe.prepare_latents


def facts_of(
    network: nn.Module, rank: int, method: str, guidance: tuple[float, float], steps: Mapping[int, Sequence[float]], gamma: float
) -> dict[str, Any]:
    """What is written beside the adapters of a network."""
    return {
        "base": type(network).__name__,
        _CONFIG: config_hash(network),
        _WEIGHTS: weights_hash(network),
        "embedded": bool(getattr(getattr(network, "config", None), "guidance_embeds", False)),
        "method": method,
        "rank": rank,
        "guidance": list(guidance),
        "steps": {str(count): {"timesteps": list(times), "gamma": gamma} for count, times in steps.items()},
    }


def weights_hash(network: nn.Module) -> str:
    """Of sampled weights of the base, whatever its dtype."""
    return str(weight_facts(network)["weights"])


def few_steps(grid: Grid, steps: int) -> list[float]:
    """The scheduler's timesteps of a run of so many steps over a grid: the clean ends of as many segments, noisiest first.

    Raises:
        ValueError: The grid has fewer steps.
    """
    return [float(grid.timesteps[node]) for node in few_nodes(grid, steps)]
