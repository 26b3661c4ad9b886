"""The cuda backend's swapped-operand GEMM gives the same bits with each of its tiles, on the chip at hand. Only
where this holds may several serve: `python -m grok_kernels.autotune` measures the same and writes it down."""

from __future__ import annotations

import pytest
import torch

import grok_kernels
from grok_kernels.autotune import same_swapped_bits
from grok_kernels.tuning import SWAPPED_TILES
from tests.gpu.full_size import DEVICE


@pytest.mark.parametrize("weight", SWAPPED_TILES, ids=str)
def test_every_tile_has_the_same_bits(weight: torch.dtype) -> None:
    if reason := grok_kernels.backends()["moe"]["cuda"].reason:
        pytest.skip(reason)
    with torch.inference_mode():
        assert same_swapped_bits(weight, DEVICE)
