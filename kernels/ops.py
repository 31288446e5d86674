"""The fused ops, one function each: a kernel where the tensors are on a CUDA device, the reference elsewhere.

Each is a `torch.library` op of the name space `hasten`, so `torch.compile` and fake tensors see through it. Results are new and dense; no
input is changed, and none has a gradient: they are for inference. What an op means is said in `hasten.kernels.reference`. With
HASTEN_KERNELS=reference, or where kernels cannot be compiled or launched (one warning says why), CUDA tensors get the reference, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.kernels import backend, fused, reference
from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight

STREAMS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of hidden states."""


def _as_they_are(*args: Any) -> tuple[Any, ...]:
    return args


def _registered(
    name: str,
    schema: str,
    meaning: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    gather: Callable[..., tuple[Any, ...]] = _as_they_are,
) -> Any:
    """A `torch.library` op: `meaning` everywhere but on CUDA, where it is the stand-in of `kernel`.

    The arguments of a schema stand one by one; `gather` puts those together that belong together.
    """

    def plain(*args: Any) -> Any:
        return _dense(meaning(*gather(*args)))

    def on_cuda(*args: Any) -> Any:
        device = _device_of(args)
        if backend.usable(device):
            with torch.cuda.device(device):
                made = kernel(backend.of_device(device.index), *gather(*args))
            if made is not None:
                return made
        return plain(*args)

    op = torch.library.custom_op(f"hasten::{name}", plain, mutates_args=(), schema=schema)
    op.register_kernel("cuda")(on_cuda)
    op.register_fake(fake)
    return op


def _dense(made: Any) -> Any:
    return made.contiguous() if isinstance(made, Tensor) else type(made)(t.contiguous() for t in made)


def _device_of(args: Sequence[Any]) -> torch.device:
    return next(t.device for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(t, Tensor))


def _fresh(like: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(like.shape if shape is None else shape, dtype=dtype or like.dtype, device=like.device)


def _one_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where two of the tensors are on different devices."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    for name, device in given.items():
        if device != given[first]:
            raise ValueError(f"{name} must be on {given[first]} like {first}, not on {device}")


def _named(bundle: Fix | Grid | Modulation | Norm | None, prefix: str = "") -> dict[str, Any]:
    """What stands in it, by name."""
    return {} if bundle is None else {f"{prefix}{name}": value for name, value in bundle._asdict().items()}


def _stream(name: str, tensor: Tensor, least: int = 2) -> None:
    """Raises ValueError where a tensor is no floating [batch, ..., channels]."""
    if tensor.dtype not in STREAMS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.ndim < least:
        raise ValueError(f"{name} must be [batch, ..., channels], not {list(tensor.shape)}")


# ---------------------------------------------------------------------------------------------------------- stored offsets

_FIX = "Tensor? fix_scale=None, Tensor? fix_shift=None"

_delta_apply = _registered(
    "delta_apply",
    f"(Tensor hidden_states, Tensor values, Tensor? scale=None, {_FIX}) -> Tensor",
    reference.delta_apply,
    fused.delta_apply,
    lambda hidden_states, *rest: _fresh(hidden_states),
    lambda hidden_states, values, scale=None, *fix: (hidden_states, values, scale, Fix.given(*fix)),
)


def delta_apply(hidden_states: Tensor, values: Tensor, scale: Tensor | None = None, fix: Fix | None = None) -> Tensor:
    """A stored offset, dequantised, corrected and added in one pass; see `reference.delta_apply` for arguments and result.

    Raises:
        ValueError: Shapes, types or devices do not go together.
    """
    _offsets(hidden_states, [values], [] if scale is None else [scale], fix)
    made: Tensor = _delta_apply(hidden_states, values, scale, *(fix or ()))
    return made


def _offsets(hidden_states: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], fix: Fix | None) -> None:
    """Raises ValueError where the arguments of the two ops that add offsets do not go together."""
    _stream("hidden_states", hidden_states)
    shape, channels = hidden_states.shape, hidden_states.shape[-1]
    kinds = {hidden_states.dtype, torch.bfloat16, torch.int8, torch.float8_e4m3fn}
    tables: dict[str, Tensor] = _named(fix, "fix_")
    for k, value in enumerate(values):
        _one_device(hidden_states=hidden_states, values=value, scale=scales[k] if scales else None, **tables)
        if value.shape != shape or value.dtype not in kinds or value.dtype != values[0].dtype:
            names = ", ".join(sorted(str(kind) for kind in kinds))
            raise ValueError(f"values must be {list(shape)} of one type of {names}, not {value.dtype} {list(value.shape)}")
    by_token, by_channel = (*shape[:-1], 1), (shape[0], *[1] * (len(shape) - 2), channels)
    for scale in scales:
        if scale.shape not in (by_token, by_channel) or scale.shape != scales[0].shape or scale.dtype != torch.float32:
            raise ValueError(f"scale must be float32 {list(by_token)} or {list(by_channel)}, not {scale.dtype} {list(scale.shape)}")
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[1] != channels or table.dtype != torch.float32 or table.shape != tables["fix_scale"].shape:
            raise ValueError(f"{name} must be float32 [groups, {channels}], not {table.dtype} {list(table.shape)}")
        if len(table) == 0 or shape[0] % len(table):
            raise ValueError(f"{name} must have groups that {shape[0]} samples can be shared among, not {len(table)}")


