"""What the inputs of a denoiser's layers span at each step: the calibration of static activation scales.

CacheQuant (arXiv 2503.01323) gives every layer one scale and zero per sampler step. The span is cut at a percentile, .999, .9999 or
.99999, whichever reconstructs the input best at 8 bits, and smoothed with weights .9 and .1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NORM = 2.4
"""Power of the reconstruction error, for weights and activations (CacheQuant's code)."""
PERCENTILES = (0.999, 0.9999, 0.99999)
SAMPLE = 65_536
"""Most entries of an input that are looked at per call."""


class Step:
    """The step that quantised layers are at. Shared by all of them; whoever drives the sampler sets it.

    It is read as a tensor on the layer's own device: nothing waits for the device, and compiled or captured code does not change
    from step to step.

    Args:
        steps: Of a run.

    Raises:
        ValueError: `steps` is below 1.
    """

    def __init__(self, steps: int) -> None:
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
        self.steps = steps
        self.index = 0
        self._on: dict[torch.device, Tensor] = {}

    def set(self, index: int) -> None:
        """Moves on to an executed step, counted from 0.

        Raises:
            ValueError: The run has no such step.
        """
        if type(index) is not int or not 0 <= index < self.steps:
            raise ValueError(f"index must be from 0 to {self.steps - 1}, not {index!r}: the scales were measured for {self.steps} steps")
        self.index = index
        for tensor in self._on.values():
            tensor.fill_(index)

    def on(self, device: torch.device) -> Tensor:
        """int64 [1] on `device`; the same tensor each time, so that later steps show in it."""
        if device not in self._on:
            with torch.inference_mode(False):  # an inference tensor could not be changed outside of inference mode
                self._on[device] = torch.full((1,), self.index, dtype=torch.int64, device=device)
        return self._on[device]


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be quantised, by name: `nn.Linear` and `nn.Conv2d` themselves, in the order of `named_modules`.

    Subclasses are left out: whoever made one may read its weight and pass the layer's call by (`nn.MultiheadAttention` does).
    """
    return {name: child for name, child in module.named_modules() if type(child) in (nn.Linear, nn.Conv2d)}


def channel_dim(layer: nn.Module) -> int:
    """Which dimension of a layer's input the channels are."""
    return -3 if isinstance(layer, nn.Conv2d) else -1


def along(table: Tensor, layer: nn.Module) -> Tensor:
    """[channels] shaped so that it broadcasts over the layer's input."""
    return table.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else table


class ChannelPeaks:
    """Largest magnitude and mean square of every input channel of all layers, over whatever runs: what smoothing goes by.

    with peaks.watch(pipe.transformer):
        ...                                # run
    """

    def __init__(self) -> None:
        self.peaks: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[ChannelPeaks]:
        """Measures whatever runs through `module` inside the `with` block; leaves the module as it was."""

        def hook(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                value = (args[0] if args else kwargs["input"]).detach()
                if value.numel():
                    rows = value.movedim(channel_dim(layer), -1).flatten(0, -2)
                    peak, square = rows.abs().amax(0).float(), rows.float().square().mean(0)
                    self.peaks[name] = torch.maximum(self.peaks[name], peak) if name in self.peaks else peak
                    self._squares[name] = self._squares[name] + square if name in self._squares else square
                    self._calls[name] = self._calls.get(name, 0) + 1

            return layer.register_forward_pre_hook(look, with_kwargs=True)

        handles = [hook(name, layer) for name, layer in layers(module).items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def smoothing(self, module: nn.Module, strength: float | None = None) -> dict[str, Tensor]:
        """By what each layer's input channels are divided, and its weights multiplied (SmoothQuant, arXiv 2211.10438).

        The grid of an input is one for all channels: those with large entries leave the others few of its points. Part of the spread, on
        a logarithmic scale, is moved into the weights, whose grids belong to the output channels. How much is best differs from layer to
        layer: a convolution that reads a skip beside its own stream wants most of it, one behind a norm hardly any.

        Args:
            module: The denoiser that was watched.
            strength: 0 leaves all with the inputs, 1 moves all to the weights (the paper's 0.5). None searches for each layer what
                leaves its output the least rounding noise, see `rounding_noise`.

        Returns:
            float32 [in channels] for each layer that ran.
        """
        found = {}
        for name, layer in layers(module).items():
            if name not in self.peaks:
                continue
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            weight = layer.weight.detach().float().flatten(2) if layer.weight.ndim > 2 else layer.weight.detach().float()[..., None]
            inputs = self.peaks[name].to(weight.device)
            if len(inputs) != weight.shape[1]:
                continue  # a grouped convolution, which is not quantised
            weights = weight.abs().amax((0, 2))
            works = (inputs > 0) & (weights > 0) & inputs.isfinite()

            def factor(a: float, b: float, inputs: Tensor = inputs, weights: Tensor = weights, works: Tensor = works) -> Tensor:
                made = inputs.clamp_min(1e-5) ** a / weights.clamp_min(1e-5) ** b
                made = torch.where(works, made, torch.ones_like(made))
                return (made / made.log().mean().exp()).clamp(1e-2, 1e2)

            if strength is not None:
                found[name] = factor(strength, 1 - strength)
                continue
            squares = self._squares[name].to(weight.device) / self._calls[name]
            candidates = [factor(a, b) for a in POWERS for b in POWERS]
            noise = [rounding_noise(weight, inputs.nan_to_num(), squares, candidate) for candidate in candidates]
            found[name] = candidates[noise.index(min(noise))]
        return found


POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the inputs' and of the weights' magnitude in the factors that the search tries; both 0 is no smoothing."""


def rounding_noise(weight: Tensor, peaks: Tensor, squares: Tensor, factor: Tensor) -> float:
    """Expected squared error of a layer's output, summed over its channels, from 8-bit rounding of input and weight.

    Args:
        weight: float32 [out, in, kernel entries].
        peaks: [in] largest magnitudes of the input.
        squares: [in] its mean squares.
        factor: [in] by which inputs are divided and weights multiplied before they are rounded.
    """
    step = 2 * float((peaks / factor).max()) / 255
    of_inputs = step**2 / 12 * float((factor.square()[:, None] * weight.square()).sum())
    steps = (weight.abs() * factor[:, None]).amax((1, 2)) / 127
    of_weights = float(steps.square().sum()) / 12 * weight.shape[2] * float((squares / factor.square()).sum())
    return of_inputs + of_weights


class ActivationRanges:
    """Watches the inputs of all layers during full-compute runs.

        ranges = ActivationRanges(steps=20)
        with ranges.watch(pipe.transformer):
            ...                                # run; set ranges.step at each executed step

    Per layer and step nine numbers are held, whatever streams by: for each candidate percentile the sums of its low and high ends and
    of its reconstruction error. Inputs larger than `sample` are looked at in a fixed random subset.

    Args:
        steps: Of a run.
        smooth: By what inputs are divided channel by channel before they are measured; see `ChannelPeaks.smoothing`.
        percentiles: Candidates for where to cut.
        smoothing: Weight of the steps before; the step's own measurement has the rest. CacheQuant's .9/.1 is read as .1 for the past:
            the other way round a range would lag ten steps behind, longer than many of today's samplers run.
        sample: Most entries that are looked at per call.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        steps: int,
        *,
        smooth: Mapping[str, Tensor] | None = None,
        percentiles: tuple[float, ...] = PERCENTILES,
        smoothing: float = 0.1,
        sample: int = SAMPLE,
    ) -> None:
        if not percentiles or not all(0.5 < p <= 1 for p in percentiles):
            raise ValueError(f"percentiles must be from above 0.5 to 1, at least one of them, not {percentiles!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be from 0 to below 1, not {smoothing!r}")
        if type(sample) is not int or sample < 256:
            raise ValueError(f"sample must be a whole number of at least 256, not {sample!r}")
        self.step = Step(steps)
        self.smooth = dict(smooth or {})
        self.percentiles, self.smoothing, self.sample = tuple(percentiles), smoothing, sample
        self._sums: dict[str, Tensor] = {}
        """[steps, percentiles, 4] per layer, in the order of their first calls: low, high, error, calls."""
        self._subsets: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def steps(self) -> int:
        return self.step.steps

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[ActivationRanges]:
        """Measures whatever runs through `module` inside the `with` block; leaves the module as it was."""

        def hook(name: str) -> torch.utils.hooks.RemovableHandle:
            def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                value = args[0] if args else kwargs["input"]
                if name in self.smooth:
                    value = value / along(self.smooth[name].to(value.device), found[name])
                self.add(name, value)

            return found[name].register_forward_pre_hook(look, with_kwargs=True)

        found = layers(module)
        handles = [hook(name) for name in found]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, name: str, value: Tensor) -> None:
        """Takes in one input of a layer at the present step; an empty one is passed by."""
        flat = value.detach().flatten()
        if flat.numel() == 0:
            return
        if flat.numel() > self.sample:
            key = flat.numel(), flat.device
            if key not in self._subsets:  # at random: a stride would see the same channels each time
                generator = torch.Generator().manual_seed(flat.numel())
                self._subsets[key] = torch.randint(flat.numel(), (self.sample,), generator=generator).to(flat.device)
            flat = flat.index_select(0, self._subsets[key])
        flat = flat.float()
        kept = max(2, 2 + int((1 - min(self.percentiles)) * flat.numel()))
        kept = min(kept, flat.numel())
        tops = torch.stack([flat.topk(kept).values, flat.neg().topk(kept).values])  # [high and negated low end, rank]
        rows = []
        for p in self.percentiles:
            rank = (1 - p) * (flat.numel() - 1)
            below, share = int(rank), rank - int(rank)
            ends = tops[:, below] * (1 - share) + tops[:, min(below + 1, kept - 1)] * share
            high, low = ends.clamp_min(0).unbind()  # the range holds 0, which padding and gates need to be exact
            scale, zero = scale_and_zero(-low, high)
            back = (torch.round(flat / scale + zero).clamp_(-128, 127) - zero) * scale
            rows.append(torch.stack([-low, high, (back - flat).abs().pow(NORM).mean(), torch.ones_like(low)]))
        if name not in self._sums:
            self._sums[name] = torch.zeros(self.steps, len(self.percentiles), 4, device=flat.device)
        self._sums[name][self.step.index] += torch.stack(rows)

    def tables(self) -> dict[str, Tensor]:
        """float32 [steps, 2] per layer, low and high ends, in the order in which the layers were first called.

        Steps at which a layer never ran take the range of the step before, or of the first at which it did.

        Raises:
            ValueError: Nothing was measured, or an input was not finite.
        """
        if not self._sums:
            raise ValueError("nothing was measured: no layer ran inside of watch()")
        tables: dict[str, Tensor] = {}
        for name, sums in self._sums.items():
            seen = sums[:, 0, 3].cpu() > 0
            mean = (sums[:, :, :3] / sums[:, :, 3:].clamp_min(1)).cpu()
            if not mean.isfinite().all():
                raise ValueError(f"the input of {name or 'the layer'} was not finite at some step: its range cannot be measured")
            own = mean[torch.arange(len(mean)), mean[:, :, 2].argmin(1), :2]
            past = own[int(seen.float().argmax())]
            rows = []
            for k in range(len(own)):
                if seen[k]:
                    past = past * self.smoothing + own[k] * (1 - self.smoothing)
                rows.append(past)
            tables[name] = torch.stack(rows)
        return tables


def scale_and_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the int8 grid over [low, high], low <= 0 <= high: `x ≈ scale * (q - zero)`, q and zero from -128 to 127."""
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    return scale, torch.round(-128 - low / scale).clamp_(-128, 127)
