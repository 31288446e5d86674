"""Quantised layers against float references that dequantise, and quantised copies of whole denoisers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.accelerators.quantization.int8 import (
    SHRINK,
    QuantConv2d,
    Quantised,
    QuantLinear,
    first_and_last,
    output_errors,
    quantise_weight,
    quantised,
    weight_bytes,
)
from hasten.accelerators.quantization.ranges import ActivationRanges, ChannelPeaks, Step, layers, rounding_noise, scale_and_zero


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_grid(x: Tensor, low: float, high: float) -> Tensor:
    """The reference: what int8 makes of x, in float64."""
    scale, zero = scale_and_zero(torch.tensor(low), torch.tensor(high))
    return ((torch.round(x / scale + zero).clamp(-128, 127) - zero) * scale).double()


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


# ---------------------------------------------------------------------------------------------------------- weights


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 4]))
def test_weights_are_rounded_to_the_nearest_point_of_the_best_grid(seed: int, out: int, columns: int, bits: Any) -> None:
    weight = randn(seed, out, columns)
    packed = quantise_weight(weight, bits)
    assert packed.bits == bits and packed.integers().shape == weight.shape
    error = (packed.dequantised() - weight).abs()
    assert (error <= 0.22 * (weight.amax(1) - weight.amin(1) + weight.abs().amax(1))[:, None] + 1e-6).all()
    high = weight.abs().amax(1)
    if bits == 8:  # no candidate is better, the whole range among them
        for shrink in SHRINK:
            scale = (high * shrink / 127)[:, None]
            other = ((weight / scale).round().clamp(-127, 127) * scale - weight).abs()
            exact = (error - 2**-22 * weight.abs()).clamp(min=0)  # both sides are rounded to float32
            assert (exact.pow(2.4).sum(1) <= other.pow(2.4).sum(1) * (1 + 1e-4) + 1e-12).all()


def test_an_outlier_is_clipped_where_that_pays() -> None:
    weight = randn(0, 1, 4096) * 0.1
    weight[0, 0] = 1.0
    assert float(quantise_weight(weight, 4).dequantised().max()) < 0.9
    full = (weight.max() - weight.min()) / 15
    naive = ((weight - weight.min()) / full).round() * full + weight.min()
    assert (quantise_weight(weight, 4).dequantised() - weight).norm() < (naive - weight).norm()


def test_int4_is_two_to_a_byte_and_odd_columns_survive() -> None:
    for columns in (1, 2, 7, 64):
        packed = quantise_weight(randn(columns, 5, columns), 4)
        assert packed.packed.dtype == torch.uint8 and packed.packed.shape == (5, (columns + 1) // 2)
        assert packed.integers().abs().max() <= 15
        assert packed.nbytes == 5 * ((columns + 1) // 2 + 4 + 1)
    assert quantise_weight(torch.zeros(2, 3), 4).dequantised().tolist() == [[0] * 3] * 2
    assert quantise_weight(torch.zeros(2, 3), 8).dequantised().tolist() == [[0] * 3] * 2


def test_eight_bits_take_at_most_0_27_of_float32() -> None:
    weight = randn(0, 192, 192)
    assert quantise_weight(weight).nbytes <= 0.27 * weight.nbytes
    assert quantise_weight(weight, 4).nbytes <= 0.14 * weight.nbytes


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 4, not 3"):
        quantise_weight(torch.ones(2, 2), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be a floating matrix"):
        quantise_weight(torch.ones(2))
    with pytest.raises(ValueError, match="weight must be finite"):
        quantise_weight(torch.tensor([[float("nan")]]))


# ---------------------------------------------------------------------------------------------------------- layers


def two_steps(low: float = -1.0, high: float = 3.0) -> Tensor:
    return torch.tensor([[low, high], [low / 4, high / 4]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "out", "bias"), [(16, 8, True), (7, 5, False), (1, 3, True), (192, 33, True)])
def test_linear_equals_the_float_reference(columns: int, out: int, bias: bool, bits: Any) -> None:
    linear, step = nn.Linear(columns, out, bias=bias), Step(2)
    layer = QuantLinear(linear, step, two_steps(), bits)
    x = randn(1, 3, 5, columns)
    for k, (low, high) in enumerate(two_steps().tolist()):
        step.set(k)
        b = None if linear.bias is None else linear.bias.double()
        expected = F.linear(on_grid(x, low, high), layer.weight.double(), b)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x[0, 0]).shape == (out,) and layer(x[:, :0]).shape == (3, 0, out)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": (3, 2), "padding": (0, 2), "stride": (1, 2), "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    ],
)
def test_convolution_equals_the_float_reference(settings: dict[str, Any], bits: Any) -> None:
    conv, step = nn.Conv2d(5, 7, **settings), Step(2)
    layer = QuantConv2d(conv, step, two_steps(), bits)
    reference = copy.deepcopy(conv).double()
    reference.weight.data = layer.weight.double()
    assert relative(layer.weight, conv.weight) < (0.01 if bits == 8 else 0.15)
    x = randn(2, 2, 5, 9, 8)
    for k, (low, high) in enumerate(two_steps().tolist()):
        step.set(k)
        expected = reference(on_grid(x, low, high))
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(layer(image).double(), expected, rtol=1e-5, atol=1e-5)
    assert layer(x).is_contiguous()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_the_float_path_means_the_same() -> None:
    """What other devices than CPU and CUDA get, and CPUs whose int8 products overflow."""
    step = Step(2)
    for layer, x in (
        (QuantLinear(nn.Linear(12, 6), step, two_steps()), randn(0, 4, 12)),
        (QuantConv2d(nn.Conv2d(3, 6, 3, padding=1), step, two_steps()), randn(0, 2, 3, 5, 5)),
    ):
        exact = layer(x)
        layer._cpu_is_exact = False
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)


def test_weights_alone_leave_activations_as_they_are() -> None:
    linear = nn.Linear(12, 6)
    layer = QuantLinear(linear, Step(1), None)
    x = 100 * randn(0, 4, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, linear.bias))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_smoothing_moves_outlying_channels_into_the_weights(kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(32, 24) if kind == "linear" else nn.Conv2d(32, 24, 3, padding=1)
    spread = torch.logspace(-1, 1.5, 32)
    x = torch.randn(64, 32) * spread if kind == "linear" else torch.randn(2, 32, 6, 6) * spread[:, None, None]
    net, errors, wanted = nn.Sequential(layer), [], layer(x)
    peaks = ChannelPeaks()
    with peaks.watch(net):
        net(x)
    for strength in (0.0, 0.5, None):
        smooth = peaks.smoothing(net, strength) if strength != 0 else {}
        ranges = ActivationRanges(1, smooth=smooth)
        with ranges.watch(net):
            net(x)
        made = quantised(net, ranges, smooth=smooth)
        errors.append(float((made.module(x) - wanted).norm() / wanted.norm()))
        held = made.module[0]  # type: ignore[index]
        torch.testing.assert_close(held.weight, layer.weight, rtol=0.2, atol=0.04)  # type: ignore[arg-type]
        exact = made.module(x)
        held._cpu_is_exact = False
        torch.testing.assert_close(made.module(x), exact, rtol=1e-4, atol=1e-4)
    assert errors[1] < 0.6 * errors[0] and errors[2] < 1.02 * errors[1], "what is searched is no worse than the fixed share"
    with pytest.raises(ValueError, match=r"smooth must be \[32\]"):
        quantised(net, ranges, smooth={"0": torch.zeros(32)})


def test_rounding_noise_is_what_rounding_does() -> None:
    torch.manual_seed(0)
    spread = torch.logspace(-1, 1, 32)
    x, layer = (2 * torch.rand(4096, 32) - 1) * spread, nn.Linear(32, 24, bias=False)
    net, peaks = nn.Sequential(layer), ChannelPeaks()
    with peaks.watch(net):
        net(x)
    for factor in (torch.ones(32), spread.sqrt(), spread):
        ranges = ActivationRanges(1, smooth={"0": factor}, percentiles=(1.0,))
        with ranges.watch(net):
            net(x)
        made = quantised(net, ranges, smooth={"0": factor})
        noise = float((made.module(x) - layer(x)).square().sum(1).mean())
        expected = rounding_noise(layer.weight.detach()[..., None], x.abs().amax(0), x.square().mean(0), factor)
        assert 0.6 < noise / expected < 1.6


def test_the_step_chooses_the_scale_without_touching_the_layer() -> None:
    step = Step(2)
    layer = QuantLinear(nn.Linear(8, 4, bias=False), step, torch.tensor([[-8.0, 8.0], [-0.1, 0.1]]))
    x = torch.ones(1, 8)
    index = step.on(x.device)
    first = layer(x)
    step.set(1)  # the range of step 1 ends at 0.1
    assert index is step.on(x.device) and index.tolist() == [1]
    torch.testing.assert_close(layer(x), first / 10, rtol=0.1, atol=1e-3)
    with torch.inference_mode():
        other = Step(3)
        other.on(x.device)
    other.set(2)
    with pytest.raises(ValueError, match="index must be from 0 to 1, not 2"):
        step.set(2)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, not 0"):
        Step(0)


def test_low_precision_keeps_its_dtype_and_the_tables_theirs() -> None:
    linear, step = nn.Linear(16, 8), Step(2)
    layer = QuantLinear(linear, step, two_steps())
    exact = layer(randn(0, 4, 16).bfloat16().float())
    layer = layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and layer.activation is not None and layer.activation.dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype == layer.weight.dtype == torch.bfloat16 and layer.packed.dtype == torch.int8
    assert linear.weight.dtype == torch.float32 and linear.bias.dtype == torch.float32
    y = layer(randn(0, 4, 16).bfloat16())
    assert y.dtype == torch.bfloat16 and relative(y, exact) < 0.01


def test_a_correction_is_applied_per_step_after_the_bias() -> None:
    from hasten.accelerators.caching.affine import Affine
    from hasten.accelerators.caching.correction import AffineCorrection

    step = Step(2)
    for layer, x, dim in (
        (QuantLinear(nn.Linear(12, 6), step, two_steps()), randn(0, 4, 12), -1),
        (QuantConv2d(nn.Conv2d(3, 6, 3, padding=1), step, two_steps()), randn(0, 2, 3, 5, 5), 1),
        (QuantLinear(nn.Linear(12, 6), step, None), randn(0, 4, 12), -1),
    ):
        fit = AffineCorrection(1 + 0.1 * randn(1, 2, 6), randn(2, 2, 6))
        for k in range(2):
            step.set(k)
            layer.correct(None)
            plain = layer(x)
            layer.correct(fit)
            expected = Affine(fit.scale[k].numpy(), fit.shift[k].numpy()).apply(plain, dim)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="correction must have 2 steps and 6 channels, not 1 and 6"):
        layer.correct(AffineCorrection.identity(1, 6))


def test_layers_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"conv\.groups must be 1, not 2"):
        QuantConv2d(nn.Conv2d(4, 4, 3, groups=2), Step(1), None)
    with pytest.raises(ValueError, match=r"ranges must be \[3, 2\]"):
        QuantLinear(nn.Linear(4, 4), Step(3), two_steps())
    with pytest.raises(ValueError, match="ranges must be finite and hold 0"):
        QuantLinear(nn.Linear(4, 4), Step(1), torch.tensor([[1.0, 2.0]]))


# ---------------------------------------------------------------------------------------------------------- ranges


def test_ranges_follow_the_step_are_clipped_and_smoothed() -> None:
    ranges = ActivationRanges(3)
    x = randn(0, 100_000)
    for k, size in enumerate((1.0, 10.0)):
        ranges.step.set(k)
        ranges.add("layer", x * size)
    table = ranges.tables()["layer"]
    assert table.shape == (3, 2)
    first = float(table[0, 1])
    assert 3.0 < first <= float(x.max())
    assert float(table[1, 1]) == pytest.approx(0.1 * first + 0.9 * 10 * first, rel=1e-4)
    assert torch.equal(table[2], table[1])  # it never ran there
    late = ActivationRanges(3, smoothing=0)
    late.step.set(2)
    late.add("layer", x)
    assert torch.equal(late.tables()["layer"][0], late.tables()["layer"][2])


def test_the_percentile_is_the_one_that_reconstructs_best() -> None:
    """A lone outlier is cut off; a tail that holds much of the energy is not."""
    lone = torch.cat([randn(0, 60_000), torch.tensor([30.0])])
    heavy = torch.cat([randn(0, 60_000), torch.full((300,), 30.0)])
    for x, least, most in ((lone, 3, 20), (heavy, 29, 31)):
        ranges = ActivationRanges(1)
        ranges.add("layer", x)
        assert least < float(ranges.tables()["layer"][0, 1]) < most


def test_ranges_hold_little_and_nothing_that_ran() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    ranges = ActivationRanges(4)
    with ranges.watch(model):
        for k in range(8):
            ranges.step.set(k % 4)
            model(randn(k, 50, 64))
    assert list(ranges.tables()) == ["0", "2"] and all(s.shape == (4, 3, 4) for s in ranges._sums.values())
    assert all(not layer._forward_pre_hooks for layer in model)
    assert float(ranges.tables()["2"][:, 0].min()) > -0.2  # GELU's floor


def test_bad_ranges_are_named() -> None:
    with pytest.raises(ValueError, match=r"percentiles must be from above 0\.5 to 1"):
        ActivationRanges(1, percentiles=())
    with pytest.raises(ValueError, match="smoothing must be from 0 to below 1, not 1"):
        ActivationRanges(1, smoothing=1)
    with pytest.raises(ValueError, match="sample must be"):
        ActivationRanges(1, sample=1)
    with pytest.raises(ValueError, match="nothing was measured"):
        ActivationRanges(1).tables()
    ranges = ActivationRanges(1)
    ranges.add("layer", torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="input of layer was not finite"):
        ranges.tables()


# ---------------------------------------------------------------------------------------------------------- denoisers


def tiny_unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    call = {"sample": randn(0, 2, 4, 8, 8), "timestep": torch.tensor(500), "encoder_hidden_states": randn(1, 2, 5, 24)}
    return unet.eval(), {**call, "return_dict": False}


def tiny_pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32,
        caption_channels=24, sample_size=8, patch_size=1, use_additional_conditions=False,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": randn(0, 2, 4, 8, 8),
        "encoder_hidden_states": randn(1, 2, 5, 24),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def measured(model: nn.Module, call: dict[str, Any], steps: int = 2) -> ActivationRanges:
    ranges = ActivationRanges(steps)
    with ranges.watch(model):
        for k in range(steps):
            ranges.step.set(k)
            model(**call)
    return ranges


@pytest.mark.parametrize("build", [tiny_unet, tiny_pixart])
def test_a_quantised_copy_agrees_and_the_original_is_untouched(build: Any) -> None:
    model, call = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = {name: type(child) for name, child in model.named_modules()}
    bare = model(**call)[0]
    ranges = measured(model, call)
    made = quantised(model, ranges)
    assert set(made.bits) == set(layers(model)) and not made.kept and set(made.bits.values()) == {8}
    assert relative(made.module(**call)[0], bare) < 0.05
    four = quantised(model, ranges, weights="int4", activations="none")
    assert relative(made.module(**call)[0], bare) < relative(four.module(**call)[0], bare) < 0.5
    made.module.to(torch.bfloat16)
    assert next(made.module.parameters()).dtype == torch.bfloat16  # and yet:
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert {name: type(child) for name, child in model.named_modules()} == types
    assert torch.equal(model(**call)[0], bare)


def test_what_is_not_quantised_is_shared() -> None:
    model, call = tiny_pixart()
    made = quantised(model, measured(model, call))
    mine, theirs = dict(model.named_parameters()), dict(made.module.named_parameters())
    assert theirs.keys() < mine.keys()
    assert all(theirs[name].data_ptr() == mine[name].data_ptr() and theirs[name] is not mine[name] for name in theirs)


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    made = quantised(model, None, activations="none")
    assert isinstance(made.module, nn.Sequential)
    assert made.module[0] is made.module[2] and isinstance(made.module[0], QuantLinear) and model[0] is shared


@pytest.mark.parametrize(("build", "ends"), [(tiny_unet, ("conv_in", "conv_out")), (tiny_pixart, ("pos_embed.proj", "proj_out"))])
def test_first_and_last_layers_keep_8_bits(build: Any, ends: tuple[str, str]) -> None:
    model, call = build()
    ranges = measured(model, call)
    assert first_and_last(model, list(ranges.tables())) == ends
    made = quantised(model, ranges, weights="int4")
    assert {name for name, bits in made.bits.items() if bits == 8} == set(ends)
    made = quantised(model, ranges, weights="int4", keep_8bit=(ends[1],), keep_float=(ends[0],))
    assert made.kept == {ends[0]: "named in keep_float"} and made.bits[ends[1]] == 8


def test_what_stays_floating_has_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.idle, self.small, self.used = nn.Conv2d(4, 8, 1, groups=2), nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 1)  # its out_proj is a subclass whose call is passed by

        def forward(self, x: Tensor) -> Tensor:
            y = self.grouped(x).mean((2, 3))
            return self.used(y).sum() + self.small(y).sum() + self.attention(y, y, y)[0].sum()

    model = Odd()
    ranges = measured(model, {"x": randn(0, 3, 4, 2, 2)})
    made = quantised(model, ranges, smallest=9)
    assert set(made.bits) == {"used"} and set(made.kept) == {"grouped", "idle", "small"}
    assert "grouped convolution" in made.kept["grouped"] and "never ran" in made.kept["idle"] and "smallest=9" in made.kept["small"]
    made.module(randn(0, 3, 4, 2, 2))
    with pytest.raises(ValueError, match="no layer to quantise"):
        quantised(model, ranges, smallest=1000)


def test_arguments_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ranges = measured(model, {"input": torch.ones(1, 4)})
    for arguments, message in (
        ({"weights": "int2"}, "weights must be one of"),
        ({"activations": "int4"}, "activations must be one of"),
        ({"steps": 3}, r"steps must be the same for ranges, steps and step, not \[2, 3\]"),
        ({"step": Step(5)}, r"not \[2, 5\]"),
        ({"keep_8bit": ("1",)}, "keep_8bit must name"),
        ({"keep_float": ("x",)}, "keep_float must name"),
    ):
        with pytest.raises(ValueError, match=message):
            quantised(model, ranges, **arguments)
    with pytest.raises(ValueError, match="ranges must be given"):
        quantised(model, None)
    with pytest.raises(ValueError, match="meta device"):
        quantised(nn.Linear(4, 4, device="meta"), None, activations="none")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_state_dict_goes_round(weights: Any) -> None:
    model, call = tiny_pixart()
    ranges = measured(model, call)
    made = quantised(model, ranges, weights=weights)
    with output_errors(model, made, ["proj_out"]) as statistics:
        model(**call)
    made.module.get_submodule("proj_out").correct(statistics["proj_out"].fit())  # type: ignore[operator]
    wide = {name: 2 * table for name, table in ranges.tables().items()}
    other_model, _ = tiny_pixart()
    for p in other_model.parameters():
        p.mul_(0.5)
    other = quantised(other_model, wide, weights=weights)
    assert not torch.equal(other.module(**call)[0], made.module(**call)[0])
    other.module.load_state_dict(made.module.state_dict())
    assert torch.equal(other.module(**call)[0], made.module(**call)[0])
    plain = quantised(model, ranges, weights=weights)  # a file without a correction takes it off
    other.module.load_state_dict(plain.module.state_dict())
    assert torch.equal(other.module(**call)[0], plain.module(**call)[0])


def test_output_errors_take_the_systematic_part_off() -> None:
    model, call = tiny_pixart()
    made = quantised(model, measured(model, call), weights="int4")
    name = "transformer_blocks.1.ff.net.2"
    with output_errors(model, made, [name]) as statistics:
        for k in range(2):
            made.step.set(k)
            model(**call)
    before, after = (statistics[name].errors(fit).mean() for fit in (None, statistics[name].fit()))
    assert after < before
    with pytest.raises(ValueError, match="names must be quantised layers"), output_errors(model, made, ["nothing"]):
        pass


def test_compiled_layers_follow_the_step_without_compiling_again() -> None:
    step = Step(12)
    ranges = torch.tensor([-1.0, 1.0]) * torch.arange(1, 13)[:, None]
    layer = nn.Sequential(QuantLinear(nn.Linear(16, 16), step, ranges), nn.GELU(), QuantLinear(nn.Linear(16, 4), step, ranges, 4))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for k in range(12):
        step.set(k)
        torch.testing.assert_close(compiled(randn(k, 5, 16)), layer(randn(k, 5, 16)))
    assert len(graphs) == 1


def test_no_gradient_is_asked_for() -> None:
    with torch.enable_grad():
        layer = QuantLinear(nn.Linear(8, 4), Step(1), torch.tensor([[-1.0, 1.0]]))
        assert not layer(torch.ones(2, 8)).requires_grad


# ---------------------------------------------------------------------------------------------------------- the model that ships


@pytest.fixture(scope="module")
def shapes() -> tuple[nn.Module, dict[str, Any], ActivationRanges]:
    from hasten.pipelines.zoo.loading import load

    pipe: Any = load("shapes")
    model, steps = pipe.transformer, 4
    ranges = ActivationRanges(steps)
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []

    def at(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ranges.step.set(len(calls) % steps)
        calls.append({"hidden_states": args[0], **kwargs})

    handle = model.register_forward_pre_hook(at, with_kwargs=True)
    settings: Any = {"num_inference_steps": steps, "height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    settings |= {"output_type": "latent", "guidance_scale": 3.0, "max_sequence_length": 20}
    with torch.no_grad(), ranges.watch(model):
        captions = ["a small red circle", "a large blue square above a small yellow triangle"]
        pipe(captions, generator=torch.Generator().manual_seed(0), **settings)
    with torch.no_grad():
        pipe("a green cross left of a purple circle", generator=torch.Generator().manual_seed(1), **settings)
    handle.remove()
    return model, {"calls": calls[steps:]}, ranges


def errors(model: nn.Module, made: Quantised, calls: list[dict[str, Any]]) -> list[float]:
    found = []
    for k, call in enumerate(calls):
        made.step.set(k)
        found.append(relative(made.module(**call)[0], model(**call)[0]))
    return found


def test_the_shipped_denoiser_at_8_bits(shapes: Any) -> None:
    model, unseen, ranges = shapes
    made = quantised(model, ranges)
    held, whole = weight_bytes(made.module), weight_bytes(model)
    assert not made.kept and held.total <= 0.27 * whole.total
    assert held.weights + held.scales + held.steps <= 0.27 * whole.weights and whole.scales == whole.steps == whole.corrections == 0
    found = errors(model, made, unseen["calls"])
    assert max(found) < 0.06 and sum(found) / len(found) < 0.04
    assert max(errors(model, quantised(model, None, steps=4, activations="none"), unseen["calls"])) < 0.02


def test_the_shipped_denoiser_at_4_bits(shapes: Any) -> None:
    model, unseen, ranges = shapes
    made = quantised(model, ranges, weights="int4")
    assert weight_bytes(made.module).total <= 0.15 * weight_bytes(model).total
    assert errors(model, made, unseen["calls"])[0] < 0.05