_forecast_apply = _registered(
    "forecast_apply",
    f"(Tensor hidden_states, Tensor[] values, Tensor[] scales, float[] weights, {_FIX}) -> Tensor",
    reference.forecast_apply,
    fused.forecast_apply,
    lambda hidden_states, *rest: _fresh(hidden_states),
    lambda hidden_states, values, scales, weights, *fix: (hidden_states, values, scales, weights, Fix.given(*fix)),
)


def forecast_apply(
    hidden_states: Tensor, values: Sequence[Tensor], weights: Sequence[float], scales: Sequence[Tensor] = (), fix: Fix | None = None
) -> Tensor:
    """Stored offsets, weighted, corrected and added in one pass; see `reference.forecast_apply`. Orders 0 to 2: one to three offsets.

    Raises:
        ValueError: Shapes, types, devices or numbers of arguments do not go together.
    """
    if not 1 <= len(values) <= 3 or len(weights) != len(values) or len(scales) not in (0, len(values)):
        raise ValueError(f"values must be 1 to 3 with as many weights and scales, not {len(values)}, {len(weights)} and {len(scales)}")
    _offsets(hidden_states, values, scales, fix)
    made: Tensor = _forecast_apply(hidden_states, list(values), list(scales), list(weights), *(fix or ()))
    return made


_delta_store = _registered(
    "delta_store",
    "(Tensor after, Tensor before, str kind, bool by_channel=False) -> (Tensor, Tensor)",
    reference.delta_store,
    fused.delta_store,
    lambda after, before, kind, by_channel=False: _fake_store(after, kind, by_channel),
)


def _fake_store(after: Tensor, kind: str, by_channel: bool) -> tuple[Tensor, Tensor]:
    if kind == "bf16":
        return _fresh(after, torch.bfloat16), _fresh(after, torch.float32, (0,))
    shape = (len(after), *[1] * (after.ndim - 2), after.shape[-1]) if by_channel else (*after.shape[:-1], 1)
    return _fresh(after, fused.EIGHT_BITS[kind]), _fresh(after, torch.float32, shape)


def delta_store(after: Tensor, before: Tensor, kind: str, by_channel: bool = False) -> tuple[Tensor, Tensor | None]:
    """An offset on its way into memory in one pass; see `reference.delta_store`. The scale is None for "bf16".

    Raises:
        ValueError: Shapes, types or devices do not go together, or there is no such kind.
    """
    _stream("after", after)
    _one_device(after=after, before=before)
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(f"before must be {after.dtype} {list(after.shape)} like after, not {before.dtype} {list(before.shape)}")
    _one_of("kind", kind, ("bf16", *fused.EIGHT_BITS))
    if by_channel and after.ndim < 3:
        raise ValueError(f"after must be [batch, ..., tokens, channels] with by_channel=True, not {list(after.shape)}")
    if by_channel and 0 in after.shape[1:]:
        raise ValueError(f"after must have tokens with by_channel=True, not {list(after.shape)}")
    _not_hollow("after", after)
    values, scale = _delta_store(after, before, kind, by_channel)
    return values, None if kind == "bf16" else scale


