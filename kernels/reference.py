"""What each op means, in plain PyTorch. Arithmetic is in float32 in the order that is written; results are rounded once, at the end.

A kernel gives these numbers within rounding of its output type, and the very same 8-bit entries and scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels import elementary
from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight
from hasten.kernels.products import scaled_product


def delta_apply(hidden_states: Tensor, values: Tensor, scale: Tensor | None = None, fix: Fix | None = None) -> Tensor:
    """A stored offset, dequantised, corrected and added.

    Args:
        hidden_states: [batch, ..., channels].
        values: Of the same shape: its type, bfloat16, int8 or float8_e4m3fn.
        scale: float32, broadcasts against `values`: [..., 1] of every token or [batch, 1, ..., channels]; None for 1.
        fix: The correction of the offset, or None.

    Returns:
        A new tensor of the shape and type of `hidden_states`.
    """
    return forecast_apply(hidden_states, [values], [] if scale is None else [scale], [1.0], fix)


def forecast_apply(
    hidden_states: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], weights: Sequence[float], fix: Fix | None = None
) -> Tensor:
    """The weighted sum of stored offsets, corrected and added: `hidden_states + fix(Σ weight * scale * values)`.

    Args:
        hidden_states: [batch, ..., channels].
        values: One to three as in `delta_apply`, all of one type, newest first.
        scales: One for each, or none.
        weights: One for each: those of the polynomial through the offsets, taken at the present noise level.
        fix: As in `delta_apply`, of the sum.
    """
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for k, (offset, weight) in enumerate(zip(values, weights, strict=True)):
        term = offset.float() * scales[k] if scales else offset.float()
        total = total + weight * term
    if fix is not None:
        shape = (len(fix.scale), 1, *[1] * (total.ndim - 2), total.shape[-1])
        grouped = total.unflatten(0, (len(fix.scale), -1)) * fix.scale.view(shape) + fix.shift.view(shape)
        total = grouped.flatten(0, 1)
    return (hidden_states.float() + total).to(hidden_states.dtype)


def delta_store(after: Tensor, before: Tensor, kind: str, by_channel: bool = False) -> tuple[Tensor, Tensor]:
    """An offset on its way into memory: `after - before` in float32, kept in 16 or 8 bits.

    Args:
        after, before: [batch, ..., channels] of one type.
        kind: "bf16", "int8" or "fp8" (float8_e4m3fn).
        by_channel: One scale for every channel of a sample, else for every token.

    Returns:
        (values, scale): values of the shape given; scale float32 [..., 1] or [batch, 1, ..., channels], empty for "bf16". A token or
        channel that holds something not finite has a scale that is not finite.
    """
    offset = after.float() - before.float()
    if kind == "bf16":
        return offset.to(torch.bfloat16), torch.empty(0, device=offset.device)
    return _on_grid(offset, kind, tuple(range(1, offset.ndim - 1)) if by_channel else (-1,))


def quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, a scale for each: `delta_store` with nothing to subtract.

    Args:
        x: [batch, ..., channels].
        kind: "int8" or "fp8".
    """
    return _on_grid(x.float(), kind, (-1,))


