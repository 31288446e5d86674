"""int8 and packed int4 layers with one activation scale per sampler step: the quantisation half of CacheQuant (arXiv 2503.01323).

Weights are uniform per output channel with a searched range; activations per tensor and step, calibrated beforehand, so that nothing
is measured while the sampler runs. Products are int8 x int8 -> int32 and exact; dequantisation, the optional correction of the
output and the bias are one scale and one shift per output channel. For inference only: rounding has no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accelerators.caching.correction import AffineCorrection, AffineStatistics
from hasten.accelerators.fusing import fuses
from hasten.accelerators.quantization.ranges import NORM, ActivationRanges, Step, layers, scale_and_zero
from hasten.kernels import ops
from hasten.kernels.arguments import Fix, Grid, Weight
from hasten.kernels.products import cpu_is_exact, scaled_product

Bits = Literal[8, 4]
SHRINK = tuple(1 - 0.01 * i for i in range(0, 80, 2))
"""Candidate shares of a channel's full range (CacheQuant)."""
_CHUNK = 1 << 22
"""Weights searched at a time: bounds the scratch memory."""


# ---------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantised matrix: `weight[o, i] ≈ scale[o] * (q[o, i] - zero[o])`.

    Attributes:
        packed: int8 [out, in] for 8 bits; uint8 [out, ceil(in / 2)] for 4, the even column in the low half of the byte.
        scale: float32 [out].
        zero: int8 [out], from 0 to 15, for 4 bits. None for 8, which are symmetric: so close a grid gains nothing by a zero point,
            which would cost a sum over every row of the activations.
        columns: in.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    columns: int

    def __post_init__(self) -> None:
        wide = self.columns if self.zero is None else -(-self.columns // 2)
        kind = torch.int8 if self.zero is None else torch.uint8
        if self.packed.ndim != 2 or self.packed.shape[1] != wide or self.packed.dtype != kind:
            raise ValueError(f"packed must be {kind} [out, {wide}], not {self.packed.dtype} {list(self.packed.shape)}")
        for name, table in (("scale", self.scale), ("zero", self.zero)):
            if table is not None and table.shape != self.packed.shape[:1]:
                raise ValueError(f"{name} must be [{self.packed.shape[0]}], one per output channel, not {list(table.shape)}")

    @property
    def bits(self) -> Bits:
        return 8 if self.zero is None else 4

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and zeros."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero) if t is not None)

    def integers(self) -> Tensor:
        """int8 [out, in]: q - zero. At 4 bits that lies from -15 to 15, so the zero point costs the product nothing."""
        return _integers(self.packed, self.zero, self.columns)

    def dequantised(self) -> Tensor:
        """float32 [out, in]."""
        return self.integers().float() * self.scale[:, None]


def _integers(packed: Tensor, zero: Tensor | None, columns: int) -> Tensor:
    if zero is None:
        return packed
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]
    return pairs.view(torch.int8) - zero[:, None]