_quantise_rows = _registered(
    "quantise_rows",
    "(Tensor x, str kind) -> (Tensor, Tensor)",
    reference.quantise_rows,
    fused.quantise_rows,
    lambda x, kind: _fake_store(x, kind, False),
)


def quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits, a scale for each; see `reference.quantise_rows`.

    Raises:
        ValueError: The type is no floating one, or there is no such kind.
    """
    _stream("x", x)
    _one_of("kind", kind, tuple(fused.EIGHT_BITS))
    _not_hollow("x", x)
    values, scale = _quantise_rows(x, kind)
    return values, scale


# ---------------------------------------------------------------------------------------------------------- blocks

_ADALN = "Tensor residual, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, bool rms"

_UNMODULATED = Modulation()
_PLAIN_NORM = Norm()


def _gather_adaln(residual: Tensor, y: Tensor, *rest: Any) -> tuple[Any, ...]:
    return residual, y, Modulation(*rest[:3]), Norm(*rest[3:7]), *rest[7:]


_gated_residual_adaln = _registered(
    "gated_residual_adaln",
    f"({_ADALN}) -> (Tensor, Tensor)",
    reference.gated_residual_adaln,
    fused.gated_residual_adaln,
    lambda residual, *rest: (_fresh(residual), _fresh(residual)),
    _gather_adaln,
)
_gated_residual_adaln_quant = _registered(
    "gated_residual_adaln_quant",
    f"({_ADALN}, str kind) -> (Tensor, Tensor, Tensor)",
    reference.gated_residual_adaln_quant,
    fused.gated_residual_adaln_quant,
    lambda residual, *rest: (_fresh(residual), *_fake_store(residual, rest[-1], False)),
    _gather_adaln,
)


def gated_residual_adaln(
    residual: Tensor, y: Tensor, modulation: Modulation = _UNMODULATED, norm: Norm = _PLAIN_NORM
) -> tuple[Tensor, Tensor]:
    """What stands between attention and feed-forward of a DiT block in one pass; see `reference.gated_residual_adaln`.

    Raises:
        ValueError: Shapes, types or devices do not go together.
    """
    x, modulated = _gated_residual_adaln(residual, y, *_broadcasting(residual, y, modulation, norm), *norm)
    return x, modulated


def gated_residual_adaln_quant(
    residual: Tensor, y: Tensor, modulation: Modulation = _UNMODULATED, norm: Norm = _PLAIN_NORM, kind: str = "int8"
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with rows in 8 bits for the next product; see `reference.gated_residual_adaln_quant`.

    Raises:
        ValueError: Shapes, types or devices do not go together, or there is no such kind.
    """
    modulation = _broadcasting(residual, y, modulation, norm)
    _one_of("kind", kind, tuple(fused.EIGHT_BITS))
    x, values, row_scale = _gated_residual_adaln_quant(residual, y, *modulation, *norm, kind)
    return x, values, row_scale


