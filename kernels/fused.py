"""The ops by their kernels: brings tensors into the form that a launch takes, makes the outputs, launches.

Each function takes the backend first and returns None where no kernel runs. Inputs are copied only where their channels do not lie next
to each other; outputs and scratch memory are made before the launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels import launch
from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight
from hasten.kernels.backend import Backend
from hasten.kernels.products import int_product


def as_rows(tensor: Tensor) -> Tensor:
    """[batch, ..., channels] as [batch, tokens, channels] with its channels next to each other: a view where that is possible."""
    rows = tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def delta_apply(
    backend: Backend, hidden_states: Tensor, values: Tensor, scale: Tensor | None = None, fix: Fix | None = None
) -> Tensor | None:
    """See `reference.delta_apply`."""
    return forecast_apply(backend, hidden_states, [values], [] if scale is None else [scale], [1.0], fix)


def forecast_apply(
    backend: Backend,
    hidden_states: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    fix: Fix | None = None,
) -> Tensor | None:
    """See `reference.forecast_apply`."""
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    x, offsets = as_rows(hidden_states), [as_rows(value) for value in values]
    by_token = bool(scales) and scales[0].shape[-1] == 1 and scales[0].numel() == x.shape[0] * x.shape[1]
    scales = [scale.contiguous() for scale in scales]
    ran = backend.run(launch.apply, as_rows(out), x, offsets, scales, weights, _dense_fix(fix), by_token=by_token)
    return out if ran else None


EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Types of what is kept in 8 bits."""


def delta_store(backend: Backend, after: Tensor, before: Tensor, kind: str, by_channel: bool = False) -> tuple[Tensor, Tensor] | None:
    """See `reference.delta_store`."""
    if kind == "bf16":
        values, scale = _like(after, torch.bfloat16), torch.empty(0, device=after.device)
        shape = None
    else:
        shape = (len(after), *[1] * (after.ndim - 2), after.shape[-1]) if by_channel else (*after.shape[:-1], 1)
        values, scale = _like(after, EIGHT_BITS[kind]), torch.empty(shape, device=after.device)
    if values.numel() == 0:
        return values, scale
    peaks = torch.zeros(shape, dtype=torch.int32, device=after.device) if by_channel and shape is not None else None
    kept = None if shape is None else scale
    return (values, scale) if backend.run(launch.store, as_rows(values), kept, as_rows(after), as_rows(before), peaks) else None


def quantise_rows(backend: Backend, x: Tensor, kind: str) -> tuple[Tensor, Tensor] | None:
    """See `reference.quantise_rows`."""
    values, scale = _like(x, EIGHT_BITS[kind]), torch.empty((*x.shape[:-1], 1), device=x.device)
    if values.numel() == 0:
        return values, scale
    return (values, scale) if backend.run(launch.store, as_rows(values), scale, as_rows(x), None) else None


def gated_residual_adaln(backend: Backend, residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm) -> tuple[Tensor, Tensor] | None:
    """See `reference.gated_residual_adaln`."""
    x, out = _like(residual), _like(residual)
    return (x, out) if _adaln(backend, x, out, None, residual, y, modulation, norm) else None


