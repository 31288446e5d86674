"""Toy denoisers whose arithmetic can be followed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 4


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Affine(nn.Module):
    """x -> x + tanh(a x + b): an offset that depends on x. `form` is what it returns the result in."""

    def __init__(self, seed: int, form: str = "tensor") -> None:
        super().__init__()
        self.a = nn.Parameter(randn(seed, WIDTH))
        self.b = nn.Parameter(randn(1000 + seed, WIDTH))
        self.form = form
        self.calls = 0

    def offset(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a * x + self.b)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        out = x + self.offset(x)
        return {"tensor": out, "tuple": (out,), "list": [out]}.get(self.form, out)


class InPlace(Affine):
    """The same, written into the tensor that it is given and returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.add_(self.offset(x))


class Scratch(Affine):
    """Returns a new tensor, but ruins the one it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = x + self.offset(x)
        x.zero_()
        return out


class Two(nn.Module):
    """Two streams, `(text, x)` or a list of them, each moved by the other."""

    def __init__(self, seed: int, form: Callable[[list[Tensor]], Any] = tuple) -> None:
        super().__init__()
        self.a = nn.Parameter(randn(seed, WIDTH))
        self.form = form
        self.calls = 0

    def forward(self, x: Tensor, text: Tensor) -> Any:
        self.calls += 1
        return self.form([text + torch.tanh(self.a * x.mean(1, keepdim=True)), x + torch.sin(self.a * x + text.mean(1, keepdim=True))])


class Toy(nn.Module):
    """Blocks in a row. `between(i, x, t)` is what the model does before block i (1, 2, ...)."""

    def __init__(self, blocks: Sequence[nn.Module], between: Callable[[int, Tensor, float], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.between = between

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        x = x * (1.0 + 0.1 * t)
        for i, block in enumerate(self.blocks):
            if i and self.between is not None:
                x = self.between(i, x, t)
            out = block(x)
            x = out[0] if isinstance(out, tuple | list) else out
        return x * 2.0


class Dual(nn.Module):
    """Two streams, and the output of the image alone."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x * 1.5
        for block in self.blocks:
            text, x = block(x, text)
        return x


def chain(n: int, kind: type[Affine] = Affine, **options: Any) -> Toy:
    return Toy([kind(seed, **options) for seed in range(n)]).eval()


class Guided(nn.Module):
    """Blocks in a row, and a conditioning tensor that moves them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, timestep: Any, cond: Tensor, scale: float = 1.0) -> Tensor:
        x = x + 0.5 * scale * cond.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return x * 0.5


def guided(n: int = 4, seed: int = 0) -> Guided:
    return Guided([Affine(seed + s) for s in range(n)]).eval()


class Loop:
    """The least that can be called a pipeline: begin anywhere, one or two calls a step, perhaps a second denoiser for the late steps."""

    def __init__(self, transformer: nn.Module, scheduler: Any, transformer_2: nn.Module | None = None) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        if transformer_2 is not None:
            self.transformer_2 = transformer_2

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        cond: Sequence[Tensor],
        num_inference_steps: int = 6,
        *,
        begin: int = 0,
        handover: int | None = None,
        scale: bool = True,
        rounds: int = 1,
        on_step: Callable[[Loop, int], None] | None = None,
    ) -> Tensor:
        for _ in range(rounds):
            self.scheduler.set_timesteps(num_inference_steps)
            for i, t in enumerate(self.scheduler.timesteps[begin:]):
                network = self.transformer if handover is None or i < handover else self.transformer_2
                x = self.scheduler.scale_model_input(latents, t) if scale else latents
                told = t / 7 if scale else t  # a denoiser that is told the noise in another measure than the scheduler's
                outputs = [network(x, told.expand(x.shape[0]), c) for c in cond]
                latents = self.scheduler.step(sum(outputs) / len(outputs), t, latents, return_dict=False)[0]
                if on_step is not None:
                    on_step(self, i)
        return latents
