"""A kernel that reads outside of its tensor, for `test_sanitized` to run under the sanitizers: without them nothing would be seen."""

from __future__ import annotations

import torch

from hasten.kernels import launch
from tests.kernels.machine import Machine


def test_a_planted_access_outside_is_caught(machine: Machine) -> None:
    """The kernel is told of a row more than there is."""
    x, out = torch.randn(1, 3, 8), torch.empty(1, 4, 8)
    args = launch._Apply(launch.Rows.of(x), batch=1, tokens=4, channels=8, group=1, out=out.data_ptr(), terms=1)
    args.offset[0], args.weight[0] = launch.Rows.of(x), 1.0
    machine.kernels().launch("apply", "apply_float_float_4", (1, 1), (2, 4), args, 0)
