"""One function for each kernel: fills its arguments, chooses the grid, puts it on the stream.

Nothing is allocated here and nothing is read back. Tensors are given as [batch, tokens, channels]; outputs are dense. What a function
refuses, it refuses before the launch; `hasten.kernels.ops` brings tensors into a form that is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight
from hasten.kernels.driver import Kernels, Size

NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8",
}
"""Element types as the kernels' names have them."""
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
"""In the order of cuda/elementary.cuh."""
GATED = {"geglu": "gelu", "swiglu": "silu"}
"""Those whose input holds values, then gates; what the gates go through."""
THREADS = 256
_MOST_BLOCKS = 2**31 - 1


class Rows(ctypes.Structure):
    """A tensor [batch, tokens, channels]; strides in elements."""

    _fields_: ClassVar = [("data", c_void_p), ("batch", c_int64), ("token", c_int64)]

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _accept(name: str, tensor: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raises ValueError where a tensor is no [batch, tokens, channels] with its channels next to each other."""
    if tensor.ndim != 3 or (shape is not None and tensor.shape != torch.Size(shape)):
        raise ValueError(f"{name} must be {list(shape) if shape else '[batch, tokens, channels]'}, not {list(tensor.shape)}")
    if tensor.shape[2] > 1 and tensor.stride(2) != 1:
        raise ValueError(f"{name} must have its channels next to each other, not {tensor.stride(2)} entries apart")


def _dense(name: str, tensor: Tensor, numel: int, dtype: torch.dtype) -> None:
    if tensor.numel() != numel or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a dense {dtype} tensor of {numel} entries, not {tensor.dtype} {list(tensor.shape)}")


def _width(dtype: torch.dtype, channels: int, *tensors: Tensor) -> int:
    """Entries of `dtype` that are moved at once: 16 bytes where sizes, strides and addresses allow, else one."""
    wide = 16 // dtype.itemsize
    if channels % wide:
        return 1
    for t in tensors:
        steps = sum(step % wide for size, step in zip(t.shape[:-1], t.stride(), strict=False) if size > 1)
        if steps or t.data_ptr() % min(16, wide * t.itemsize):
            return 1
    return wide


def _elementwise(rows: int, pieces: int) -> tuple[Size, Size]:
    """(grid, block) for rows of that many pieces: threads in x along a row, in y over rows; in grid y where there are few rows."""
    turns = -(-pieces // THREADS)
    x = -(-pieces // turns)
    y = THREADS // x
    across = min(turns, 65535) if rows // y < 1024 else 1
    return (min(-(-rows // y), _MOST_BLOCKS), across), (x, y)


def _walking(rows: int, channels: int, width: int) -> tuple[Size, Size]:
    """(grid, block) for rows that are walked over more than once: as many threads as hold a row in registers, 32 to 512."""
    held = 4 if width == 1 else 16 // width
    x = 32
    while x < 512 and x * held * width < channels:
        x *= 2
    y = 4 if x == 32 else 1
    return (min(-(-rows // y), _MOST_BLOCKS), 1), (x, y)


class _Apply(ctypes.Structure):
    _fields_: ClassVar = [
        ("x", Rows), ("offset", Rows * 3), ("out", c_void_p), ("scale", c_void_p * 3), ("fix_scale", c_void_p), ("fix_shift", c_void_p),
        ("batch", c_int64), ("tokens", c_int64), ("channels", c_int64), ("group", c_int64),
        ("weight", c_float * 3), ("terms", c_int), ("scaled", c_int),
    ]  # fmt: skip


def apply(
    kernels: Kernels,
    stream: int,
    out: Tensor,
    x: Tensor,
    offsets: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    fix: Fix | None,
    *,
    by_token: bool = True,
) -> None:
    """out = x + fix(Σ weight * offset * scale).

    Args:
        out: [B, T, C], dense, of x's type.
        x: [B, T, C].
        offsets: One to three of x's shape: x's type, bfloat16, int8 or float8_e4m3fn, all alike.
        scales: One for each offset, float32, dense; none where offsets are the values themselves.
        weights: One for each offset.
        fix: Of the sum, dense, or None.
        by_token: Scales are [B, T, 1], else [B, 1, C].
    """
    batch, tokens, channels = x.shape
    _accept("x", x)
    _dense("out", out, x.numel(), x.dtype)
    for offset in offsets:
        _accept("an offset", offset, x.shape)
    if not 1 <= len(offsets) == len(weights) <= 3 or len(scales) not in (0, len(offsets)):
        raise ValueError(f"1 to 3 offsets need as many weights and scales, not {len(offsets)}, {len(weights)} and {len(scales)}")
    scaled = 0
    if scales:
        scaled = 1 if by_token else 2
        for scale in scales:
            _dense("scale", scale, batch * (tokens if scaled == 1 else channels), torch.float32)
    args = _Apply(
        Rows.of(x), batch=batch, tokens=tokens, channels=channels, group=batch, out=out.data_ptr(), terms=len(offsets), scaled=scaled
    )
    for k, (offset, weight) in enumerate(zip(offsets, weights, strict=True)):
        args.offset[k], args.weight[k] = Rows.of(offset), weight
        args.scale[k] = scales[k].data_ptr() if scales else None
    if fix is not None:
        groups = fix.scale.numel() // channels
        if groups < 1 or batch % groups:
            raise ValueError(f"fix must have groups that {batch} samples can be shared among, not {groups}")
        for table in fix:
            _dense("fix", table, groups * channels, torch.float32)
        args.group, args.fix_scale, args.fix_shift = batch // groups, fix.scale.data_ptr(), fix.shift.data_ptr()
    tables = [*(() if by_token else scales), *(fix or ())]
    width = _width(x.dtype, channels, x, out, *offsets, *tables)
    grid, block = _elementwise(batch * tokens, channels // width)
    kernels.launch("apply", f"apply_{NAMES[x.dtype]}_{NAMES[offsets[0].dtype]}_{width}", grid, block, args, stream)


# ---------------------------------------------------------------------------------------------------------- stored offsets


PEAK_TOKENS = 32
"""Tokens of which a thread finds the largest magnitudes: cuda/store.cu has the same."""


class _Store(ctypes.Structure):
    _fields_: ClassVar = [
        ("after", Rows), ("before", Rows), ("values", c_void_p), ("scale", c_void_p), ("most", c_void_p),
        ("batch", c_int64), ("tokens", c_int64), ("channels", c_int64),
    ]  # fmt: skip


def store(
    kernels: Kernels,
    stream: int,
    values: Tensor,
    scale: Tensor | None,
    after: Tensor,
    before: Tensor | None,
    peaks: Tensor | None = None,
) -> None:
    """values * scale = after - before.

    Args:
        values: [B, T, C], dense: bfloat16, int8 or float8_e4m3fn.
        scale: float32, dense: [B, T, 1], or [B, 1, C] where there are peaks; None for bfloat16.
        after, before: [B, T, C] of one type; no `before` is zeros.
        peaks: int32 [B, 1, C] of zeros, scratch memory; with it the scale is that of channels.
    """
    batch, tokens, channels = after.shape
    _accept("after", after)
    _dense("values", values, after.numel(), values.dtype)
    args = _Store(Rows.of(after), batch=batch, tokens=tokens, channels=channels, values=values.data_ptr())
    given = [after, values]
    if before is not None:
        _accept("before", before, after.shape)
        args.before = Rows.of(before)
        given.append(before)
    width = _width(after.dtype, channels, *given)
    name, kind = NAMES[after.dtype], NAMES[values.dtype]
    spread = _elementwise(batch * tokens, channels // width)
    if scale is None:
        kernels.launch("store", f"store_plain_{name}_{width}", *spread, args, stream)
        return
    _dense("scale", scale, batch * (tokens if peaks is None else channels), torch.float32)
    args.scale = scale.data_ptr()
    if peaks is None:
        kernels.launch("store", f"store_rows_{name}_{kind}_{width}", *_walking(batch * tokens, channels, width), args, stream)
        return
    _dense("peaks", peaks, batch * channels, torch.int32)
    args.most = peaks.data_ptr()
    threads = min(128, 32 * -(-channels // (32 * width)))
    grid = min(batch * -(-channels // (threads * width)), _MOST_BLOCKS), min(-(-tokens // PEAK_TOKENS), 65535)
    kernels.launch("store", f"store_peaks_{name}_{width}", grid, (threads, 1), args, stream)
    kernels.launch("store", f"store_columns_{name}_{kind}_{width}", *spread, args, stream)


# ---------------------------------------------------------------------------------------------------------- blocks


class _Adaln(ctypes.Structure):
    _fields_: ClassVar = [
        ("residual", Rows), ("y", Rows), ("gate", Rows), ("scale", Rows), ("shift", Rows), ("weight", c_void_p), ("bias", c_void_p),
        ("x", c_void_p), ("out", c_void_p), ("row_scale", c_void_p), ("batch", c_int64), ("tokens", c_int64), ("channels", c_int64),
        ("eps", c_float), ("rms", c_int), ("bits", c_int),
    ]  # fmt: skip


def adaln(
    kernels: Kernels,
    stream: int,
    x: Tensor,
    out: Tensor,
    row_scale: Tensor | None,
    residual: Tensor,
    y: Tensor,
    modulation: Modulation,
    norm: Norm,
) -> None:
    """x = residual + gate * y; out = norm(x) * (1 + scale) + shift.

    Args:
        x: [B, T, C], dense, of residual's type.
        out: The same, or int8 or float8_e4m3fn with `row_scale` float32 [B, T, 1].
        residual, y: [B, T, C] of one type.
        modulation: [B, T, C] of residual's type or all float32, strides of 0 where they are shared.
        norm: Its tables are float32, dense.
    """
    batch, tokens, channels = residual.shape
    _accept("residual", residual)
    _accept("y", y, residual.shape)
    _dense("x", x, residual.numel(), residual.dtype)
    _dense("out", out, residual.numel(), out.dtype)
    args = _Adaln(Rows.of(residual), Rows.of(y), batch=batch, tokens=tokens, channels=channels, x=x.data_ptr(), out=out.data_ptr())
    args.eps, args.rms, args.bits = norm.eps, norm.rms, {torch.int8: 1, torch.float8_e4m3fn: 2}.get(out.dtype, 0)
    if row_scale is not None:
        _dense("row_scale", row_scale, batch * tokens, torch.float32)
        args.row_scale = row_scale.data_ptr()
    given = [residual, y, x, out]
    for name, table in modulation._asdict().items():
        if table is not None:
            _accept(name, table, residual.shape)
            setattr(args, name, Rows.of(table))
            given.append(table)
    for name, table in (("weight", norm.weight), ("bias", norm.bias)):
        if table is not None:
            _dense(name, table, channels, torch.float32)
            setattr(args, name, table.data_ptr())
            given.append(table)
    width = _width(residual.dtype, channels, *given)
    kind = next((NAMES[table.dtype] for table in modulation if table is not None), NAMES[residual.dtype])
    kernels.launch("adaln", f"adaln_{NAMES[residual.dtype]}_{kind}_{width}", *_walking(batch * tokens, channels, width), args, stream)


class _Gelu(ctypes.Structure):
    _fields_: ClassVar = [
        ("x", Rows), ("values", c_void_p), ("scale", c_void_p), ("batch", c_int64), ("tokens", c_int64), ("channels", c_int64),
        ("activation", c_int), ("gated", c_int), ("bits", c_int),
    ]  # fmt: skip


def gelu(kernels: Kernels, stream: int, values: Tensor, scale: Tensor, x: Tensor, kind: str) -> None:
    """values * scale = activation of x.

    Args:
        values: [B, T, C], dense: int8 or float8_e4m3fn.
        scale: float32 [B, T, 1], dense.
        x: [B, T, C], or [B, T, 2 C] where `kind` is "geglu" or "swiglu".
        kind: One of `ACTIVATIONS` but "none", or of `GATED`.
    """
    batch, tokens, channels = values.shape
    _accept("x", x, (batch, tokens, channels * (2 if kind in GATED else 1)))
    _dense("values", values, batch * tokens * channels, values.dtype)
    _dense("scale", scale, batch * tokens, torch.float32)
    args = _Gelu(Rows.of(x), values.data_ptr(), scale.data_ptr(), batch, tokens, channels)
    args.activation, args.gated = ACTIVATIONS.index(GATED.get(kind, kind)), kind in GATED
    args.bits = 1 if values.dtype == torch.int8 else 2
    width = _width(x.dtype, channels, x, values)
    kernels.launch("gelu", f"gelu_{NAMES[x.dtype]}_{width}", *_walking(batch * tokens, channels, width), args, stream)


# ---------------------------------------------------------------------------------------------------------- int8 products


class _FixedGrid(ctypes.Structure):
    _fields_: ClassVar = [
        ("x", Rows), ("values", c_void_p), ("scale", c_void_p), ("zero", c_void_p), ("smooth", c_void_p),
        ("batch", c_int64), ("tokens", c_int64), ("channels", c_int64),
    ]  # fmt: skip


def fixed_grid(kernels: Kernels, stream: int, values: Tensor, x: Tensor, grid: Grid) -> None:
    """x / smooth = scale * (values - zero).

    Args:
        values: int8 [B, T, C], dense.
        x: [B, T, C].
        grid: Dense.
    """
    batch, tokens, channels = x.shape
    _accept("x", x)
    _dense("values", values, x.numel(), torch.int8)
    _dense("scale", grid.scale, 1, torch.float32)
    _dense("zero", grid.zero, 1, torch.float32)
    args = _FixedGrid(Rows.of(x), values.data_ptr(), grid.scale.data_ptr(), grid.zero.data_ptr(), None, batch, tokens, channels)
    given = [x, values]
    if grid.smooth is not None:
        _dense("smooth", grid.smooth, channels, torch.float32)
        args.smooth = grid.smooth.data_ptr()
        given.append(grid.smooth)
    width = _width(x.dtype, channels, *given)
    kernels.launch("linear", f"grid_{NAMES[x.dtype]}_{width}", *_elementwise(batch * tokens, channels // width), args, stream)


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        ("products", c_void_p), ("out", c_void_p), ("row_scale", c_void_p), ("scale", c_void_p), ("zero", c_void_p),
        ("weight_scale", c_void_p), ("sums", c_void_p), ("bias", c_void_p), ("fix_scale", c_void_p), ("fix_shift", c_void_p),
        ("rows", c_int64), ("columns", c_int64), ("stride", c_int64), ("bias_is_float", c_int), ("activation", c_int),
    ]  # fmt: skip


def dequantise(
    kernels: Kernels,
    stream: int,
    out: Tensor,
    products: Tensor,
    row_scale: Tensor | None,
    grid: Grid | None,
    weight: Weight,
    fix: Fix | None,
    activation: str,
) -> None:
    """out = activation(fix(products, brought back to floats, + bias)).

    Args:
        out: [rows, columns], dense.
        products: int32 [rows, columns], columns next to each other.
        row_scale: float32 [rows], or None where `grid` is given.
        grid: On which the activations were, dense, or None.
        weight: Its scale is dense, and its bias dense and float32 or of out's type.
        fix: Of the output, dense, or None.
        activation: One of `ACTIVATIONS`.
    """
    rows, columns = out.shape
    if products.shape != out.shape or products.dtype != torch.int32 or (columns > 1 and products.stride(1) != 1):
        raise ValueError(f"products must be int32 {list(out.shape)}, not {products.dtype} {list(products.shape)}")
    _dense("out", out, rows * columns, out.dtype)
    _dense("weight_scale", weight.scale, columns, torch.float32)
    args = _Linear(products.data_ptr(), out.data_ptr(), weight_scale=weight.scale.data_ptr(), rows=rows, columns=columns)
    args.stride, args.activation = products.stride(0), ACTIVATIONS.index(activation)
    given = [products, out, weight.scale]
    if row_scale is not None:
        _dense("row_scale", row_scale, rows, torch.float32)
        args.row_scale = row_scale.data_ptr()
    elif grid is not None:
        _dense("scale", grid.scale, 1, torch.float32)
        _dense("zero", grid.zero, 1, torch.float32)
        _dense("sums", grid.sums, columns, torch.int32)
        args.scale, args.zero, args.sums = grid.scale.data_ptr(), grid.zero.data_ptr(), grid.sums.data_ptr()
        given.append(grid.sums)
    else:
        raise ValueError("row_scale or grid must be given, not neither")
    if weight.bias is not None:
        _dense("bias", weight.bias, columns, torch.float32 if weight.bias.dtype == torch.float32 else out.dtype)
        args.bias, args.bias_is_float = weight.bias.data_ptr(), weight.bias.dtype == torch.float32
        given.append(weight.bias)
    if fix is not None:
        for name, table in (("fix_scale", fix.scale), ("fix_shift", fix.shift)):
            _dense(name, table, columns, torch.float32)
            setattr(args, name, table.data_ptr())
            given.append(table)
    width = _width(out.dtype, columns, *given)
    (blocks, across), block = _elementwise(rows, columns // width)
    # What belongs to a column is read once for eight rows.
    kernels.launch("linear", f"linear_{NAMES[out.dtype]}_{width}", (-(-blocks // 8), across), block, args, stream)


# ---------------------------------------------------------------------------------------------------------- deciders


class _Drift(ctypes.Structure):
    _fields_: ClassVar = [
        ("now", c_void_p), ("before", c_void_p), ("now_stride", c_int64), ("before_stride", c_int64), ("sums", c_void_p),
        ("still", c_void_p), ("parts", c_void_p), ("arrived", c_void_p), ("batch", c_int64), ("entries", c_int64), ("pieces", c_int64),
        ("threshold", c_float),
    ]  # fmt: skip


def drift(
    kernels: Kernels,
    stream: int,
    sums: Tensor,
    still: Tensor,
    now: Tensor,
    before: Tensor,
    threshold: float,
    parts: Tensor,
    arrived: Tensor,
) -> None:
    """sums = Σ|now - before|, Σ|before|; still = their ratio < threshold.

    Args:
        sums: float32 [B, 2], dense.
        still: bool [B], dense.
        now, before: [B, entries] of one type, entries next to each other.
        threshold: Of the ratio.
        parts: float32, scratch memory: 2 B entries for every 2,048 of a sample.
        arrived: int32 [B] of zeros, scratch memory; zeros again afterwards.
    """
    batch, entries = now.shape
    _accept("now", now[:, None])
    _accept("before", before[:, None], (batch, 1, entries))
    _dense("sums", sums, 2 * batch, torch.float32)
    _dense("still", still, batch, torch.bool)
    _dense("arrived", arrived, batch, torch.int32)
    width = _width(now.dtype, entries, now, before)
    pieces = -(-entries // (8 * THREADS * width))
    if not parts.is_contiguous() or parts.dtype != torch.float32 or parts.numel() < 2 * batch * pieces:
        raise ValueError(f"parts must be dense float32 with at least {2 * batch * pieces} entries, not {parts.dtype} {list(parts.shape)}")
    args = _Drift(now.data_ptr(), before.data_ptr(), now.stride(0), before.stride(0), sums.data_ptr(), still.data_ptr())
    args.parts, args.arrived, args.threshold = parts.data_ptr(), arrived.data_ptr(), threshold
    args.batch, args.entries, args.pieces = batch, entries, pieces
    kernels.launch("drift", f"drift_{NAMES[now.dtype]}_{width}", (pieces, min(batch, 65535)), (THREADS, 1), args, stream)


# ---------------------------------------------------------------------------------------------------------- particles

TENSORS = 128
"""Moved by one launch."""


class _Moved(ctypes.Structure):
    _fields_: ClassVar = [("source", c_void_p), ("out", c_void_p), ("bytes", c_int64)]


class _Reindex(ctypes.Structure):
    _fields_: ClassVar = [("rows", c_void_p), ("count", c_int64), ("sources", c_int64), ("tensors", c_int), ("table", _Moved * TENSORS)]


def reindex(kernels: Kernels, stream: int, outs: Sequence[Tensor], sources: Sequence[Tensor], rows: Tensor) -> None:
    """out = source[rows] for every pair; an index that is out of range stops the device, as PyTorch's own gathers do.

    Args:
        outs: [n, ...], dense.
        sources: [B, ...], dense, as many.
        rows: int64 [n], dense.
    """
    _dense("rows", rows, rows.numel(), torch.int64)
    for out, source in zip(outs, sources, strict=True):
        if len(source) != len(sources[0]) or out.shape != (len(rows), *source.shape[1:]) or not source.is_contiguous():
            raise ValueError(
                f"sources must be dense and of {len(sources[0])} rows, outs of {len(rows)}, not {list(source.shape)}, {list(out.shape)}"
            )
        _dense("an out", out, out.numel(), source.dtype)
    for first in range(0, len(sources), TENSORS):
        pairs = list(zip(outs[first : first + TENSORS], sources[first : first + TENSORS], strict=True))
        args = _Reindex(rows.data_ptr(), len(rows), len(sources[0]), len(pairs))
        for k, (out, source) in enumerate(pairs):
            args.table[k] = _Moved(source.data_ptr(), out.data_ptr(), source.nbytes // len(source))
        most = max(moved.bytes for moved in args.table[: len(pairs)])
        kernels.launch("reindex", "reindex", (max(1, min(-(-most // (16 * THREADS)), 4096)), len(pairs)), (THREADS, 1), args, stream)


# ---------------------------------------------------------------------------------------------------------- decoding

PIECE = 8192
"""Logits that a block looks at."""
SUPPRESSED = 32
"""Ids that can be suppressed."""
SCORES = ("low_confidence", "margin", "entropy")


class _Tokens(ctypes.Structure):
    _fields_: ClassVar = [
        ("logits", c_void_p), ("row_stride", c_int64), ("position_stride", c_int64), ("current", c_void_p), ("active", c_void_p),
        ("seeds", c_void_p), ("positions", c_void_p), ("steps", c_void_p), ("ids", c_void_p), ("numbers", c_void_p),
        ("commits", c_void_p), ("after", c_void_p), ("parts", c_void_p), ("arrived", c_void_p),
        ("rows", c_int64), ("width", c_int64), ("vocabulary", c_int64), ("pieces", c_int64), ("mask", c_int64),
        ("divisor", c_float), ("noise", c_float), ("threshold", c_float), ("minimum", c_int), ("score", c_int), ("suppressed", c_int),
        ("suppress", c_int64 * SUPPRESSED),
    ]  # fmt: skip


class Committing(NamedTuple):
    """A selection and where its result goes.

    Attributes:
        selection: Its `active` is dense.
        commits: bool [R, W], dense.
        after: int64 [R, W], dense.
    """

    selection: Selection
    commits: Tensor
    after: Tensor


def tokens(
    kernels: Kernels,
    stream: int,
    ids: Tensor,
    numbers: Tensor,
    logits: Tensor,
    current: Tensor,
    suppressed: Sequence[int],
    divisor: float,
    noise: Noise | None,
    committing: Committing | None,
    parts: Tensor,
    arrived: Tensor,
) -> None:
    """What a decoding schedule sees of logits; see `reference.token_stats`.

    Args:
        ids: int64 [2, R, W], dense: chosen and most probable tokens.
        numbers: float32 [9, R, W], dense: log_p, log_p1, p2, entropy, logsumexp, p_current, token_noise, best_noise, score.
        logits: [R, W, V].
        current: int64 [R, W], dense.
        suppressed: Ids that are never chosen.
        divisor: By which logits are divided.
        noise: Dense, its positions [R, W]; or None.
        committing: What is selected in the same launch, or None.
        parts: int32 [R, W, pieces of a vocabulary, 8], scratch memory.
        arrived: int32 [R] of zeros, scratch memory; zeros again afterwards.
    """
    rows, width, vocabulary = logits.shape
    _accept("logits", logits)
    _dense("current", current, rows * width, torch.int64)
    _dense("ids", ids, 2 * rows * width, torch.int64)
    _dense("numbers", numbers, 9 * rows * width, torch.float32)
    _dense("arrived", arrived, rows, torch.int32)
    pieces = -(-vocabulary // PIECE)
    _dense("parts", parts, rows * width * pieces * 8, torch.int32)
    if len(suppressed) > SUPPRESSED or vocabulary >= 2**31:
        raise ValueError(f"at most {SUPPRESSED} suppressed ids and 2^31 tokens are taken, not {len(suppressed)} and {vocabulary}")
    args = _Tokens(
        logits.data_ptr(), logits.stride(0), logits.stride(1), current.data_ptr(), ids=ids.data_ptr(), numbers=numbers.data_ptr()
    )
    args.parts, args.arrived, args.divisor, args.suppressed = parts.data_ptr(), arrived.data_ptr(), divisor, len(suppressed)
    args.rows, args.width, args.vocabulary, args.pieces = rows, width, vocabulary, pieces
    args.suppress[: len(suppressed)] = list(suppressed)
    if noise is not None:
        args.noise = noise.scale
        for name, table in (("seeds", noise.seeds), ("positions", noise.positions), ("steps", noise.steps)):
            _dense(name, table, rows * width if name == "positions" else rows, torch.int64)
            setattr(args, name, table.data_ptr())
    if committing is not None:
        selection, commits, after = committing
        args.mask, args.threshold, args.score = *selection[:2], SCORES.index(selection.score)
        args.minimum = min(selection.minimum, width)
        _dense("commits", commits, rows * width, torch.bool)
        _dense("after", after, rows * width, torch.int64)
        args.commits, args.after = commits.data_ptr(), after.data_ptr()
        if selection.active is not None:
            _dense("active", selection.active, rows * width, torch.bool)
            args.active = selection.active.data_ptr()
    wide = _width(logits.dtype, vocabulary, logits)
    blocks = min(rows * width * pieces, _MOST_BLOCKS)
    kernels.launch("tokens", f"tokens_{NAMES[logits.dtype]}_{wide}", (blocks, 1), (THREADS, 1), args, stream)


def argument_sizes() -> dict[str, int]:
    """Bytes of the arguments of each family of kernels, by the first word of their names."""
    families = {
        "adaln": _Adaln, "apply": _Apply, "drift": _Drift, "gelu": _Gelu, "grid": _FixedGrid, "linear": _Linear, "reindex": _Reindex,
        "store": _Store, "tokens": _Tokens,
    }  # fmt: skip
    return {name: ctypes.sizeof(arguments) for name, arguments in families.items()}