def _on_grid(x: Tensor, kind: str, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(values, scale) of float32: the largest magnitude over `dims` is the end of the grid, and what is not a number is 0."""
    most = 127.0 if kind == "int8" else 448.0
    peaks = x.abs().amax(dims, keepdim=True)
    scale = (peaks / torch.full_like(peaks, most)).clamp_min(1e-12)  # a tensor: by a number, CUDA multiplies with its rounded inverse
    values = x / scale
    if kind == "int8":
        return values.round_().nan_to_num_(0.0).clamp_(-most, most).to(torch.int8), scale
    return values.nan_to_num_(0.0).clamp_(-most, most).to(torch.float8_e4m3fn), scale


def gated_residual_adaln(residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm) -> tuple[Tensor, Tensor]:
    """What stands between attention and feed-forward of a DiT block.

    Args:
        residual, y: [batch, ..., channels]: what the block was given and what its part returned.
        modulation: Tables that broadcast against these.
        norm: Of the sum.

    Returns:
        (x, modulated): `x = residual + gate * y` rounded to its type, and `norm(x) * (1 + scale) + shift` of that.
    """
    gate, scale, shift = modulation
    x = (residual.float() + (y.float() if gate is None else y.float() * gate.float())).to(residual.dtype)
    centred = x.float() if norm.rms else x.float() - x.float().mean(-1, keepdim=True)
    n = centred * (1.0 / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt())
    n = n if norm.weight is None else n * norm.weight.float()
    n = n if norm.bias is None else n + norm.bias.float()
    n = n if scale is None else n * (1.0 + scale.float())
    n = n if shift is None else n + shift.float()
    return x, n.to(residual.dtype)


def gated_residual_adaln_quant(residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a product in 8 bits.

    Args:
        kind: "int8" or "fp8"; the rest as in `gated_residual_adaln`.

    Returns:
        (x, values, row_scale): the modulated rows, rounded to their type, then as `quantise_rows` has them.
    """
    x, modulated = gated_residual_adaln(residual, y, modulation, norm)
    return x, *quantise_rows(modulated, kind)


def gelu_quant(x: Tensor, activation: str, kind: str) -> tuple[Tensor, Tensor]:
    """The activation of a feed-forward layer, rounded to its type, then its rows in 8 bits.

    Args:
        x: [batch, ..., channels]; for the last two activations [batch, ..., 2 channels]: values, then gates.
        activation: "gelu", "gelu_tanh", "geglu" (values * gelu(gates)) or "swiglu" (values * silu(gates)).
        kind: "int8" or "fp8".

    Returns:
        (values, scale) as `quantise_rows` has them.
    """
    act = {"gelu": elementary.gelu, "geglu": elementary.gelu, "gelu_tanh": elementary.gelu_tanh, "swiglu": elementary.silu}[activation]
    if activation in ("geglu", "swiglu"):
        values, gates = x.float().chunk(2, -1)
        return quantise_rows((values * act(gates)).to(x.dtype), kind)
    return quantise_rows(act(x.float()).to(x.dtype), kind)


def quantise_fixed(x: Tensor, grid: Grid) -> Tensor:
    """Activations on an int8 grid that was fixed beforehand.

    Args:
        x: [..., channels].

    Returns:
        int8 of x's shape; what is not a number becomes 0.
    """
    factor = (grid.scale if grid.smooth is None else grid.scale * grid.smooth).reciprocal()
    return (x.float() * factor).add_(grid.zero).round_().nan_to_num_(0.0).clamp_(-128, 127).to(torch.int8)


def int8_linear(x: Tensor, weight: Weight, grid: Grid | None = None, fix: Fix | None = None, activation: str = "none") -> Tensor:
    """A linear layer in int8: activations quantised, multiplied exactly, brought back with bias, correction and activation.

    Args:
        x: [..., in].
        weight: With its scales and bias.
        grid: Of the activations; None for the largest magnitude of every row.
        fix: A correction of the output, bias included, or None.
        activation: "none", "gelu", "gelu_tanh" or "silu".

    Returns:
        [..., out] in the type of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    factor, shift = weight.scale, torch.zeros_like(weight.scale)
    if grid is None:
        values, row_scale = quantise_rows(flat, "int8")
    else:
        values, row_scale = quantise_fixed(flat, grid), None
        factor = grid.scale * weight.scale
        shift = -factor * grid.zero * grid.sums
    if weight.bias is not None:
        shift = shift + weight.bias.float()
    if fix is not None:
        factor, shift = factor * fix.scale, shift * fix.scale + fix.shift
    if row_scale is None:
        y = scaled_product(values, weight.values, factor, shift)
    else:  # not addcmul: whether that rounds the product depends on its build
        y = scaled_product(values, weight.values, factor).mul_(row_scale).add_(shift)
    if activation == "silu":
        y = F.silu(y)
    elif activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y.to(x.dtype).view(*x.shape[:-1], len(weight.values))


def drift(now: Tensor, before: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """How far each sample has moved, and whether that is little; the answer stays on the device.

    Args:
        now, before: [batch, ...].
        threshold: Of the mean change over the mean size.

    Returns:
        (sums, still): float32 [batch, 2], Σ|now - before| and Σ|before|; bool [batch], false where something is not a number.
    """
    now, before = now.flatten(1).float(), before.flatten(1).float()
    sums = torch.stack([(now - before).abs().sum(1), before.abs().sum(1)], 1)
    change, size = (sums / now.shape[1]).unbind(1)
    return sums, change / size.clamp_min(1e-12) < threshold


def reindex(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Some rows of many tensors.

    Args:
        tensors: [batch, ...] each, of any types.
        rows: int64 [n]; may repeat rows, drop them, change their order.

    Returns:
        [n, ...] each.
    """
    return [_as_bytes(t).index_select(0, rows).view(t.dtype) for t in tensors]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Not every type can be indexed: a row of 8-bit floats as integers."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor


# ---------------------------------------------------------------------------------------------------------- decoding

_LARGEST = torch.finfo(torch.float32).max


def token_stats(
    logits: Tensor, current: Tensor, suppressed: Sequence[int], divisor: float = 1.0, noise: Noise | None = None
) -> tuple[Tensor, Tensor]:
    """What a decoding schedule sees of logits. What is not a number counts as the smallest finite logit, infinities as the largest ones.

    Args:
        logits: [rows, positions, vocabulary].
        current: int64 [rows, positions], the tokens that the model was shown.
        suppressed: Ids that are never chosen, the mask among them.
        divisor: The temperature of a tempered softmax, else 1.
        noise: What is added before a token is chosen; None takes the most probable one.

    Returns:
        (ids, numbers): int64 [2, rows, positions], the chosen and the most probable tokens, ties to the lowest id; float32
        [9, rows, positions]: log-probability of the chosen token, of the best, the second largest probability, entropy in nats,
        logsumexp, probability of `current` (0 where it is suppressed), noise at the chosen token and at the best, and the first
        one's probability.
    """
    z = (logits.float() / divisor).nan_to_num(nan=-_LARGEST)
    for token in suppressed:
        if token < z.shape[-1]:
            z[..., token].fill_(-torch.inf)
    largest, best = z.max(-1)
    log_sum = (z - largest[..., None]).exp().sum(-1).log()
    log_p = (z - largest[..., None]) - log_sum[..., None]

    def at(values: Tensor, ids: Tensor) -> Tensor:
        inside = (ids >= 0) & (ids < values.shape[-1])
        return values.gather(-1, ids.clamp(0, values.shape[-1] - 1)[..., None])[..., 0].masked_fill(~inside, -torch.inf)

    tokens, zeros = best, torch.zeros_like(largest)
    at_token = at_best = zeros
    if noise is not None:
        drawn = gumbel(noise.seeds, noise.positions, noise.steps, z.shape[-1]) * noise.scale
        tokens = (log_p + drawn).argmax(-1)
        at_token, at_best = at(drawn, tokens), at(drawn, best)
    chosen = at(log_p, tokens)
    numbers = torch.stack([
        chosen,
        -log_sum,
        log_p.scatter(-1, best[..., None], -torch.inf).amax(-1).exp(),
        -(log_p.exp() * log_p.clamp(min=-_LARGEST)).sum(-1),
        largest + log_sum,
        at(log_p, current).exp(),
        at_token,
        at_best,
        chosen.exp(),
    ])  # fmt: skip
    return torch.stack([tokens, best]), numbers


def token_commit(
    logits: Tensor, current: Tensor, suppressed: Sequence[int], selection: Selection, divisor: float = 1.0, noise: Noise | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and which masked positions commit.

    Args:
        selection: The rule; the rest as in `token_stats`.

    Returns:
        (ids, numbers, commits, after): the last number is the score; bool [rows, positions]; int64 [rows, positions], the tokens after
        the commits.
    """
    ids, numbers = token_stats(logits, current, suppressed, divisor, noise)
    value = {"low_confidence": numbers[0].exp(), "margin": numbers[1].exp() - numbers[2], "entropy": -numbers[3]}[selection.score]
    numbers[8] = value.nan_to_num(nan=-_LARGEST)
    candidates = current == selection.mask if selection.active is None else (current == selection.mask) & selection.active
    order = torch.where(candidates, numbers[8], -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    commits = candidates & ((numbers[8] >= selection.threshold) | (place < selection.minimum))
    return ids, numbers, commits, torch.where(commits, ids[0], current)


def gumbel(seeds: Tensor, positions: Tensor, steps: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [rows, positions, vocabulary] that belongs to its place: Philox4x32-10 (Salmon et al., SC 2011), four tokens
    to a counter (their number, position, step, 0), keyed by the row's seed."""
    word = 0xFFFFFFFF
    counters = torch.arange((vocabulary + 3) // 4, device=seeds.device)
    c = [counters, positions.expand(len(seeds), -1)[..., None] & word, steps[:, None, None] & word, torch.zeros_like(counters)]
    k = [seeds[:, None, None] & word, (seeds[:, None, None] >> 32) & word]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64 bits hold the low ones of a product, and the mask what a shift smears
        c = [((second >> 32) & word) ^ c[1] ^ k[0], second & word, ((first >> 32) & word) ^ c[3] ^ k[1], first & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    # u is the distance from 1, which float32 resolves to 2^-33: so the upper tail, which decides, is fine.
    u = ((torch.stack(c, -1).flatten(-2)[..., :vocabulary].float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))
