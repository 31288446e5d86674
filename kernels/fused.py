"""The ops by their kernels: brings tensors into the form that a launch takes, makes the outputs, launches.

Each function takes the backend first and returns None where no kernel runs. Inputs are copied only where their channels do not lie next
to each other; outputs and scratch memory are made before the launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels import launch
from hasten.kernels.backend import Backend
from hasten.kernels.products import int_product


def as_rows(tensor: Tensor) -> Tensor:
    """[batch, ..., channels] as [batch, tokens, channels] with its channels next to each other: a view where that is possible."""
    rows = tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def delta_apply(
    backend: Backend,
    hidden_states: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    fix_scale: Tensor | None = None,
    fix_shift: Tensor | None = None,
) -> Tensor | None:
    """See `reference.delta_apply`."""
    return forecast_apply(backend, hidden_states, [values], [] if scale is None else [scale], [1.0], fix_scale, fix_shift)


def forecast_apply(
    backend: Backend,
    hidden_states: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    fix_scale: Tensor | None = None,
    fix_shift: Tensor | None = None,
) -> Tensor | None:
    """See `reference.forecast_apply`."""
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    x, offsets = as_rows(hidden_states), [as_rows(value) for value in values]
    by_token = bool(scales) and scales[0].shape[-1] == 1 and scales[0].numel() == x.shape[0] * x.shape[1]
    scales = [scale.contiguous() for scale in scales]
    fix = None if fix_scale is None or fix_shift is None else (fix_scale.contiguous(), fix_shift.contiguous())
    rows = as_rows(out)
    ran = backend.run(lambda kernels, stream: launch.apply(kernels, stream, rows, x, offsets, scales, weights, fix, by_token=by_token))
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
    x, y, out = as_rows(after), as_rows(before), as_rows(values)
    peaks = torch.zeros(shape, dtype=torch.int32, device=after.device) if by_channel and shape is not None else None
    kept = None if shape is None else scale
    return (values, scale) if backend.run(lambda kernels, stream: launch.store(kernels, stream, out, kept, x, y, peaks)) else None


def quantise_rows(backend: Backend, x: Tensor, kind: str) -> tuple[Tensor, Tensor] | None:
    """See `reference.quantise_rows`."""
    values, scale = _like(x, EIGHT_BITS[kind]), torch.empty((*x.shape[:-1], 1), device=x.device)
    if values.numel() == 0:
        return values, scale
    rows, out = as_rows(x), as_rows(values)
    return (values, scale) if backend.run(lambda kernels, stream: launch.store(kernels, stream, out, scale, rows, None)) else None


def gated_residual_adaln(
    backend: Backend,
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor] | None:
    """See `reference.gated_residual_adaln`."""
    x, out = _like(residual), _like(residual)
    return (x, out) if _adaln(backend, x, out, None, residual, y, (gate, scale, shift), (weight, bias), eps, rms) else None


def gated_residual_adaln_quant(
    backend: Backend,
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """See `reference.gated_residual_adaln_quant`."""
    x, values = _like(residual), _like(residual, EIGHT_BITS[kind])
    row_scale = torch.empty((*residual.shape[:-1], 1), device=residual.device)
    ran = _adaln(backend, x, values, row_scale, residual, y, (gate, scale, shift), (weight, bias), eps, rms)
    return (x, values, row_scale) if ran else None


def _adaln(
    backend: Backend,
    x: Tensor,
    out: Tensor,
    row_scale: Tensor | None,
    residual: Tensor,
    y: Tensor,
    modulation: tuple[Tensor | None, Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
    rms: bool,
) -> bool:
    if x.numel() == 0:
        return True
    kinds = {table.dtype for table in modulation if table is not None}
    kind = residual.dtype if kinds <= {residual.dtype} else torch.float32
    gate, scale, shift = (None if t is None else as_rows(t.to(kind).expand(residual.shape)) for t in modulation)
    weight, bias = (None if t is None else t.float().contiguous() for t in affine)
    rows = as_rows(x), as_rows(out), row_scale, as_rows(residual), as_rows(y)
    return backend.run(lambda kernels, stream: launch.adaln(kernels, stream, *rows, (gate, scale, shift), (weight, bias), eps, rms))


def gelu_quant(backend: Backend, x: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor] | None:
    """See `reference.gelu_quant`."""
    shape = (*x.shape[:-1], x.shape[-1] // (2 if activation in launch.GATED else 1))
    values = torch.empty(shape, dtype=EIGHT_BITS[kind], device=x.device)
    scale = torch.empty((*shape[:-1], 1), device=x.device)
    if values.numel() == 0:
        return values, scale
    rows, out = as_rows(x), as_rows(values)
    return (values, scale) if backend.run(lambda kernels, stream: launch.gelu(kernels, stream, out, scale, rows, activation)) else None


def int8_linear(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    sums: Tensor | None = None,
    smooth: Tensor | None = None,
    fix_scale: Tensor | None = None,
    fix_shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor | None:
    """See `reference.int8_linear`."""
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = x.reshape(-1, x.shape[-1])
    row_scale, grid = None, None
    if scale is None or zero is None or sums is None:
        quantised = quantise_rows(backend, flat, "int8")
        if quantised is None:
            return None
        values, row_scale = quantised
    else:
        values, grid = _like(flat, torch.int8), (scale.contiguous(), zero.contiguous(), sums.contiguous())
        smooth = None if smooth is None else smooth.contiguous()
        rows, made = as_rows(flat), as_rows(values)
        if not backend.run(lambda kernels, stream: launch.fixed_grid(kernels, stream, made, rows, grid[0], grid[1], smooth)):
            return None
    products = int_product(values, weight)
    factor, bias = weight_scale.contiguous(), None if bias is None else bias.contiguous()
    fix = None if fix_scale is None or fix_shift is None else (fix_scale.contiguous(), fix_shift.contiguous())
    whole = out.view(-1, len(weight))
    ran = backend.run(
        lambda kernels, stream: launch.dequantise(kernels, stream, whole, products, row_scale, grid, factor, bias, fix, activation)
    )
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
    ran = backend.run(lambda kernels, stream: launch.drift(kernels, stream, sums, still, now, before, threshold, parts, arrived))
    return (sums, still) if ran else None


def reindex(backend: Backend, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor] | None:
    """See `reference.reindex`."""
    outs = [torch.empty((len(rows), *t.shape[1:]), dtype=t.dtype, device=t.device) for t in tensors]
    rows = rows.contiguous()
    for batch in {len(t) for t in tensors}:
        pairs = [(out, t.contiguous()) for out, t in zip(outs, tensors, strict=True) if len(t) == batch and out.numel()]
        if not pairs:
            continue
        made, sources = [out for out, _ in pairs], [t for _, t in pairs]
        if not backend.run(lambda kernels, stream, made=made, sources=sources: launch.reindex(kernels, stream, made, sources, rows)):  # type: ignore[misc]
            return None
    return outs


def token_stats(
    backend: Backend,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    divisor: float = 1.0,
    noise: float = 0.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """See `reference.token_stats`."""
    return _tokens(backend, logits, current, suppressed, divisor, noise, (seeds, positions, steps), None)


def token_commit(
    backend: Backend,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    active: Tensor | None,
    mask: int,
    threshold: float,
    minimum: int,
    score: str,
    divisor: float = 1.0,
    noise: float = 0.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """See `reference.token_commit`."""
    commits, after = torch.empty_like(current, dtype=torch.bool).contiguous(), torch.empty_like(current).contiguous()
    active = None if active is None else active.contiguous()
    selection = commits, after, active, mask, threshold, minimum, score
    made = _tokens(backend, logits, current, suppressed, divisor, noise, (seeds, positions, steps), selection)
    return None if made is None else (*made, commits, after)


def _tokens(
    backend: Backend,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    divisor: float,
    noise: float,
    key: tuple[Tensor | None, Tensor | None, Tensor | None],
    selection: tuple[Tensor, Tensor, Tensor | None, int, float, int, str] | None,
) -> tuple[Tensor, Tensor] | None:
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
    shown = current.contiguous()
    seeds, positions, steps = key
    drawn = None
    if noise and seeds is not None and positions is not None and steps is not None:
        drawn = noise, seeds.contiguous(), positions.expand(rows, width).contiguous(), steps.contiguous()
    ran = backend.run(
        lambda kernels, stream: launch.tokens(
            kernels, stream, ids, numbers, z, shown, suppressed, divisor, drawn, selection, parts, arrived
        )
    )
    return (ids, numbers) if ran else None


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
