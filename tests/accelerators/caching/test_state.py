"""Stored values in 8 bits: how far off they are, what they take, and that every kind of site can use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hasten
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.state import KINDS, Packed, Packer
from hasten.accelerators.caching.trace import trace_module
from tests.accelerators.caching.test_deep import inputs, unet
from tests.accelerators.caching.toys import chain, randn
from tests.families import PIPELINES, run

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_value_is_close_and_small(kind: str, dtype: torch.dtype) -> None:
    value = randn(0, 4, 16, 64).to(dtype) * torch.logspace(-3, 3, 16).view(1, 16, 1).to(dtype)
    packed = Packed.of(value, kind)
    assert packed.read().dtype == dtype and packed.shape == value.shape
    most = value.abs().amax(-1, keepdim=True)
    assert ((packed.read() - value).abs() <= (0.008 if kind == "int8" else 0.04) * most).all(), "each token has its own scale"
    assert packed.nbytes < 0.6 * value.nbytes
    assert torch.equal(packed.index_select(0, torch.tensor([2, 0])).read(), packed.read()[[2, 0]])


@every_kind
def test_zeros_stay_and_what_is_not_finite_shows(kind: str) -> None:
    assert torch.equal(Packed.of(torch.zeros(2, 3), kind).read(), torch.zeros(2, 3))
    for bad in (float("nan"), float("inf")):
        value = randn(0, 2, 3)
        value[1, 1] = bad
        scale = Packed.of(value, kind).scale
        assert scale[0].isfinite().all() and not scale[1].isfinite().all()


@every_kind
@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
@pytest.mark.parametrize(
    "method", [hasten.DeltaDiT(), hasten.Forecast(interval=2), hasten.FORA(interval=2), hasten.FirstBlock(threshold=1e9, warmup=2)], ids=str
)
def test_every_method_takes_it(name: str, kind: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)
    exact = run(full := hasten.accelerate(pipe, method), call)
    made = run(fast := hasten.accelerate(pipe, method, state=kind), call)
    assert not torch.equal(made, exact)
    assert (made - exact).norm() < 0.05 * plain.norm()
    assert fast.report.state_bytes_peak < 0.75 * full.report.state_bytes_peak
    assert not fast.report.reasons


@every_kind
def test_a_deep_branch_takes_it(kind: str) -> None:
    net = unet()
    made = []
    for state in (None, kind):
        with attach(net, hasten.DeepCache(interval=2), num_inference_steps=4, state=state) as session:
            outs = []
            for k in range(4):
                with session.step(k):
                    args, kwargs = inputs(k)
                    outs.append(net(*args, **kwargs).sample)
        made.append(torch.stack(outs))
    assert 0 < (made[1] - made[0]).norm() < 0.02 * made[0].norm()


def test_a_value_that_is_not_finite_is_computed_again() -> None:
    net, x = chain(3), randn(0, 2, 3, 4)
    method, trace = hasten.DeltaDiT(interval=4, cached=1.0), trace_module(net, (x,), {})
    with attach(net, method, num_inference_steps=4, state="int8", trace=trace) as session:
        for k in range(4):
            with session.step(k):
                out = net(x if k else torch.full_like(x, float("inf")))
            if k:
                assert out.isfinite().all()
    assert any("not finite" in reason for reason in session.report.reasons)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="state must be one of int8, fp8 or None, not 'int3'"):
        Packer("int3")
    pipe, _ = PIPELINES["pixart"]()
    with pytest.raises(ValueError, match="state must be one of"):
        hasten.accelerate(pipe, state="int3")
    with pytest.raises(ValueError, match="state must be one of"):
        attach(chain(2), hasten.DeltaDiT(), num_inference_steps=2, state="int3")
