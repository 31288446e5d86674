"""Arguments that belong together, handed on as one from `ops` to `reference` and `launch`.

PyTorch's registered ops take them one by one: a tuple spreads into them in its own order, and `given` puts them together again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Fix(NamedTuple):
    """A correction of every channel: `values * scale + shift`.

    Attributes:
        scale, shift: float32 [groups, channels], one for as many equal groups of consecutive samples; of a layer's output [out].
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def given(cls, scale: Tensor | None = None, shift: Tensor | None = None) -> Fix | None:
        """None where neither is given.

        Raises:
            ValueError: One is.
        """
        if (scale is None) != (shift is None):
            raise ValueError("fix_scale and fix_shift must be given together")
        return None if scale is None or shift is None else cls(scale, shift)


class Modulation(NamedTuple):
    """What a DiT block does to a part's output and to the norm behind it.

    Attributes:
        gate, scale, shift: Broadcast against the hidden states, or [batch, channels], one for each sample; None for none.
    """

    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Norm(NamedTuple):
    """LayerNorm or RMSNorm over channels.

    Attributes:
        weight, bias: [channels], or None.
        eps: Added to the variance; 1e-6 is that of DiT's norms.
        rms: RMSNorm, else LayerNorm.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    rms: bool = False


class Weight(NamedTuple):
    """Of a layer in int8.

    Attributes:
        values: int8 [out, in].
        scale: float32 [out].
        bias: [out], or None.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None = None


class Grid(NamedTuple):
    """The int8 grid of a layer's activations, fixed beforehand: `x / smooth ≈ scale * (values - zero)`.

    Attributes:
        scale, zero: float32 [1].
        sums: int32 [out], of the weight's rows: what the zero point contributes to a product is taken off with them.
        smooth: float32 [in], by which activations are divided before, or None.
    """

    scale: Tensor
    zero: Tensor
    sums: Tensor
    smooth: Tensor | None = None

    @classmethod
    def given(
        cls, scale: Tensor | None = None, zero: Tensor | None = None, sums: Tensor | None = None, smooth: Tensor | None = None
    ) -> Grid | None:
        """None where none is given.

        Raises:
            ValueError: Some of them are.
        """
        if len({table is None for table in (scale, zero, sums)}) > 1:
            raise ValueError("scale, zero and sums must be given together")
        if scale is None or zero is None or sums is None:
            if smooth is not None:
                raise ValueError("smooth must come with scale: without it every row is measured as it is")
            return None
        return cls(scale, zero, sums, smooth)


class Noise(NamedTuple):
    """Gumbel noise that belongs to its place.

    Attributes:
        scale: Of the noise: the temperature, or 1 where logits are divided by it.
        seeds: int64 [rows].
        positions: int64 [rows, positions] or [positions].
        steps: int64 [rows].
    """

    scale: float
    seeds: Tensor
    positions: Tensor
    steps: Tensor

    @classmethod
    def given(
        cls, scale: float = 0.0, seeds: Tensor | None = None, positions: Tensor | None = None, steps: Tensor | None = None
    ) -> Noise | None:
        """None where its scale is 0.

        Raises:
            ValueError: It is not, and tensors are missing.
        """
        if scale == 0.0:
            return None
        if seeds is None or positions is None or steps is None:
            raise ValueError(f"seeds, positions and steps must be given with noise of scale {scale!r}")
        return cls(scale, seeds, positions, steps)


class Selection(NamedTuple):
    """Which masked positions commit: all that score at least the threshold, and in any case the best ones.

    Attributes:
        mask: The mask token.
        threshold: Of the score.
        minimum: Positions of each row that commit in any case; ties go to the left.
        score: "low_confidence" (probability of the chosen token), "margin" (largest less second probability) or "entropy" (negative).
        active: bool [rows, positions] that may commit; None for all.
    """

    mask: int
    threshold: float
    minimum: int = 1
    score: str = "low_confidence"
    active: Tensor | None = None