def gated_residual_adaln_quant(
    backend: Backend, residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm, kind: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `reference.gated_residual_adaln_quant`."""
    x, values = _like(residual), _like(residual, EIGHT_BITS[kind])
    row_scale = torch.empty((*residual.shape[:-1], 1), device=residual.device)
    return (x, values, row_scale) if _adaln(backend, x, values, row_scale, residual, y, modulation, norm) else None


def _adaln(
    backend: Backend, x: Tensor, out: Tensor, row_scale: Tensor | None, residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm
) -> bool:
    """Fills x, out and where there are 8 bits row_scale; whether it could."""
    if x.numel() == 0:
        return True
    kinds = {table.dtype for table in modulation if table is not None}
    kind = residual.dtype if kinds <= {residual.dtype} else torch.float32
    tables = Modulation(*(None if t is None else as_rows(t.to(kind).expand(residual.shape)) for t in modulation))
    weight, bias = (None if t is None else t.float().contiguous() for t in norm[:2])
    norm = norm._replace(weight=weight, bias=bias)
    return backend.run(launch.adaln, as_rows(x), as_rows(out), row_scale, as_rows(residual), as_rows(y), tables, norm)


def gelu_quant(backend: Backend, x: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor] | None:
    """See `reference.gelu_quant`."""
    shape = (*x.shape[:-1], x.shape[-1] // (2 if activation in launch.GATED else 1))
    values = torch.empty(shape, dtype=EIGHT_BITS[kind], device=x.device)
    scale = torch.empty((*shape[:-1], 1), device=x.device)
    if values.numel() == 0:
        return values, scale
    return (values, scale) if backend.run(launch.gelu, as_rows(values), scale, as_rows(x), activation) else None


def int8_linear(
    backend: Backend, x: Tensor, weight: Weight, grid: Grid | None = None, fix: Fix | None = None, activation: str = "none"
) -> Tensor | None:
    """See `reference.int8_linear`."""
    out = torch.empty((*x.shape[:-1], len(weight.values)), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = x.reshape(-1, x.shape[-1])
    row_scale = None
    if grid is None:
        quantised = quantise_rows(backend, flat, "int8")
        if quantised is None:
            return None
        values, row_scale = quantised
    else:
        grid = Grid(*(None if table is None else table.contiguous() for table in grid))  # type: ignore[arg-type]
        values = _like(flat, torch.int8)
        if not backend.run(launch.fixed_grid, as_rows(values), as_rows(flat), grid):
            return None
    products = int_product(values, weight.values)
    weight = weight._replace(scale=weight.scale.contiguous(), bias=None if weight.bias is None else weight.bias.contiguous())
    ran = backend.run(launch.dequantise, out.view(products.shape), products, row_scale, grid, weight, _dense_fix(fix), activation)
    return out if ran else None


def drift(backend: Backend, now: Tensor, before: Tensor, threshold: float) -> tuple[Tensor, Tensor] | None:
    """See `reference.drift`."""
    batch, device = len(now), now.device
    sums, still = torch.empty(batch, 2, device=device), torch.empty(batch, dtype=torch.bool, device=device)
    if now.numel() == 0:
        return None if batch else (sums, still)
    now, before = (t.flatten(1) for t in (now, before))
    now, before = (t if t.stride(1) == 1 else t.contiguous() for t in (now, before))
    parts = torch.empty(2 * batch * -(-now.shape[1] // (8 * launch.THREADS)), device=device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=device)
    return (sums, still) if backend.run(launch.drift, sums, still, now, before, threshold, parts, arrived) else None


def reindex(backend: Backend, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor] | None:
    """See `reference.reindex`."""
    outs = [torch.empty((len(rows), *t.shape[1:]), dtype=t.dtype, device=t.device) for t in tensors]
    rows = rows.contiguous()
    for batch in {len(t) for t in tensors}:
        pairs = [(out, t.contiguous()) for out, t in zip(outs, tensors, strict=True) if len(t) == batch and out.numel()]
        if not pairs:
            continue
        if not backend.run(launch.reindex, [out for out, _ in pairs], [t for _, t in pairs], rows):
            return None
    return outs


def token_stats(
    backend: Backend, logits: Tensor, current: Tensor, suppressed: Sequence[int], divisor: float = 1.0, noise: Noise | None = None
) -> tuple[Tensor, Tensor] | None:
    """See `reference.token_stats`."""
    return _tokens(backend, logits, current, suppressed, divisor, noise)


def token_commit(
    backend: Backend,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    selection: Selection,
    divisor: float = 1.0,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """See `reference.token_commit`."""
    commits, after = torch.empty_like(current, dtype=torch.bool).contiguous(), torch.empty_like(current).contiguous()
    active = None if selection.active is None else selection.active.contiguous()
    committing = launch.Committing(selection._replace(active=active), commits, after)
    made = _tokens(backend, logits, current, suppressed, divisor, noise, committing)
    return None if made is None else (*made, commits, after)


def _tokens(
    backend: Backend,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    divisor: float,
    noise: Noise | None,
    committing: launch.Committing | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(ids, numbers), or None where no kernel runs."""
    if len(suppressed) > launch.SUPPRESSED:
        return None
    rows, width, vocabulary = logits.shape
    device = logits.device
    ids = torch.empty(2, rows, width, dtype=torch.int64, device=device)
    numbers = torch.empty(9, rows, width, device=device)
    if current.numel() == 0:
        return ids, numbers
    pieces = -(-vocabulary // launch.PIECE)
    parts = torch.empty(rows * width * pieces * 8, dtype=torch.int32, device=device)
    arrived = torch.zeros(rows, dtype=torch.int32, device=device)
    z = logits if logits.stride(-1) == 1 or vocabulary == 1 else logits.contiguous()
    if noise is not None:
        tables = noise.seeds, noise.positions.expand(rows, width), noise.steps
        noise = Noise(noise.scale, *(table.contiguous() for table in tables))
    ran = backend.run(launch.tokens, ids, numbers, z, current.contiguous(), suppressed, divisor, noise, committing, parts, arrived)
    return (ids, numbers) if ran else None


def _dense_fix(fix: Fix | None) -> Fix | None:
    return None if fix is None else Fix(fix.scale.contiguous(), fix.shift.contiguous())


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
