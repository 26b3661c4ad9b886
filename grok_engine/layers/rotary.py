"""The table of rotary angles that all layers share."""

from __future__ import annotations

import torch
from torch import Tensor

import grok_kernels
from grok_engine.config import ModelConfig


def rotary_table(config: ModelConfig, positions: int, device: torch.device | str) -> Tensor:
    """(positions, C) fp32: cos of the C/2 angles, then sin."""
    return grok_kernels.rope_table(positions, config.head_dim, config.rope_theta, device, config.rope_factors)
