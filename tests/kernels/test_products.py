"""Products of int8 matrices: exact by every way they are made, and weights that are packed once."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.benchmarks.kernels import int8_on_cpu
from hasten.kernels import products
from hasten.kernels.products import int_product, padded_product, scaled_product

seeds = st.integers(0, 2**31)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed for products of every size."""
    monkeypatch.setattr(products, "_pays", lambda rows, out, columns: rows > 0)


def drawn(seed: int, rows: int, columns: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Full-range integers, and factors."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, columns), generator=g).to(torch.int8)
    weight = torch.randint(-128, 128, (out, columns), generator=g).to(torch.int8)
    return x, weight, torch.rand(out, generator=g) + 0.1


@given(seeds, st.integers(1, 40), st.integers(1, 70), st.integers(1, 40))
def test_products_are_exact_for_every_size(seed: int, rows: int, columns: int, out: int) -> None:
    x, weight, factor = drawn(seed, rows, columns, out)
    exact = x.long() @ weight.long().t()
    assert torch.equal(int_product(x, weight).long(), exact)
    assert torch.equal(padded_product(x, weight).long(), exact)
    with pytest.MonkeyPatch.context() as patch:
        for pays in (False, True):
            patch.setattr(products, "_pays", lambda *sizes, pays=pays: pays)
            for _ in range(3):  # at first sight, packed, and from what is kept
                assert torch.equal(scaled_product(x, weight, factor), exact.float() * factor)
                assert torch.equal(scaled_product(x, weight, factor, -factor), exact.float() * factor - factor)


def test_nothing_is_copied_that_needs_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large weight's copy takes as long as its product."""
    x, weight, _ = drawn(0, 64, 48, 24)
    taken: list[Tensor] = []
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *operands: taken.extend(operands) or product(*operands))
    padded_product(x, weight)
    assert [tensor.data_ptr() for tensor in taken] == [x.data_ptr(), weight.data_ptr()]


def test_small_products_are_not_packed() -> None:
    """oneDNN takes a hundred times as long where rows or columns are few."""
    for rows, columns, out, wanted in ((512, 1152, 1152, True), (512, 16, 4608, False), (1, 4608, 4608, False), (64, 64, 64, False)):
        x, weight, factor = drawn(0, rows, columns, out)
        for _ in range(2):
            scaled_product(x, weight, factor)
        assert (products._seen.get(weight, (0, None))[1] is not None) == (wanted and products.packs())


def test_a_single_row_of_any_stride_is_exact() -> None:
    """torch._int_mm itself leaves its output unwritten here."""
    x, w = torch.arange(32, dtype=torch.int8).view(1, 32), torch.ones(4, 32, dtype=torch.int8)
    assert int_product(x.as_strided((1, 32), (0, 1)), w).tolist() == [[496] * 4]
    assert int_product(x.view(32, 1), w[:, :1]).tolist() == [[n] * 4 for n in range(32)]
    assert int_product(x.view(2, 16).t(), w[:, :2])[:3].tolist() == [[16] * 4, [18] * 4, [20] * 4]


def test_processors_that_overflow_multiply_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, factor = drawn(0, 5, 40, 6)
    exact = x.long() @ weight.long().t()
    monkeypatch.setattr(products, "cpu_is_exact", lambda: False)
    monkeypatch.setattr(products, "packs", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(int_product(x, weight).long(), exact)
    assert torch.equal(scaled_product(x, weight, factor), exact.float() * factor)


def test_a_weight_that_changes_is_packed_anew(packed: None) -> None:
    x, weight, factor = drawn(1, 8, 32, 16)
    for _ in range(3):
        scaled_product(x, weight, factor)
    weight[3] = 7
    for _ in range(3):
        assert torch.equal(scaled_product(x, weight, factor), (x.long() @ weight.long().t()).float() * factor)


def test_what_is_kept_of_a_weight_goes_with_it(packed: None) -> None:
    x, weight, factor = drawn(2, 8, 32, 16)
    gc.collect()
    before = len(products._seen)
    for _ in range(2):
        scaled_product(x, weight, factor)
    assert len(products._seen) == before + 1
    del weight
    gc.collect()
    assert len(products._seen) == before


def test_inference_tensors_may_change_unseen_so_they_are_not_kept(packed: None) -> None:
    with torch.inference_mode():
        x, weight, factor = drawn(3, 8, 32, 16)
        for _ in range(2):
            scaled_product(x, weight, factor)
        weight[0] = -5
        assert torch.equal(scaled_product(x, weight, factor), (x.long() @ weight.long().t()).float() * factor)


@pytest.mark.parametrize("rows", [0, 4])
def test_compilers_see_one_op(rows: int, packed: None) -> None:
    x, weight, factor = drawn(4, 4, 32, 16)
    x = x[:rows]
    made = torch.compile(scaled_product, fullgraph=True, backend="eager")
    for _ in range(3):
        assert torch.equal(made(x, weight, factor), scaled_product(x, weight, factor))
    torch.library.opcheck(products._scaled_product_op, (x, weight, factor))


@pytest.mark.slow  # a matter of the processor's int8 units: not for every machine
def test_a_linear_layer_in_int8_is_five_times_as_fast_as_in_fp32() -> None:
    for row in int8_on_cpu():
        assert row["ratio"] >= 5, row
