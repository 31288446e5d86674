"""The ops as a user calls them: registered as PyTorch wants it, seen through by the compiler, and clear about what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.kernels import fused, ops, reference
from hasten.kernels.arguments import Fix, Grid, Modulation, Noise, Norm, Selection, Weight
from tests.kernels.cases import same, values

X, Y = values((2, 5, 16), torch.float32, 1), values((2, 5, 16), torch.float32, 2)
HALF = X.bfloat16()
PACKED = reference.delta_store(X, Y, "int8")
FIX = Fix(values((2, 16), torch.float32, 3), values((2, 16), torch.float32, 4))
WEIGHT = Weight(values((12, 16), torch.int8, 5, spread=50.0), values((12,), torch.float32, 6).abs())
BIASED = WEIGHT._replace(bias=WEIGHT.scale)
GRID = Grid(torch.tensor([0.03]), torch.tensor([2.0]), WEIGHT.values.sum(1, dtype=torch.int32))
LOGITS, CURRENT = values((2, 3, 40), torch.float32, 7), torch.tensor([[0, 5, 0], [9, 0, 0]])
NOISE = Noise(0.7, torch.tensor([1, 2]), torch.arange(3).expand(2, 3), torch.tensor([0, 4]))
ROWS = torch.tensor([1, 1, 0])

CALLS: dict[str, list[tuple[Any, ...]]] = {
    "delta_apply": [(X, Y), (HALF, *PACKED, FIX), (X.mT, Y.mT)],
    "forecast_apply": [(X, [Y, X], [], [2.0, -1.0]), (X, [PACKED[0]] * 3, [PACKED[1]] * 3, [3.0, -3.0, 1.0], FIX)],
    "delta_store": [(X, Y, "bf16", False), (X, Y, "int8", False), (HALF, HALF, "int8", True)],
    "quantise_rows": [(HALF, "int8"), (X.mT, "int8")],
    "gated_residual_adaln": [
        (X, Y, Modulation(), Norm()),
        (X, Y, Modulation(X[:, :1], Y[:, :1], X[:, :1]), Norm(X[0, 0], Y[0, 0], 1e-6, True)),
    ],
    "gated_residual_adaln_quant": [(HALF, HALF, Modulation(None, HALF[:, :1], HALF[:, :1]), Norm(), "int8")],
    "gelu_quant": [(X, "gelu", "int8"), (HALF, "swiglu", "int8")],
    "int8_linear": [
        (X, WEIGHT),
        (HALF, BIASED, GRID._replace(smooth=X[0, 0].abs() + 1), Fix(WEIGHT.scale, WEIGHT.scale), "silu"),
    ],
    "drift": [(X, Y, 0.5), (X.mT, Y.mT, 0.5)],
    "reindex": [([X, HALF, PACKED[0]], ROWS)],
    "token_stats": [(LOGITS, CURRENT, [0]), (LOGITS, CURRENT, [0, 3], 0.7, NOISE)],
    "token_commit": [
        (LOGITS, CURRENT, [0], Selection(0, 0.5, 1, "margin")),
        (LOGITS, CURRENT, [0], Selection(0, 0.5, 1, "entropy", CURRENT == 0), 0.7, NOISE),
    ],
}
EACH = [pytest.param(name, args, id=f"{name}-{k}") for name, calls in CALLS.items() for k, args in enumerate(calls)]


def test_every_op_is_tried() -> None:
    public = {
        name for name in vars(reference) if callable(getattr(reference, name)) and getattr(reference, name).__module__ == reference.__name__
    }
    assert {name for name in public if not name.startswith("_")} - {"quantise_fixed", "gumbel"} == set(CALLS)
    assert all(hasattr(fused, name) and hasattr(ops, name) and hasattr(torch.ops.hasten, name) for name in CALLS)


@pytest.mark.parametrize(("name", "args"), EACH)
def test_ops_are_what_torch_wants(name: str, args: tuple[Any, ...]) -> None:
    """Schema, fake tensors, functionalisation: what opcheck looks at. Results are new and dense."""
    op, flat_args = getattr(torch.ops.hasten, name).default, spread(args)
    torch.library.opcheck(
        op, flat_args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    )
    made, meant = flat(op(*flat_args)), flat(getattr(reference, name)(*args))
    inputs = {t.data_ptr() for t in flat(args)}
    assert len(made) == len(meant)
    for one, other in zip(made, meant, strict=True):
        assert same(one, other) and one.is_contiguous() and (one.data_ptr() not in inputs or not one.numel())


def spread(args: Sequence[Any]) -> tuple[Any, ...]:
    """As PyTorch's ops take them: one by one, what belongs together as well."""
    return tuple(value for arg in args for value in (arg if hasattr(arg, "_fields") else [arg]))


