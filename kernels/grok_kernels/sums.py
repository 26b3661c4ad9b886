"""The sum of two blocks that run side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layouts


def scaled_sum(a_TD: Tensor, b_TD: Tensor, divisor: float) -> Tensor:
    """(a + b) / divisor in fp32, rounded once to the dtype of both: one pass on a CPU, where the extension is."""
    on_cpu = a_TD.device.type == b_TD.device.type == "cpu" and a_TD.dtype in (torch.float32, torch.bfloat16)
    grad = torch.is_grad_enabled() and (a_TD.requires_grad or b_TD.requires_grad)
    if layouts.native is not None and on_cpu and not grad and a_TD.is_contiguous() and b_TD.is_contiguous():
        return layouts.native.scaled_sum(a_TD, b_TD, divisor)
    return ((a_TD.float() + b_TD.float()) / divisor).to(a_TD.dtype)
