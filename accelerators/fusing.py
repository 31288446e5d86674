"""Whether the fused kernels take some tensors: what is asked before `hasten.kernels.ops` is called in place of a chain of PyTorch's own.

The ops would answer on any device, but elsewhere than on CUDA their meaning in plain PyTorch is no faster than the chain itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels import backend


def fuses(*tensors: Tensor) -> bool:
    """Whether all are on one CUDA device, none wants a gradient, and kernels run there: not turned off (HASTEN_KERNELS=reference), and
    not found not to work."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or not backend.usable(*devices):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