def flat(value: Any) -> list[Tensor]:
    """The tensors of a nest."""
    if isinstance(value, Tensor):
        return [value]
    return [t for entry in value for t in flat(entry)] if isinstance(value, list | tuple) else []


def everything(x: Tensor, y: Tensor, logits: Tensor, current: Tensor) -> list[Tensor]:
    values8, scale = ops.delta_store(x, y, "int8")
    moved = ops.delta_apply(x, values8, scale, FIX)
    moved = ops.forecast_apply(moved, [y, x], [1.5, -0.5])
    still = ops.drift(moved, x, 0.1)
    joined, modulated = ops.gated_residual_adaln(moved, y, Modulation(FIX.scale, FIX.shift, FIX.scale))
    eight = ops.gated_residual_adaln_quant(joined, modulated, kind="int8")
    made = ops.int8_linear(modulated, BIASED, GRID, activation="gelu")
    stats, commits, after = ops.token_commit(logits, current, [0], Selection(0, 0.1), noise=NOISE)
    return [*still, *eight, made, *ops.gelu_quant(made), *ops.reindex([made, eight[1]], ROWS), *stats, commits, after]


def test_the_compiler_sees_through_all_of_them() -> None:
    args = X, Y, LOGITS, CURRENT
    compiled: Callable[..., Sequence[Tensor]] = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), everything(*args), strict=True):
        assert same(got, want)


@pytest.mark.slow
def test_inductor_compiles_them() -> None:
    args = X, Y, LOGITS, CURRENT
    for got, want in zip(torch.compile(everything, fullgraph=True)(*args), everything(*args), strict=True):
        torch.testing.assert_close(got, want)


