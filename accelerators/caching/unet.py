"""Finds the deep branches of a UNet: everything below one of its skip connections (DeepCache, arXiv 2312.00858).

A UNet's down layers each leave a skip, and its up layers take them in the opposite order. Deep branch b is what lies between skip b + 1
on the way down and the layer that takes that skip on the way up: while its output is reused only the layers above it run, and the
present latents still enter through skips 0 to b. Found by structure (`conv_in`, blocks with `resnets`), not by class.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.accelerators.dispatch import Call, Handler

_LISTS = {"resnets", "attentions", "downsamplers", "upsamplers"}


@dataclass(frozen=True)
class Layer:
    """Modules of one down or up layer, by path, with the block that they stand in and their time."""

    block: str
    modules: tuple[str, ...]
    time: float = 0.0


@dataclass(frozen=True)
class Deep:
    """The layers of a UNet.

    Attributes:
        down: In call order; layer i leaves skip i + 1 (skip 0 is that of the input convolution).
        middle: Path of the block between, or None.
        up: In call order; layer i takes skip `len(down) - i`.
        middle_time: Seconds of the block between.
    """

    down: tuple[Layer, ...]
    middle: str | None
    up: tuple[Layer, ...]
    middle_time: float = 0.0

    @property
    def sites(self) -> tuple[str, ...]:
        """For each deep branch, from the shallowest cut on, the module whose output is reused."""
        return tuple(self._producer(branch) for branch in range(len(self.down)))

    def _producer(self, branch: int) -> str:
        at = self.consumer(branch) - 1
        layer = self.up[at]
        last = at + 1 == len(self.up) or self.up[at + 1].block != layer.block
        return layer.block if last else layer.modules[-1]

    def consumer(self, branch: int) -> int:
        """The first up layer that runs while deep branch `branch` is reused."""
        return len(self.up) - 1 - branch

    def skipped(self, branch: int) -> tuple[str, ...]:
        """Modules that need not run while the deep branch is reused, blocks as a whole where all their layers rest."""
        down, up = self.down[branch:], self.up[: self.consumer(branch)]
        running = {layer.block for layer in (*self.down[:branch], *self.up[self.consumer(branch) :])}
        found = {layer.block: None for layer in (*down, *up) if layer.block not in running}
        found |= {path: None for layer in (*down, *up) if layer.block in running for path in layer.modules}
        if self.middle is not None:
            found[self.middle] = None
        found.pop(self._producer(branch), None)
        return tuple(found)

    def seconds(self, branch: int) -> float:
        """Time of what is skipped."""
        return self.middle_time + sum(layer.time for layer in (*self.down[branch:], *self.up[: self.consumer(branch)]))


def deep_branch(denoiser: nn.Module) -> Deep | None:
    """The layers of a UNet; None where the network is none, or is built otherwise."""
    downs, ups = getattr(denoiser, "down_blocks", None), getattr(denoiser, "up_blocks", None)
    if not isinstance(downs, nn.ModuleList) or not isinstance(ups, nn.ModuleList) or not hasattr(denoiser, "conv_in"):
        return None
    down = [layer for i, block in enumerate(downs) for layer in _layers(block, f"down_blocks.{i}", "downsamplers")]
    # An upsampler belongs to the layer before it.
    up = [layer for i, block in enumerate(ups) for layer in _layers(block, f"up_blocks.{i}", None)]
    if not down or len(up) != len(down) + 1 or any(layer.modules == () for layer in (*down, *up)):
        return None
    middle = "mid_block" if isinstance(getattr(denoiser, "mid_block", None), nn.Module) else None
    return Deep(tuple(down), middle, tuple(up))


def _layers(block: nn.Module, path: str, extra: str | None) -> Iterable[Layer]:
    lists = {name for name, child in block.named_children() if isinstance(child, nn.ModuleList)}
    resnets, attentions = getattr(block, "resnets", None), getattr(block, "attentions", None)
    if not isinstance(resnets, nn.ModuleList) or not lists <= _LISTS:
        yield Layer(path, ())  # not built as expected
        return
    for j in range(len(resnets)):
        both = isinstance(attentions, nn.ModuleList) and len(attentions) == len(resnets)
        yield Layer(path, (f"{path}.resnets.{j}", f"{path}.attentions.{j}") if both else (f"{path}.resnets.{j}",))
    if extra is not None and isinstance(samplers := getattr(block, extra, None), nn.ModuleList):
        yield Layer(path, tuple(f"{path}.{extra}.{j}" for j in range(len(samplers))))


class LayerClock:
    """Times every layer of a UNet during one pass."""

    def __init__(self, denoiser: nn.Module, deep: Deep) -> None:
        self.denoiser, self.deep = denoiser, deep
        self.seconds: dict[str, float] = {}

    def handlers(self) -> dict[nn.Module, Handler]:
        """To be put on for the pass."""
        layers = (*self.deep.down, *self.deep.up)
        paths = {path for layer in layers for path in layer.modules} | ({self.deep.middle} if self.deep.middle else set())
        return {self.denoiser.get_submodule(path): self._handler(path) for path in paths}

    def _handler(self, path: str) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            out = call(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[path] = self.seconds.get(path, 0.0) + time.perf_counter() - began
            return out

        return handle

    def timed(self, total: float) -> Deep:
        """The layers with their times, which together do not exceed `total` seconds."""
        scale = min(1.0, total / spent) if (spent := sum(self.seconds.values())) else 1.0

        def of(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            return tuple(replace(layer, time=scale * sum(self.seconds.get(path, 0.0) for path in layer.modules)) for layer in layers)

        middle = scale * self.seconds.get(self.deep.middle, 0.0) if self.deep.middle else 0.0
        return replace(self.deep, down=of(self.deep.down), up=of(self.deep.up), middle_time=middle)
