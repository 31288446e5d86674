"""Lets a plan's quantised layers answer for the denoiser's own, call by call: the denoiser itself stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.accelerators.caching.correction import AffineCorrection
from hasten.accelerators.caching.plan import Plan, PlanError
from hasten.accelerators.dispatch import Call, Handler
from hasten.accelerators.quantization.int8 import QuantConv2d, Quantised, QuantLinear, quantised
from hasten.accelerators.quantization.ranges import Step

RANGE, OUTPUT, SMOOTH = "range.", "output.", "smooth."


def quantised_tables(
    ranges: Mapping[str, torch.Tensor], corrections: Mapping[str, AffineCorrection], smooth: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """The tables of a plan: by layer, activation ranges [steps, 2], output corrections [2, steps, channels], smoothing [in channels]."""
    tables = {f"{RANGE}{name}": np.asarray(table) for name, table in ranges.items()}
    tables |= {f"{SMOOTH}{name}": np.asarray(table.cpu()) for name, table in smooth.items() if name in ranges}
    return tables | {f"{OUTPUT}{name}": np.stack([c.scale.numpy(), c.shift.numpy()]) for name, c in corrections.items()}


def quantised_copy(plan: Plan, denoiser: nn.Module) -> Quantised:
    """The quantised layers that a plan asks for, made from the denoiser's weights.

    Raises:
        PlanError: The plan's tables are not this model's.
    """
    asked = plan.facts["quantised"]
    ranges = {name.removeprefix(RANGE): torch.tensor(table) for name, table in plan.tables.items() if name.startswith(RANGE)}
    smooth = {name.removeprefix(SMOOTH): torch.tensor(table) for name, table in plan.tables.items() if name.startswith(SMOOTH)}
    try:
        made = quantised(
            denoiser, ranges or None, weights=asked["weights"], activations=asked["activations"], step=Step(plan.steps),
            keep_8bit=asked.get("keep_8bit"), smooth=smooth,
        )  # fmt: skip
        for name, table in plan.tables.items():
            if name.startswith(OUTPUT):
                layer = made.module.get_submodule(name.removeprefix(OUTPUT))
                assert isinstance(layer, QuantLinear | QuantConv2d)
                layer.correct(AffineCorrection(torch.tensor(table[0]), torch.tensor(table[1])))
    except (ValueError, AttributeError, KeyError) as error:
        raise PlanError(f"the plan's quantised layers do not fit this model: {error}") from None
    return made


def layer_handlers(made: Quantised, denoiser: nn.Module) -> dict[nn.Module, Handler]:
    """What answers for the denoiser's own layers."""

    def answer(layer: nn.Module) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return layer(*args, **kwargs)

        return handle

    return {denoiser.get_submodule(name): answer(made.module.get_submodule(name)) for name in made.bits}