def test_where_kernels_are_off_cuda_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, called directly: no device is asked for."""
    monkeypatch.setenv("HASTEN_KERNELS", "reference")
    asked = []
    monkeypatch.setattr("hasten.kernels.backend.of_device", asked.append)
    made = ops._delta_apply._backend_fns["cuda"](X, Y)
    assert torch.equal(made, X + Y) and asked == []


META = torch.device("meta")
REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("hidden_states must be float32, bfloat16 or float16, not torch.float64", lambda: ops.delta_apply(X.double(), Y.double())),
    ("hidden_states must be float32, bfloat16 or float16, not torch.int64", lambda: ops.delta_apply(CURRENT, CURRENT)),
    (r"hidden_states must be \[batch, ..., channels\], not \[16\]", lambda: ops.delta_apply(X[0, 0], Y[0, 0])),
    ("values must be on cpu like hidden_states, not on meta", lambda: ops.delta_apply(X, Y.to(META))),
    (r"values must be \[2, 5, 16\] of one type of", lambda: ops.delta_apply(X, Y[:1])),
    ("values must be .* not torch.float16", lambda: ops.delta_apply(X, Y.half())),
    (r"scale must be float32 \[2, 5, 1\] or \[2, 1, 16\]", lambda: ops.delta_apply(X, Y, X[:, :, 0])),
    ("fix_scale and fix_shift must be given together", lambda: torch.ops.hasten.delta_apply(X, Y, fix_scale=FIX.scale)),
    (r"fix_scale must be float32 \[groups, 16\]", lambda: ops.delta_apply(X, Y, None, Fix(X[:, 0, :8], X[:, 0, :8]))),
    ("fix_scale must have groups that 2 samples can be shared among, not 3", lambda: ops.delta_apply(X, Y, None, Fix(X[0, :3], X[0, :3]))),
    ("values must be 1 to 3 with as many weights and scales, not 4, 4 and 0", lambda: ops.forecast_apply(X, [Y] * 4, [1.0] * 4)),
    ("values must be 1 to 3 with as many weights and scales, not 2, 1 and 0", lambda: ops.forecast_apply(X, [Y] * 2, [1.0])),
    (r"before must be torch.float32 \[2, 5, 16\] like after", lambda: ops.delta_store(X, HALF, "int8")),
    ("kind must be one of bf16, int8, fp8, not 'int4'", lambda: ops.delta_store(X, Y, "int4")),
    (r"after must be \[batch, ..., tokens, channels\] with by_channel=True", lambda: ops.delta_store(X[0], Y[0], "int8", True)),
    ("after must have at least one channel", lambda: ops.delta_store(X[..., :0], Y[..., :0], "int8")),
    ("after must have tokens with by_channel=True", lambda: ops.delta_store(X[:, :0], Y[:, :0], "int8", True)),
    ("kind must be one of int8, fp8, not 'bf16'", lambda: ops.quantise_rows(X, "bf16")),
    (r"y must be torch.float32 \[2, 5, 16\] like residual", lambda: ops.gated_residual_adaln(X, HALF)),
    (r"gate must be .* broadcasts against \[2, 5, 16\]", lambda: ops.gated_residual_adaln(X, Y, Modulation(X[:, :2]))),
    ("scale must be torch.bfloat16 or float32", lambda: ops.gated_residual_adaln(HALF, HALF, Modulation(None, HALF[:, :1].half()))),
    (r"weight must be floating \[16\]", lambda: ops.gated_residual_adaln(X, Y, norm=Norm(X[0]))),
    ("activation must be one of gelu, gelu_tanh, geglu, swiglu, not 'relu'", lambda: ops.gelu_quant(X, "relu")),
    ("x must have an even number of channels for 'swiglu', not 15", lambda: ops.gelu_quant(X[..., 1:], "swiglu")),
    (r"weight must be int8 \[out, 16\] with entries", lambda: ops.int8_linear(X, WEIGHT._replace(values=WEIGHT.values.t()))),
    ("scale, zero and sums must be given together", lambda: torch.ops.hasten.int8_linear(X, *WEIGHT, scale=GRID.scale)),
    ("smooth must come with scale", lambda: torch.ops.hasten.int8_linear(X, *WEIGHT, smooth=X[0, 0])),
    (r"weight_scale must be torch.float32 \[12\]", lambda: ops.int8_linear(X, WEIGHT._replace(scale=WEIGHT.scale[:5]))),
    (r"bias must be torch.float32 or torch.bfloat16 \[12\]", lambda: ops.int8_linear(HALF, WEIGHT._replace(bias=WEIGHT.scale.half()))),
    ("activation must be one of none, gelu, gelu_tanh, silu, not 'relu'", lambda: ops.int8_linear(X, WEIGHT, activation="relu")),
    (r"before must be torch.float32 \[2, 5, 16\] like now", lambda: ops.drift(X, Y[:1], 0.1)),
    ("now must have samples with entries", lambda: ops.drift(X[:, :0], Y[:, :0], 0.1)),
    ("tensors must be at least one", lambda: ops.reindex([], ROWS)),
    (r"tensors must have rows where 2 are chosen, not \[0, 5, 16\]", lambda: ops.reindex([X[:0]], ROWS[:2])),
    (r"rows must be int64 \[n\]", lambda: ops.reindex([X], ROWS.int())),
    (r"logits must be \[rows, positions, vocabulary\]", lambda: ops.token_stats(LOGITS, CURRENT[:1], [0])),
    ("suppressed must leave a token of a vocabulary of 2", lambda: ops.token_stats(LOGITS[..., :2], CURRENT, [0, 1, 7])),
    ("suppressed must be token ids of at least 0", lambda: ops.token_stats(LOGITS, CURRENT, [-1])),
    ("divisor must be a number above 0, not 0.0", lambda: ops.token_stats(LOGITS, CURRENT, [0], divisor=0.0)),
    (r"noise.seeds must be int64 \[2\]", lambda: ops.token_stats(LOGITS, CURRENT, [0], noise=NOISE._replace(seeds=ROWS))),
    ("noise.scale must be a number above 0", lambda: ops.token_stats(LOGITS, CURRENT, [0], noise=NOISE._replace(scale=0.0))),
    ("score must be one of low_confidence, margin, entropy", lambda: ops.token_commit(LOGITS, CURRENT, [], Selection(0, 1, score="p"))),
    (r"active must be bool \[2, 3\]", lambda: ops.token_commit(LOGITS, CURRENT, [], Selection(0, 1, active=CURRENT))),
    ("minimum must be at least 0, not -1", lambda: ops.token_commit(LOGITS, CURRENT, [], Selection(0, 1, minimum=-1))),
    ("seeds, positions and steps must be given with noise", lambda: torch.ops.hasten.token_stats(LOGITS, CURRENT, [], noise=0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_what_is_refused(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_index_out_of_range_is_an_error_on_the_cpu() -> None:
    with pytest.raises(IndexError):
        ops.reindex([X], torch.tensor([2]))


def test_empty_batches_are_fine() -> None:
    none = X[:0]
    assert ops.delta_apply(none, none).shape == none.shape
    assert [t.shape for t in ops.quantise_rows(none, "int8")] == [(0, 5, 16), (0, 5, 1)]
    assert ops.int8_linear(none, WEIGHT).shape == (0, 5, 12)
    assert ops.drift(none, none, 0.1)[1].shape == (0,)
    assert ops.reindex([none, none], ROWS[:0])[0].shape == none.shape