def _broadcasting(residual: Tensor, y: Tensor, modulation: Modulation, norm: Norm) -> Modulation:
    """The modulation in shapes that broadcast; raises ValueError where arguments do not go together."""
    _stream("residual", residual)
    _not_hollow("residual", residual)
    _one_device(residual=residual, y=y, weight=norm.weight, bias=norm.bias, **_named(modulation))
    if y.shape != residual.shape or y.dtype != residual.dtype:
        raise ValueError(f"y must be {residual.dtype} {list(residual.shape)} like residual, not {y.dtype} {list(y.shape)}")
    for name, table in (("weight", norm.weight), ("bias", norm.bias)):
        if table is not None and (table.shape != residual.shape[-1:] or table.dtype not in STREAMS):
            raise ValueError(f"{name} must be floating [{residual.shape[-1]}], not {table.dtype} {list(table.shape)}")
    found: dict[str, Tensor] = {}
    for name, table in _named(modulation).items():
        if table is None:
            continue
        if table.ndim == 2 < residual.ndim:
            table = table.view(len(table), *[1] * (residual.ndim - 2), table.shape[1])
        fits = table.ndim == residual.ndim and all(n in (1, m) for n, m in zip(table.shape, residual.shape, strict=True))
        if not fits or table.dtype not in (torch.float32, residual.dtype):
            allowed = f"{residual.dtype} or float32 that broadcasts against {list(residual.shape)}"
            raise ValueError(f"{name} must be {allowed}, not {table.dtype} {list(table.shape)}")
        found[name] = table
    return Modulation(**found)


