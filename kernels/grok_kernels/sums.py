"""The sum of two blocks that run side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layouts, registry


def scaled_sum(a_TD: Tensor, b_TD: Tensor, divisor: float) -> Tensor:
    """(a + b) / divisor in fp32, rounded once to the dtype of both: one pass on a CPU, where the extension is."""
    native = layouts.native if a_TD.dtype in (torch.float32, torch.bfloat16) else None
    if native is not None and registry.key((a_TD, b_TD)) is not None and a_TD.stride(1) == b_TD.stride(1) == 1:
        return native.scaled_sum(a_TD, b_TD, divisor)
    return ((a_TD.float() + b_TD.float()) / divisor).to(a_TD.dtype)