@torch.no_grad()
def quantise_weight(weight: Tensor, bits: Bits = 8) -> PackedWeight:
    """Rounds a matrix to `bits` per entry; the range of each output channel is the candidate with the smallest L2.4 error.

    Args:
        weight: [out, in], floating.
        bits: 8, symmetric, or 4, asymmetric.

    Raises:
        ValueError: `bits` is neither, or `weight` is no finite floating matrix.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, not {bits!r}")
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"weight must be a floating matrix [out, in] with entries, not {weight.dtype} {list(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite; some entries are not")
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_search(part.float(), bits) for part in weight.detach().split(rows)]
    q, scale, zero = (torch.cat([part[n] for part in parts]) for n in range(3))
    if bits == 8:
        return PackedWeight(q.to(torch.int8), scale, None, weight.shape[1])
    q = F.pad(q.to(torch.uint8), (0, weight.shape[1] % 2))
    return PackedWeight(q[:, 0::2] | (q[:, 1::2] << 4), scale, zero.to(torch.int8), weight.shape[1])


def _search(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """(q [out, in], scale [out], zero [out]) as float32: the grid whose range, shrunk, leaves the smallest error."""
    if bits == 8:
        least, most = -127, 127
        low, high = weight.new_zeros(len(weight)), weight.abs().amax(1)
    else:
        least, most = 0, 15
        low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    tiny = torch.finfo(torch.float32).tiny  # a channel of zeros: any scale is exact
    best = torch.full_like(low, float("inf"))
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINK:
        s = ((high - low) * (shrink / most)).clamp_min(tiny)
        z = torch.round(-low * shrink / s) if bits == 4 else torch.zeros_like(s)
        q = torch.round(weight / s[:, None] + z[:, None]).clamp_(least, most)
        error = ((q - z[:, None]).mul_(s[:, None]).sub_(weight)).abs_().pow_(NORM).sum(1)
        better = error < best
        best, scale, zero = torch.where(better, error, best), torch.where(better, s, scale), torch.where(better, z, zero)
    return torch.round(weight / scale[:, None] + zero[:, None]).clamp_(least, most), scale, zero


# ---------------------------------------------------------------------------------------------------------- layers


class _QuantLayer(nn.Module):
    """What both layers share: the packed weight, the tables per step, and the product.

    Buffers: packed, scale, zero (see `PackedWeight`); sums int32 [out], each row's sum of integers, by which the activations' zero
    point is taken off; activation float32 [steps, 2], scale and zero, or None for weights alone; smooth float32 [in channels], by which
    inputs are divided and weights were multiplied before they were packed, or None; correction float32 [steps, 2, out],
    scale and shift of the output, or None. The tables stay float32 whatever dtype the module is moved to: bfloat16 has too few digits
    for a scale. Inputs that are not finite are not passed on as such: int8 has no NaN.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor
    activation: Tensor | None
    smooth: Tensor | None
    correction: Tensor | None
    bias: Tensor | None
    _like: Tensor

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, like: Tensor, step: Step, ranges: Tensor | None, smooth: Tensor | None
    ) -> None:
        super().__init__()
        self.step, self.columns = step, weight.columns
        self._cpu_is_exact = cpu_is_exact()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("sums", weight.integers().sum(1, dtype=torch.int32))
        self.register_parameter("bias", None if bias is None else _alias(bias))
        self.register_buffer("_like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)  # carries the float dtype
        if ranges is not None:
            if ranges.shape != (step.steps, 2):
                raise ValueError(f"ranges must be [{step.steps}, 2], low and high ends of every step, not {list(ranges.shape)}")
            low, high = ranges.detach().float().to(like.device).unbind(1)
            if not ((low <= 0) & (high >= 0) & low.isfinite() & high.isfinite()).all():
                raise ValueError("ranges must be finite and hold 0: low ends of at most 0, high ends of at least 0")
            ranges = torch.stack(scale_and_zero(low, high), 1)
        self.register_buffer("activation", ranges)
        self.register_buffer("smooth", smooth)
        self.register_buffer("correction", None)
        step.on(like.device)  # made here: a compiled forward only reads it

    @property
    def bits(self) -> Bits:
        """Of a weight."""
        return 8 if self.zero is None else 4

    @property
    def out(self) -> int:
        return int(self.scale.shape[0])

    def integers(self) -> Tensor:
        """int8 [out, in]. At 4 bits they are unpacked at every call: int4 saves memory, not time."""
        return _integers(self.packed, self.zero, self.columns)

    def matrix(self) -> Tensor:
        """The dequantised weight, float32 [out, in]."""
        matrix = self.integers().float() * self.scale[:, None]
        return matrix if self.smooth is None else matrix / self.smooth.repeat(self.columns // len(self.smooth))

    def _channels(self, table: Tensor) -> Tensor:
        """[channels] shaped so that it broadcasts over the input."""
        return table

    def correct(self, correction: AffineCorrection | None) -> None:
        """Sets what brings each step's output, bias included, closer to the unquantised layer's; None takes it off.

        Raises:
            ValueError: The correction is of other steps or channels.
        """
        if correction is not None and (correction.steps, correction.channels) != (self.step.steps, self.out):
            wanted = f"{self.step.steps} steps and {self.out} channels"
            raise ValueError(f"correction must have {wanted}, not {correction.steps} and {correction.channels}")
        self.correction = None if correction is None else torch.stack([correction.scale, correction.shift], 1).to(self.scale.device)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(int8 of x's shape, scale [1], zero [1])."""
        assert self.activation is not None
        scale, zero = self.activation.index_select(0, self.step.on(x.device)).unbind(1)
        factor = scale.reciprocal() if self.smooth is None else self._channels((scale * self.smooth).reciprocal())
        return torch.addcmul(zero, x.float(), factor).round_().clamp_(-128, 127).to(torch.int8), scale, zero

    def _corrected(self, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Bias and correction taken into the scale and shift [out] of the output."""
        if self.bias is not None:
            shift = shift + self.bias.float()
        if self.correction is not None:
            a, b = self.correction.index_select(0, self.step.on(shift.device))[0].unbind()
            scale, shift = scale * a, torch.addcmul(b, shift, a)
        return scale, shift

    def _product(self, rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """float32 [rows, out] from int8 [rows, in]: the integer product, dequantised, corrected, with bias."""
        scale = scale * self.scale
        scale, shift = self._corrected(scale, -scale * zero * self.sums)
        return scaled_product(rows, self.integers(), scale, shift)

    def _float_affine(self, y: Tensor) -> Tensor:
        """Correction and bias for a float32 product [..., out]."""
        scale, shift = self._corrected(torch.ones_like(self.scale), torch.zeros_like(self.scale))
        return torch.addcmul(shift, y, scale)

    def _integer(self, x: Tensor) -> bool:
        """Whether this input goes through the integer product: on CUDA and on CPUs that do it right. Else the dequantised values are
        multiplied as floats, which means the same."""
        works = x.is_cuda or (x.device.type == "cpu" and self._cpu_is_exact)
        return self.activation is not None and works and x.numel() > 0

    def _rounded(self, x: Tensor) -> Tensor:
        """float32: the input as its int8 grid holds it; untouched where activations are not quantised."""
        if self.activation is None:
            return x.float()
        q, scale, zero = self._quantise(x)
        return (q - zero) * (scale if self.smooth is None else self._channels(scale * self.smooth))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tables = {name: b for name, b in self._buffers.items() if name != "_like" and b is not None and b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = table.to(moved.device)
        if not self.scale.is_meta:
            self.step.on(self.scale.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        held = state_dict.get(prefix + "correction")  # a correction is set after the layer was made: take it in if the file has one
        if isinstance(held, Tensor) and self.correction is None and held.shape == (self.step.steps, 2, self.out):
            self.correction = torch.empty_like(held, device=self.scale.device)
        elif held is None and prefix + "packed" in state_dict:
            self.correction = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        activations = "float" if self.activation is None else f"int8 at {self.step.steps} steps"
        return f"in={self.columns}, out={self.out}, weights=int{self.bits}, activations={activations}, bias={self.bias is not None}"


class QuantLinear(_QuantLayer):
    """A quantised `nn.Linear`: [..., in] -> [..., out], in the dtype of the input.

    Args:
        linear: The layer; its bias is shared, its weight is not kept.
        step: Shared with the other layers; says which row of `ranges` holds.
        ranges: float32 [steps, 2], low and high ends of the input at each step; None leaves activations as they are.
        bits: Of a weight: 8 or 4.
        smooth: float32 [in], see `ChannelPeaks.smoothing`; `ranges` are then those of the divided input.

    Raises:
        ValueError: `bits` or the shape of a table is wrong, or the weight is not finite.
    """

    def __init__(self, linear: nn.Linear, step: Step, ranges: Tensor | None, bits: Bits = 8, smooth: Tensor | None = None) -> None:
        smooth = _smooth(smooth, linear.in_features, linear.weight)
        matrix = linear.weight if smooth is None else linear.weight.detach().float() * smooth
        super().__init__(quantise_weight(matrix, bits), linear.bias, linear.weight, step, ranges, smooth)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], made anew at each reading: for code that asks a layer for its dtype, device or shape."""
        return self.matrix().to(self._like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self._integer(input):
            if self.activation is not None and input.dtype in ops.STREAMS and fuses(input):
                return self._fused(input, self.activation)
            q, scale, zero = self._quantise(input)
            y = self._product(q.reshape(-1, self.columns), scale, zero).view(*input.shape[:-1], self.out)
        else:
            y = self._float_affine(F.linear(self._rounded(input), self.matrix()))
        return y.to(input.dtype)

    def _fused(self, input: Tensor, activation: Tensor) -> Tensor:
        """The same in three launches: quantised, multiplied, and all that follows."""
        scale, zero = activation.index_select(0, self.step.on(input.device)).unbind(1)
        smooth = None if self.smooth is None else self.smooth.repeat(self.columns // len(self.smooth))
        fix = None if self.correction is None else Fix(*self.correction.index_select(0, self.step.on(input.device))[0].unbind())
        bias = None if self.bias is None else self.bias.float()
        return ops.int8_linear(input, Weight(self.integers(), self.scale, bias), Grid(scale, zero, self.sums, smooth), fix)


class QuantConv2d(_QuantLayer):
    """A quantised `nn.Conv2d`: [batch, channels, height, width], in the dtype and memory format of the input.

    A 1x1 convolution of stride 1 is the product itself; others lay out each window as a row of int8 first, which for 3x3 takes 2.25
    times the memory of the float32 input.

    Args:
        conv: The layer, ungrouped; its bias is shared, its weight is not kept.
        step, ranges, bits, smooth: As for `QuantLinear`.

    Raises:
        ValueError: The convolution is grouped, or as for `QuantLinear`.
    """

    def __init__(self, conv: nn.Conv2d, step: Step, ranges: Tensor | None, bits: Bits = 8, smooth: Tensor | None = None) -> None:
        if conv.groups != 1:
            raise ValueError(f"conv.groups must be 1, not {conv.groups}: a grouped convolution is no single product")
        smooth = _smooth(smooth, conv.in_channels, conv.weight)
        pixels = conv.weight.permute(0, 2, 3, 1)  # channels last, so that a window copies whole pixels
        matrix = (pixels if smooth is None else pixels.detach().float() * smooth).flatten(1)
        super().__init__(quantise_weight(matrix, bits), conv.bias, conv.weight, step, ranges, smooth)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
        self.stride = (int(conv.stride[0]), int(conv.stride[1]))
        self.dilation = (int(conv.dilation[0]), int(conv.dilation[1]))
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._margins = [int(n) for n in conv._reversed_padding_repeated_twice]

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in, height, width], made anew at each reading."""
        return self._kernel().to(self._like.dtype)

    def _channels(self, table: Tensor) -> Tensor:
        return table[:, None, None]

    def _kernel(self) -> Tensor:
        return self.matrix().view(self.out, *self.kernel_size, self.in_channels).permute(0, 3, 1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        """With the margins on, in floats: 0 is on the int8 grid, whatever the step's zero point."""
        if not any(self._margins):
            return x
        return F.pad(x, self._margins, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _windows(self, q: Tensor) -> Tensor:
        """[batch, height, width, columns] of the output's size from the padded [batch, channels, height, width]."""
        q = q.permute(0, 2, 3, 1)
        if self.kernel_size == (1, 1):
            return q[:, :: self.stride[0], :: self.stride[1]]
        q = q.contiguous()  # so that a window is copied pixel by pixel, not byte by byte
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True), 1):
            q = q.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return q.permute(0, 1, 2, 4, 5, 3).flatten(3)

    def forward(self, input: Tensor) -> Tensor:
        x = input if input.ndim == 4 else input[None]
        if self._integer(x):
            q, scale, zero = self._quantise(self._padded(x))
            windows = self._windows(q)
            y = self._product(windows.reshape(-1, self.columns), scale, zero).view(*windows.shape[:3], self.out)
        else:
            x = self._padded(self._rounded(x))
            y = self._float_affine(F.conv2d(x, self._kernel(), None, self.stride, 0, self.dilation).permute(0, 2, 3, 1))
        y = y.to(input.dtype).permute(0, 3, 1, 2)
        if input.is_contiguous():  # some callers .view() what they get
            y = y.contiguous()
        return y if input.ndim == 4 else y[0]


def _smooth(smooth: Tensor | None, channels: int, like: Tensor) -> Tensor | None:
    if smooth is None:
        return None
    smooth = smooth.detach().float().to(like.device)
    if smooth.shape != (channels,) or not (smooth.isfinite() & (smooth > 0)).all():
        raise ValueError(f"smooth must be [{channels}], positive and finite, one per input channel, not {list(smooth.shape)}")
    return smooth


def _alias(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own over the same memory: moving or casting one module does not move the other."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


# ---------------------------------------------------------------------------------------------------------- denoisers


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised copy of a denoiser.

    Attributes:
        module: The copy; what is not quantised shares its memory with the original, as long as neither is moved or cast.
        step: Set this to the executed step before each call of the module.
        bits: Bits of a weight, by name of the layer.
        kept: Layers that stay floating, by name, and why.
    """

    module: nn.Module
    step: Step
    bits: Mapping[str, Bits]
    kept: Mapping[str, str]


def first_and_last(module: nn.Module, order: Sequence[str]) -> tuple[str, ...]:
    """The layers that read the latents and that write the prediction, which stay at 8 bits when the others have 4.

    Args:
        module: A denoiser.
        order: Names of its layers in the order of their calls. The first convolution, or without one the first layer, is taken for
            the one that reads latents (a UNet embeds the timestep before); the last layer for the one that writes.
    """
    found = layers(module)
    called = [name for name in order if name in found]
    if not called:
        return ()
    first = next((name for name in called if isinstance(found[name], nn.Conv2d)), called[0])
    return tuple(dict.fromkeys((first, called[-1])))


def quantised(
    module: nn.Module,
    ranges: ActivationRanges | Mapping[str, Tensor] | None,
    *,
    weights: Literal["int8", "int4"] = "int8",
    activations: Literal["int8", "none"] = "int8",
    steps: int | None = None,
    keep_8bit: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
    smallest: int = 0,
    step: Step | None = None,
    smooth: Mapping[str, Tensor] | None = None,
) -> Quantised:
    """Builds a quantised copy of a denoiser; the original is not touched.

    As `copy.deepcopy` does, the copy takes along the hooks of the modules it copies; those of the layers it replaces stay behind.

    Args:
        module: Any tree with `nn.Linear` and `nn.Conv2d` in it.
        ranges: Measured on full-compute runs, or their `tables()`; None only with activations="none".
        weights: "int8", or "int4" for all but the layers of `keep_8bit`.
        activations: "int8", or "none": weights are stored small and multiplied as floats.
        steps: Of a run; that of `ranges` unless told, and 1 without ranges.
        keep_8bit: Names of layers whose weights keep 8 bits; `first_and_last` unless told.
        keep_float: Names of layers that are left alone.
        smallest: Layers with fewer weights are left alone.
        step: To be shared with other modules; a new one unless told.
        smooth: By layer, what `ChannelPeaks.smoothing` returned; `ranges` are then those measured with it. Only with 8-bit activations.

    Raises:
        ValueError: An argument is none of these, names a layer that there is not, disagrees on the number of steps, nothing is left to
            quantise, or weights are not on a device (offloaded).
    """
    for name, given, known in (("weights", weights, ("int8", "int4")), ("activations", activations, ("int8", "none"))):
        if given not in known:
            raise ValueError(f"{name} must be one of {known}, not {given!r}")
    tables = dict(ranges.tables() if isinstance(ranges, ActivationRanges) else ranges or {})
    if activations == "int8" and not tables:
        raise ValueError("ranges must be given for activations='int8': static scales cannot be guessed; 'none' needs none")
    rows = {len(table) for table in tables.values()} | ({steps} if steps is not None else set()) | ({step.steps} if step else set())
    if len(rows) > 1:
        raise ValueError(f"steps must be the same for ranges, steps and step, not {sorted(rows)}")
    step = step or Step(rows.pop() if rows else 1)
    found = layers(module)
    if keep_8bit is None:
        keep_8bit = first_and_last(module, list(tables) or list(found))
    for argument, names in (("keep_8bit", keep_8bit), ("keep_float", keep_float)):
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{argument} must name Linear or Conv2d layers of the module, which {missing} are not")

    bits: dict[str, Bits] = {}
    kept: dict[str, str] = {}
    memo: dict[int, Any] = {}  # what deepcopy takes for the copy of an object: quantised layers and shared tensors
    for name, layer in found.items():
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if layer.weight.is_meta:
            raise ValueError(f"module must hold its weights; those of {name} are on the meta device (offloaded: quantise before)")
        reason = None
        if name in keep_float:
            reason = "named in keep_float"
        elif layer.weight.numel() < smallest:
            reason = f"{layer.weight.numel()} weights are fewer than smallest={smallest}"
        elif not layer.weight.is_floating_point() or layer.weight.element_size() == 1:
            reason = f"its weight is {layer.weight.dtype}: quantised already"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            reason = f"a grouped convolution ({layer.groups} groups) is no single product"
        elif activations == "int8" and name not in tables:
            reason = "it never ran while the ranges were measured"
        if reason is not None:
            kept[name] = reason
            continue
        bits[name] = 8 if weights == "int8" or name in keep_8bit else 4
        table = tables[name] if activations == "int8" else None
        kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
        divided = (smooth or {}).get(name) if table is not None else None
        memo[id(layer)] = kind(layer, step, table, bits[name], divided).train(layer.training)  # type: ignore[arg-type]
    if not bits:
        raise ValueError(f"module has no layer to quantise; left alone: {kept}")
    for parameter in module.parameters():
        memo[id(parameter)] = _alias(parameter)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return Quantised(copy.deepcopy(module, memo), step, bits, kept)


@contextmanager
def output_errors(module: nn.Module, made: Quantised, names: Sequence[str]) -> Iterator[dict[str, AffineStatistics]]:
    """Inside the block, compares the named layers' outputs on the inputs they get when `module`, the original, runs; afterwards
    `correct(statistics.fit())` on a layer takes the systematic part of its error off. Set `made.step` at each step.

    Args:
        module: The denoiser that `made` is a copy of; with caching on, the inputs are those that caching leaves.
        made: Its quantised copy, in the same place.
        names: Quantised layers, typically the few that consume a cached value: each costs 8 bytes per step and channel.

    Raises:
        ValueError: A name is no quantised layer.
    """
    if missing := [name for name in names if name not in made.bits]:
        raise ValueError(f"names must be quantised layers, which {missing} are not")
    statistics: dict[str, AffineStatistics] = {}
    handles = []
    for name in names:
        layer = made.module.get_submodule(name)
        assert isinstance(layer, _QuantLayer)
        layer.correct(None)
        statistics[name] = AffineStatistics(made.step.steps, layer.out)

        def compare(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name, layer: _QuantLayer = layer) -> None:
            dim = 1 if isinstance(layer, QuantConv2d) else -1
            statistics[name].add(made.step.index, output, layer(args[0]), dim=dim)

        handles.append(module.get_submodule(name).register_forward_hook(compare))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class WeightBytes:
    """Bytes a module holds.

    Attributes:
        weights: Of Linear and Conv2d layers, quantised or not.
        scales: Scales, zeros, row sums and smoothing of quantised weights.
        steps: Activation scales of all steps.
        corrections: Of outputs, at all steps.
        rest: Biases, norms, embeddings and all else.
    """

    weights: int
    scales: int
    steps: int
    corrections: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.scales + self.steps + self.corrections + self.rest


def weight_bytes(module: nn.Module) -> WeightBytes:
    """Counts the bytes of all parameters and buffers; tensors that stand in several places count once."""
    counts = dict.fromkeys(("weights", "scales", "steps", "corrections", "rest"), 0)
    seen: set[int] = set()
    for child in module.modules():
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            kind = "rest"
            if isinstance(child, _QuantLayer):
                kind = {"packed": "weights", "activation": "steps", "correction": "corrections"}.get(name, kind)
                kind = "scales" if name in ("scale", "zero", "sums", "smooth") else kind
            elif name == "weight" and isinstance(child, nn.Linear | nn.Conv2d):
                kind = "weights"
            counts[kind] += tensor.nbytes
    return WeightBytes(**counts)
