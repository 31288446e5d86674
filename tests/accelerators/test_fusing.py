"""The runtime with fused ops in every place where it takes them on a GPU; here they answer by their references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import fusing
from hasten.accelerators.caching import deciders, offsets, state
from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.correction import AffineCorrection
from hasten.accelerators.caching.offsets import add_offsets
from hasten.accelerators.caching.state import Packed, Packer, moved
from hasten.accelerators.decoding import statistics
from hasten.accelerators.decoding.noise import Key
from hasten.accelerators.decoding.statistics import Sampling, measure
from hasten.accelerators.quantization import int8
from hasten.accelerators.quantization.int8 import QuantLinear
from hasten.accelerators.quantization.ranges import Step
from hasten.kernels import backend, ops
from tests.families import PIPELINES, run

PLACES = (state, offsets, deciders, statistics, int8)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Has the ops called on CPU tensors, too, and counts their calls."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        op = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    for name in ("forecast_apply", "delta_store", "quantise_rows", "reindex", "drift", "token_stats", "int8_linear"):
        monkeypatch.setattr(ops, name, counted(name))
    for place in PLACES:
        monkeypatch.setattr(place, "fuses", lambda *tensors: True)
    return calls


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fusing.fuses(torch.zeros(2))
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    on_gpu: Any = SimpleNamespace(requires_grad=False, device=first)
    other: Any = SimpleNamespace(requires_grad=False, device=second)
    learning: Any = SimpleNamespace(requires_grad=True, device=first)
    assert fusing.fuses(on_gpu) and fusing.fuses(on_gpu, learning)
    with torch.enable_grad():
        assert not fusing.fuses(on_gpu, learning)
    assert not fusing.fuses(on_gpu, other) and not fusing.fuses(on_gpu, torch.zeros(2))
    with monkeypatch.context() as patched:
        patched.setattr(backend.of_device(0), "broken", "no compiler")
        assert not fusing.fuses(on_gpu) and fusing.fuses(other), "what does not work is not asked again"
    monkeypatch.setenv("HASTEN_KERNELS", "reference")
    assert not fusing.fuses(on_gpu)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
@pytest.mark.parametrize(
    ("method", "op"),
    [
        (hasten.DeltaDiT(), None),
        (hasten.Forecast(interval=2, order=2), "forecast_apply"),
        (hasten.FirstBlock(threshold=1e9, warmup=2), "drift"),
        (hasten.FORA(interval=2), None),
    ],
    ids=str,
)
def test_a_run_is_what_it_is_without(
    name: str, method: Any, op: str | None, kind: str | None, fused: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = PIPELINES[name]()
    made = run(hasten.accelerate(pipe, method, state=kind), call)
    whole_parts = isinstance(method, hasten.FORA)  # stored as they are, not as differences
    assert op is None or fused[op]
    assert bool(fused["delta_store"]) == (kind is not None and not whole_parts)
    assert bool(fused["quantise_rows"]) == (kind is not None and whole_parts)
    for place in PLACES:
        monkeypatch.setattr(place, "fuses", lambda *tensors: False)
    plain = run(hasten.accelerate(pipe, method, state=kind), call)
    torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("fix", ["", "whole", "grouped", "one group"])
@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_are_added_alike(
    dtype: torch.dtype, kind: str | None, count: int, fix: str, in_place: bool, fused: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = randn(0, 4, 5, 8).to(dtype)
    terms = [(Packer(kind)(randn(k + 1, 4, 5, 8).to(dtype)), weight) for k, weight in enumerate((1.5, -0.75, 0.25)[:count])]
    correction = None
    if fix:
        groups = 1 if fix == "whole" else 2
        correction = Affine(np.linspace(0.5, 1.5, 8 * groups), np.linspace(-1, 1, 8 * groups))
        correction.group = 1 if fix == "one group" else None
    fused.clear()
    given = x.clone()
    made = add_offsets(given, terms, correction, in_place=in_place)
    assert (made is given) == in_place and (in_place or torch.equal(given, x))
    # One whole offset is a single pass of PyTorch's, too.
    assert fused["forecast_apply"] == (0 if kind is None and count == 1 and not fix else 1)
    monkeypatch.setattr(offsets, "fuses", lambda *tensors: False)
    plain = add_offsets(x.clone(), terms, correction, in_place=in_place)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(made, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_difference_is_packed_as_it_would_be_apart(kind: str, fused: Counter[str]) -> None:
    after, before = randn(0, 2, 5, 8), randn(1, 2, 5, 8)
    made, apart = Packer(kind).difference(after, before), Packed.of(after - before, kind)
    assert made is not None and fused["delta_store"] == 1
    assert torch.equal(made.read(), apart.read()) and torch.equal(made.scale, apart.scale)
    assert Packer(kind)(made) is made
    assert Packer().difference(after, before) is None and Packer(kind).difference(after, before.double()) is None


def test_rows_of_a_nest_move_in_one_launch(fused: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nest = {"a": (randn(0, 4, 3), Packed.of(randn(1, 4, 2, 8), "fp8")), 2: [randn(2, 4), None, {"b": randn(3, 2, 4)}]}
    rows = torch.tensor([3, 0, 0])
    made: Any = moved(nest, rows, 4)
    assert fused["reindex"] == 1
    monkeypatch.setattr(state, "fuses", lambda *tensors: False)
    plain: Any = moved(nest, rows, 4)
    for one in (made, plain):
        assert torch.equal(one["a"][0], nest["a"][0][rows])  # type: ignore[index]
        assert torch.equal(one["a"][1].read(), nest["a"][1].read()[rows])  # type: ignore[index, union-attr]
        assert torch.equal(one[2][0], nest[2][0][rows]) and one[2][1] is None  # type: ignore[index]
        assert one[2][2]["b"] is nest[2][2]["b"], "it has another number of rows"  # type: ignore[index]
    assert moved({}, rows) == {}


@pytest.mark.parametrize("sampling", [Sampling(7), Sampling(7, (3, 900)), Sampling(7, (), 0.8), Sampling(7, (2,), 0.8, tempered=True)])
def test_statistics_are_measured_alike(sampling: Sampling, fused: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, shadow = 3 * randn(0, 2, 5, 40), 3 * randn(1, 2, 5, 40)
    current = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    key = Key(torch.tensor([5, -6]), torch.arange(5), torch.tensor([0, 3]))
    asked: dict[str, Any] = {"key": key, "lots": True, "shadow": shadow}
    made = measure(logits, current, sampling, **asked)
    assert fused["token_stats"] == 2
    measure(logits, current, sampling, key=key, top=3)
    assert fused["token_stats"] == 2, "the kernel keeps no list"
    monkeypatch.setattr(statistics, "fuses", lambda *tensors: False)
    plain = measure(logits, current, sampling, **asked)
    for name, value in vars(plain).items():
        found = getattr(made, name)
        assert (found is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="suppressed"):
        measure(logits[..., :1], current, Sampling(0))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_answer_alike(bits: Any, corrected: bool, smooth: bool, fused: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    step, ranges = Step(2), torch.tensor([[-2.0, 3.0], [-1.0, 4.0]])
    layer = QuantLinear(nn.Linear(12, 6), step, ranges, bits, smooth=torch.linspace(0.5, 2, 12) if smooth else None)
    if corrected:
        layer.correct(AffineCorrection(torch.linspace(0.9, 1.1, 12).view(2, 6), torch.linspace(-1, 1, 12).view(2, 6)))
    x = randn(0, 3, 4, 12)
    for k in range(2):
        step.set(k)
        made = layer(x)
        assert fused["int8_linear"] == k + 1
        with monkeypatch.context() as unfused:
            unfused.setattr(int8, "fuses", lambda *tensors: False)
            torch.testing.assert_close(made, layer(x), rtol=1e-5, atol=1e-5)