_gelu_quant = _registered(
    "gelu_quant",
    "(Tensor x, str activation, str kind) -> (Tensor, Tensor)",
    reference.gelu_quant,
    fused.gelu_quant,
    lambda x, activation, kind: _fake_store(x[..., : x.shape[-1] // 2] if activation in ("geglu", "swiglu") else x, kind, False),
)


def gelu_quant(x: Tensor, activation: str = "gelu", kind: str = "int8") -> tuple[Tensor, Tensor]:
    """The activation of a feed-forward layer and its rows in 8 bits in one pass; see `reference.gelu_quant`.

    Raises:
        ValueError: The type is no floating one, an odd number of channels is to be halved, or there is no such activation or kind.
    """
    _stream("x", x)
    _one_of("activation", activation, ("gelu", "gelu_tanh", "geglu", "swiglu"))
    _one_of("kind", kind, tuple(fused.EIGHT_BITS))
    if activation in ("geglu", "swiglu") and x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels for {activation!r}, not {x.shape[-1]}")
    _not_hollow("x", x)
    values, scale = _gelu_quant(x, activation, kind)
    return values, scale


_int8_linear = _registered(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? scale=None, Tensor? zero=None, Tensor? sums=None, "
    f'Tensor? smooth=None, {_FIX}, str activation="none") -> Tensor',
    reference.int8_linear,
    fused.int8_linear,
    lambda x, weight, *rest: _fresh(x, shape=(*x.shape[:-1], len(weight))),
    lambda x, weight, scale, bias=None, *rest: (x, Weight(weight, scale, bias), Grid.given(*rest[:4]), Fix.given(*rest[4:6]), *rest[6:]),
)


def int8_linear(x: Tensor, weight: Weight, grid: Grid | None = None, fix: Fix | None = None, activation: str = "none") -> Tensor:
    """A linear layer in int8: quantised in one pass, multiplied, brought back in another; see `reference.int8_linear`.

    Raises:
        ValueError: Shapes, types or devices do not go together, or there is no such activation.
    """
    _stream("x", x, 1)
    values = weight.values
    out, columns = values.shape if values.ndim == 2 else (0, 0)
    tables: dict[str, Tensor | None] = {"weight_scale": weight.scale, "bias": weight.bias, **_named(grid), **_named(fix, "fix_")}
    _one_device(x=x, weight=values, **tables)
    if out * columns == 0 or values.dtype != torch.int8 or x.shape[-1] != columns:
        raise ValueError(f"weight must be int8 [out, {x.shape[-1]}] with entries, not {values.dtype} {list(values.shape)}")
    for name, table in tables.items():
        size = {"scale": 1, "zero": 1, "smooth": columns}.get(name, out)
        types = {"sums": (torch.int32,), "bias": (torch.float32, x.dtype)}.get(name, (torch.float32,))
        if table is not None and (table.shape != (size,) or table.dtype not in types):
            raise ValueError(f"{name} must be {' or '.join(map(str, types))} [{size}], not {table.dtype} {list(table.shape)}")
    _one_of("activation", activation, ("none", "gelu", "gelu_tanh", "silu"))
    made: Tensor = _int8_linear(x, *weight, *(grid or (None,) * 4), *(fix or (None, None)), activation)
    return made


# ---------------------------------------------------------------------------------------------------------- deciders, particles

_drift = _registered(
    "drift",
    "(Tensor now, Tensor before, float threshold) -> (Tensor, Tensor)",
    reference.drift,
    fused.drift,
    lambda now, before, threshold: (_fresh(now, torch.float32, (len(now), 2)), _fresh(now, torch.bool, (len(now),))),
)


def drift(now: Tensor, before: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """How far each sample has moved and whether that is little, decided on the device; see `reference.drift`.

    Raises:
        ValueError: Shapes, types or devices do not go together, or samples are empty.
    """
    _stream("now", now)
    _one_device(now=now, before=before)
    if before.shape != now.shape or before.dtype != now.dtype:
        raise ValueError(f"before must be {now.dtype} {list(now.shape)} like now, not {before.dtype} {list(before.shape)}")
    if 0 in now.shape[1:]:
        raise ValueError(f"now must have samples with entries, not {list(now.shape)}")
    sums, still = _drift(now, before, threshold)
    return sums, still


_reindex = _registered(
    "reindex",
    "(Tensor[] tensors, Tensor rows) -> Tensor[]",
    reference.reindex,
    fused.reindex,
    lambda tensors, rows: [_fresh(t, shape=(len(rows), *t.shape[1:])) for t in tensors],
)


def reindex(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Some rows of many tensors in one launch; see `reference.reindex`.

    Raises:
        ValueError: There is no tensor, one is no batch or an empty one, devices differ, or `rows` are no indices.
        IndexError: On CPUs, an index is out of range; a CUDA device stops, as for PyTorch's own gathers.
    """
    if not tensors or any(t.ndim == 0 for t in tensors):
        raise ValueError("tensors must be at least one, each of them [batch, ...]")
    _one_device(**{f"tensors[{k}]": t for k, t in enumerate(tensors)}, rows=rows)
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64 [n], not {rows.dtype} {list(rows.shape)}")
    if len(rows) and not all(map(len, tensors)):
        raise ValueError(f"tensors must have rows where {len(rows)} are chosen, not {next(list(t.shape) for t in tensors if not len(t))}")
    made: list[Tensor] = _reindex(list(tensors), rows)
    return made


# ---------------------------------------------------------------------------------------------------------- decoding


class TokenStats(NamedTuple):
    """What a decoding schedule sees of logits, [rows, positions] each; see `reference.token_stats`."""

    tokens: Tensor
    best: Tensor
    log_p: Tensor
    log_p1: Tensor
    p2: Tensor
    entropy: Tensor
    logsumexp: Tensor
    p_current: Tensor
    token_noise: Tensor
    best_noise: Tensor


_KEY = "float divisor=1., float noise=0., Tensor? seeds=None, Tensor? positions=None, Tensor? steps=None"


def _fake_tokens(logits: Tensor, current: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fresh(logits, torch.int64, (2, *current.shape)), _fresh(logits, torch.float32, (9, *current.shape))


_token_stats = _registered(
    "token_stats",
    f"(Tensor logits, Tensor current, int[] suppressed, {_KEY}) -> (Tensor, Tensor)",
    reference.token_stats,
    fused.token_stats,
    _fake_tokens,
    lambda logits, current, suppressed, divisor=1.0, *noise: (logits, current, suppressed, divisor, Noise.given(*noise)),
)
_token_commit = _registered(
    "token_commit",
    "(Tensor logits, Tensor current, int[] suppressed, int mask, float threshold, int minimum, str score, Tensor? active, "
    f"{_KEY}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.token_commit,
    fused.token_commit,
    lambda logits, current, *rest: (*_fake_tokens(logits, current), _fresh(current, torch.bool), _fresh(current)),
    lambda logits, current, suppressed, mask, threshold, minimum, score, active, divisor=1.0, *noise: (
        logits, current, suppressed, Selection(mask, threshold, minimum, score, active), divisor, Noise.given(*noise),
    ),
)  # fmt: skip


def token_stats(logits: Tensor, current: Tensor, suppressed: Sequence[int], divisor: float = 1.0, noise: Noise | None = None) -> TokenStats:
    """What a decoding schedule sees of logits in one pass; see `reference.token_stats`. At most 32 suppressed ids are fused.

    Raises:
        ValueError: Shapes, types or devices do not go together, or every token is suppressed.
    """
    _token_arguments(logits, current, suppressed, divisor, noise)
    ids, numbers = _token_stats(logits, current, list(suppressed), divisor, *(noise or ()))
    return TokenStats(*ids.unbind(), *numbers[:8].unbind())


def token_commit(
    logits: Tensor, current: Tensor, suppressed: Sequence[int], selection: Selection, divisor: float = 1.0, noise: Noise | None = None
) -> tuple[TokenStats, Tensor, Tensor]:
    """The same, with the selection of a confidence threshold in the same launch; see `reference.token_commit`.

    Returns:
        (statistics, commits, after): bool and int64 [rows, positions].

    Raises:
        ValueError: Shapes, types or devices do not go together, there is no such score, or every token is suppressed.
    """
    _token_arguments(logits, current, suppressed, divisor, noise)
    _one_of("score", selection.score, ("low_confidence", "margin", "entropy"))
    active = selection.active
    if active is not None and (active.shape != current.shape or active.dtype != torch.bool or active.device != logits.device):
        raise ValueError(f"active must be bool {list(current.shape)} on {logits.device}, not {active.dtype} {list(active.shape)}")
    if selection.minimum < 0:
        raise ValueError(f"minimum must be at least 0, not {selection.minimum}")
    ids, numbers, commits, after = _token_commit(logits, current, list(suppressed), *selection, divisor, *(noise or ()))
    return TokenStats(*ids.unbind(), *numbers[:8].unbind()), commits, after


def _token_arguments(logits: Tensor, current: Tensor, suppressed: Sequence[int], divisor: float, noise: Noise | None) -> None:
    """Raises ValueError where arguments do not go together."""
    _stream("logits", logits)
    if logits.ndim != 3 or current.shape != logits.shape[:2] or current.dtype != torch.int64:
        raise ValueError(
            "logits must be [rows, positions, vocabulary] for int64 current [rows, positions], "
            f"not {list(logits.shape)} for {current.dtype} {list(current.shape)}"
        )
    if not 0 < divisor < float("inf"):
        raise ValueError(f"divisor must be a number above 0, not {divisor!r}")
    if any(token < 0 for token in suppressed):
        raise ValueError(f"suppressed must be token ids of at least 0, not {list(suppressed)}")
    if len({token for token in suppressed if token < logits.shape[2]}) == logits.shape[2]:
        raise ValueError(f"suppressed must leave a token of a vocabulary of {logits.shape[2]}, not none")
    _one_device(logits=logits, current=current)
    if noise is None:
        return
    if not 0 < noise.scale < float("inf"):
        raise ValueError(f"noise.scale must be a number above 0, not {noise.scale!r}")
    _one_device(logits=logits, seeds=noise.seeds, positions=noise.positions, steps=noise.steps)
    rows, width = current.shape
    for name, table, shapes in (
        ("seeds", noise.seeds, ((rows,),)), ("positions", noise.positions, ((rows, width), (width,))), ("steps", noise.steps, ((rows,),)),
    ):  # fmt: skip
        if table.dtype != torch.int64 or tuple(table.shape) not in shapes:
            raise ValueError(f"noise.{name} must be int64 {list(shapes[0])}, not {table.dtype} {list(table.shape)}")


# ---------------------------------------------------------------------------------------------------------- what all of them refuse


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _not_hollow(name: str, tensor: Tensor) -> None:
    """Raises ValueError where rows have no entries: they have no largest one, and no mean."""
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one channel, not {list(tensor.shape)}")
