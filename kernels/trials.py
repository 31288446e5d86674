"""What the ops are tried on: inputs that are drawn anew, what is true of the results in float64, and the same work op by op in PyTorch.

Nothing here is needed to use the ops: `hasten doctor --kernels`, the benchmark and the tests are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels import fused, reference
from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight

Size = tuple[int, int, int]
"""Batch, tokens and channels; for decoding rows, positions and vocabulary."""


class Draw:
    """Random tensors, made on the CPU and moved, so that a seed gives the same ones everywhere.

    Args:
        seed: Of all of them.
        size: What the inputs are made for.
        dtype: Of hidden states and logits.
        device: Where they go.
    """

    def __init__(self, seed: int, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self._generator).to(dtype).to(self.device)

    def hidden(self, channels: int | None = None) -> Tensor:
        """Hidden states [batch, tokens, channels]."""
        return self.normal(*self.size[:2], channels or self.size[2], dtype=self.dtype)

    def table(self) -> Tensor:
        """Of each sample, [batch, 1, channels]."""
        return self.normal(self.size[0], 1, self.size[2], dtype=self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64, from `low` to below `high`."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)


@dataclass(frozen=True)
class Trial:
    """One op in one way of using it.

    Attributes:
        op: Its name, in `hasten.kernels.fused` and in `hasten.kernels.reference`.
        way: What is particular about it.
        make: Draws its arguments.
        chain: The same work op by op, as a model has it; what it gives is not compared.
        error: The largest error of (arguments, results) against float64, over what rounding allows: right up to 1.
        exact: Results are the reference's to the bit.
        bound: Limited by memory alone, so that bandwidth is the measure.
        reads: How often its arguments have to be read: twice where the largest of a column is known only when all rows were seen.
    """

    op: str
    way: str
    make: Callable[[Draw], tuple[Any, ...]]
    chain: Callable[..., Any]
    error: Callable[[tuple[Any, ...], Sequence[Tensor]], float]
    exact: bool = True
    bound: bool = True
    reads: int = 1

    @property
    def name(self) -> str:
        """The op and what is particular."""
        return f"{self.op}, {self.way}" if self.way else self.op

    def kernel(self, backend: Any, args: tuple[Any, ...]) -> list[Tensor] | None:
        """By the kernel: results in order, or None where it does not run."""
        made = getattr(fused, self.op)(backend, *args)
        return None if made is None else tensors(made)

    def reference(self, args: tuple[Any, ...]) -> list[Tensor]:
        """By what the op means."""
        return tensors(getattr(reference, self.op)(*args))

    def traffic(self, args: tuple[Any, ...], made: Sequence[Tensor]) -> int:
        """Bytes that have to move."""
        return traffic(args, made) + (self.reads - 1) * traffic(args, ())


def tensors(value: Any) -> list[Tensor]:
    """Those of a nest, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in value for tensor in tensors(entry)] if isinstance(value, list | tuple) else []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        entries = [mapped(entry, change) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def traffic(args: Any, made: Sequence[Tensor]) -> int:
    """Bytes that must move: each argument read once, each result written once."""
    return sum(tensor.nbytes for tensor in (*tensors(args), *made))


# ---------------------------------------------------------------------------------------------------------- what is allowed

_FLOAT = torch.finfo(torch.float32).eps


def _over(got: Tensor, exact: Tensor, limit: Tensor) -> float:
    """The largest error over what is allowed; infinite where a result is not finite."""
    ratio = ((got.double() - exact).abs() / limit).nan_to_num(nan=torch.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.finfo(dtype).eps * exact.abs()


def _on_grid(values: Tensor, scale: Tensor, exact: Tensor, slack: Tensor) -> float:
    """Of 8 bits: half a step of the grid, beside the slack of what was put on it."""
    step = scale.double() * (0.5 if values.dtype == torch.int8 else 2**-10)
    relative = 0.0 if values.dtype == torch.int8 else 2.0**-4
    return _over(values.double() * scale.double(), exact, step * (1 + 1e-5) + relative * exact.abs() + slack)


def _apply_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    x, values, scales, weights, fix = args
    total, size = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for k, (offset, weight) in enumerate(zip(values, weights, strict=True)):
        term = weight * offset.double() * (scales[k].double() if scales else 1.0)
        total, size = total + term, size + term.abs()
    if fix is not None:
        scale, shift = (table.double()[:, None].repeat_interleave(len(x) // len(table), 0) for table in fix)
        total, size = total * scale + shift, size * scale.abs() + shift.abs()
    exact = x.double() + total
    return _over(made[0], exact, _rounding(exact, x.dtype) + 8 * _FLOAT * (x.double().abs() + size))


def _store_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    after, before, kind = args[:3]
    exact = after.double() - before.double()
    if kind == "bf16":
        return _over(made[0], exact, _rounding(exact, torch.bfloat16) + _FLOAT)
    return _on_grid(made[0], made[1], exact, 4 * _FLOAT * (after.double().abs() + before.double().abs()))


def _modulated(args: tuple[Any, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, their slack) in float64, from x as it was rounded."""
    modulation, norm = args[2], args[3]
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).add(norm.eps).sqrt()
    exact = centred / spread * (1 + modulation.scale.double()) + modulation.shift.double()
    slack = 64 * _FLOAT * (1 + wide.abs().amax(-1, keepdim=True) / spread) * (1 + exact.abs())
    return exact, _rounding(exact, x.dtype) + slack


def _adaln_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    residual, y, modulation = args[:3]
    gated = y.double() * modulation.gate.double()
    exact = residual.double() + gated
    joined = _over(made[0], exact, _rounding(exact, residual.dtype) + 4 * _FLOAT * (residual.double().abs() + gated.abs()))
    rows, slack = _modulated(args, made[0])
    return max(joined, _over(made[1], rows, slack) if len(made) == 2 else _on_grid(made[1], made[2], rows, slack))


def _gelu_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    x, activation = args[0].double(), args[1]
    values, gates = x.chunk(2, -1) if activation == "swiglu" else (torch.ones_like(x), x)
    exact = values * (F.silu(gates) if activation == "swiglu" else gates * torch.special.erfc(-gates * 0.5**0.5) / 2)
    return _on_grid(made[0], made[1], exact, _rounding(exact, args[0].dtype) + 64 * _FLOAT * exact.abs())


def _linear_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    x, weight, grid, fix, activation = args
    if grid is None:
        values, scale = reference.quantise_rows(x, "int8")
    else:
        values, scale = reference.quantise_fixed(x, grid).double() - grid.zero.double(), grid.scale
    y = (values.double() @ weight.values.double().t()) * scale.double() * weight.scale.double()
    size = (values.double().abs() @ weight.values.double().abs().t()) * scale.double() * weight.scale.double()
    y = y if weight.bias is None else y + weight.bias.double()
    y = y if fix is None else y * fix.scale.double() + fix.shift.double()
    exact = F.gelu(y) if activation == "gelu" else y
    return _over(made[0], exact, _rounding(exact, x.dtype) + 16 * _FLOAT * (1 + y.abs() + size))


def _drift_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    now, before = (tensor.flatten(1).double() for tensor in args[:2])
    exact = torch.stack([(now - before).abs().sum(1), before.abs().sum(1)], 1)
    clear = (exact[:, 0] / exact[:, 1] - args[2]).abs() > 1e-4
    wrong = (made[1] != (exact[:, 0] / exact[:, 1] < args[2])) & clear
    return float("inf") if bool(wrong.any()) else _over(made[0], exact, 1e-5 * exact)


def _reindex_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    rows = args[1].tolist()
    wrong = [not torch.equal(out[k].double(), source[row].double()) for out, source in zip(made, args[0], strict=True)
             for k, row in enumerate(rows)]  # fmt: skip
    return float("inf") if any(wrong) else 0.0


def _tokens_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    logits, current, suppressed = args[:3]
    noise = args[-1] if isinstance(args[-1], Noise) else None
    z = logits.double()
    z[..., list(suppressed)] = -torch.inf
    log_p = z.log_softmax(-1)
    first = log_p.topk(2, -1)
    ids, numbers = made[0], made[1].double()
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)
    shown = log_p.gather(-1, current[..., None])[..., 0].exp()
    if bool(((ids < 0) | (ids >= z.shape[-1])).any()):
        return float("inf")
    ranked = log_p
    if noise is not None:
        ranked = log_p + reference.gumbel(noise.seeds, noise.positions, noise.steps, z.shape[-1]).double() * noise.scale
    if bool((ranked.amax(-1) - ranked.gather(-1, ids[0][..., None])[..., 0] > 1e-4).any()):  # another token is ahead, and not by rounding
        return float("inf")
    at_token = log_p.gather(-1, ids[0][..., None])[..., 0]
    exact = torch.stack([at_token, first.values[..., 0], first.values[..., 1].exp(), entropy, z.logsumexp(-1), shown])
    wrong = log_p.gather(-1, ids[1][..., None])[..., 0] != first.values[..., 0]
    return float("inf") if bool(wrong.any()) else _over(numbers[:6], exact, 3e-5 * (1 + exact.abs()))


def _commit_error(args: tuple[Any, ...], made: Sequence[Tensor]) -> float:
    current, selection = args[1], args[3]
    ids, numbers, commits, after = made
    candidates, score = current == selection.mask, numbers[8].double()
    order = score.masked_fill(~candidates, -torch.inf).sort(descending=True, stable=True).indices
    wanted = candidates & (score >= selection.threshold)
    wanted |= candidates & torch.zeros_like(candidates).scatter(1, order[:, : selection.minimum], True)
    if not torch.equal(commits, wanted) or not torch.equal(after, torch.where(commits, ids[0], current)):
        return float("inf")
    exact = numbers[0].double().exp()
    return max(_tokens_error(args, made), _over(score, exact, 1e-5 * (1 + exact)))


# ---------------------------------------------------------------------------------------------------------- op by op


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def _apply_chain(x: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], weights: Sequence[float], fix: Fix | None) -> Tensor:
    total: Tensor | float = 0.0
    for k, (offset, weight) in enumerate(zip(values, weights, strict=True)):
        total = total + weight * (offset.float() * scales[k] if scales else offset).to(x.dtype)
    if fix is not None:
        total = total * fix.scale[:, None].to(x.dtype) + fix.shift[:, None].to(x.dtype)
    return x + total


def _adaln_chain(residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm) -> tuple[Tensor, Tensor]:
    gate, scale, shift = tensors(modulation)
    x = residual + gate * y
    return x, F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps) * (1 + scale) + shift


def _linear_chain(x: Tensor, weight: Weight, grid: Grid | None, fix: Fix | None, activation: str) -> Tensor:
    values, scale = _eight_bits(x.flatten(0, -2))
    y = torch._int_mm(values, weight.values.t()).float() * scale * weight.scale
    y = y if weight.bias is None else y + weight.bias
    y = y if fix is None else y * fix.scale + fix.shift
    return (F.gelu(y) if activation == "gelu" else y).to(x.dtype)


def _drift_chain(now: Tensor, before: Tensor, threshold: float) -> Tensor:
    return ((now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)) < threshold


def _tokens_chain(logits: Tensor, current: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    p = logits.float().softmax(-1)
    first = p.topk(2, -1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
    return first.indices[..., 0], first.values, entropy, p.gather(-1, current[..., None]), logits.float().logsumexp(-1)


# ---------------------------------------------------------------------------------------------------------- all of them


def _apply(draw: Draw, kind: str, terms: int, fixed: bool = False) -> tuple[Any, ...]:
    pairs = [reference.delta_store(draw.hidden(), draw.hidden(), kind) for _ in range(terms)]
    fix = Fix(draw.normal(1, draw.size[2]), draw.normal(1, draw.size[2])) if fixed else None
    scales = [] if kind == "bf16" else [scale for _, scale in pairs]
    return draw.hidden(), [values for values, _ in pairs], scales, [3.0, -3.0, 1.0][:terms] if terms > 1 else [1.0], fix


def _one_of_them(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, values, scales, _, fix = args
    return x, values[0], scales[0], fix


def _as_forecast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, values, scale, fix = args
    return x, [values], [scale], [1.0], fix


def _adaln(draw: Draw, *kind: str) -> tuple[Any, ...]:
    return draw.hidden(), draw.hidden(), Modulation(draw.table(), draw.table(), draw.table()), Norm(), *kind


def _linear(draw: Draw, fixed: bool) -> tuple[Any, ...]:
    columns = draw.size[2]
    out = min(columns, 3072)
    values = draw.integers(-127, 128, out, columns).to(torch.int8)
    weight = Weight(values, draw.normal(out).abs() / 1000, draw.normal(out, dtype=draw.dtype))
    if not fixed:
        return draw.hidden(), weight, None, None, "gelu"
    grid = Grid(draw.normal(1).abs() / 100 + 0.02, draw.integers(-9, 9, 1).float(), values.sum(1, dtype=torch.int32))
    return draw.hidden(), weight, grid, Fix(draw.normal(out), draw.normal(out)), "none"


def _tokens(draw: Draw, temperature: float = 0.0, selection: Selection | None = None) -> tuple[Any, ...]:
    rows, width, vocabulary = draw.size
    current = draw.integers(1, vocabulary, rows, width)
    if selection is not None:
        current[:, ::2] = selection.mask
    noise = Noise(temperature, draw.integers(0, 2**62, rows), draw.integers(0, 9999, rows, width), draw.integers(0, 99, rows))
    chosen = [] if selection is None else [selection]
    return 4 * draw.hidden(), current, [0], *chosen, 1.0, noise if temperature else None


TRIALS = (
    Trial("delta_store", "bf16", lambda draw: (draw.hidden(), draw.hidden(), "bf16"),
          lambda after, before, kind: (after - before).to(torch.bfloat16), _store_error),
    Trial("delta_store", "int8 by token", lambda draw: (draw.hidden(), draw.hidden(), "int8"),
          lambda after, before, kind: _eight_bits(after - before), _store_error),
    Trial("delta_store", "fp8 by channel", lambda draw: (draw.hidden(), draw.hidden(), "fp8", True),
          lambda after, before, kind, by_channel: _eight_bits((after - before).mT), _store_error, reads=2),
    Trial("quantise_rows", "int8", lambda draw: (draw.hidden(), "int8"), lambda x, kind: _eight_bits(x),
          lambda args, made: _store_error((args[0], torch.zeros_like(args[0]), args[1]), made)),
    Trial("delta_apply", "int8, corrected", lambda draw: _one_of_them(_apply(draw, "int8", 1, True)),
          lambda *args: _apply_chain(*_as_forecast(args)), lambda args, made: _apply_error(_as_forecast(args), made)),
    Trial("forecast_apply", "order 2, bf16", lambda draw: _apply(draw, "bf16", 3), _apply_chain, _apply_error),
    Trial("forecast_apply", "order 2, fp8", lambda draw: _apply(draw, "fp8", 3), _apply_chain, _apply_error),
    Trial("gated_residual_adaln", "", _adaln, _adaln_chain, _adaln_error, exact=False),
    Trial("gated_residual_adaln_quant", "int8", lambda draw: _adaln(draw, "int8"),
          lambda *args: _eight_bits(_adaln_chain(*args[:4])[1]), _adaln_error, exact=False),
    Trial("gelu_quant", "gelu, int8", lambda draw: (draw.hidden(), "gelu", "int8"),
          lambda x, *rest: _eight_bits(F.gelu(x)), _gelu_error),
    Trial("gelu_quant", "swiglu, fp8", lambda draw: (draw.hidden(2 * draw.size[2]), "swiglu", "fp8"),
          lambda x, *rest: _eight_bits(x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1])), _gelu_error),
    Trial("drift", "", lambda draw: (now := draw.hidden(), (0.9 * now).to(now.dtype), 0.2), _drift_chain, _drift_error, exact=False),
    Trial("reindex", "8 tensors", lambda draw: ([draw.hidden() for _ in range(8)], draw.integers(0, draw.size[0], draw.size[0])),
          lambda tensors, rows: [tensor[rows] for tensor in tensors], _reindex_error),
    Trial("int8_linear", "own scales, gelu", lambda draw: _linear(draw, False), _linear_chain, _linear_error, exact=False, bound=False),
    Trial("int8_linear", "fixed grid, corrected", lambda draw: _linear(draw, True), _linear_chain, _linear_error, bound=False),
)  # fmt: skip
"""All ops of caching and of blocks."""

DECODING = (
    Trial("token_stats", "greedy", _tokens, _tokens_chain, _tokens_error, exact=False),
    Trial("token_stats", "drawn", lambda draw: _tokens(draw, 0.8), _tokens_chain, _tokens_error, exact=False),
    Trial("token_commit", "threshold", lambda draw: _tokens(draw, 0.0, Selection(1, 0.9)), _tokens_chain, _commit_error, exact=False),
)
"""All ops of decoding."""
