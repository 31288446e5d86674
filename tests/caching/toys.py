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
