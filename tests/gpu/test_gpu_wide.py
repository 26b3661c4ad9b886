"""The cuda backend's products give the same bits with every tile that they have, on the chip at hand. Only where this holds
may several serve: `python -m grok_kernels.tune` asks the same, and writes it down."""

from __future__ import annotations

import pytest
import torch

import grok_kernels
from grok_kernels.tune import same_wide_bits
from grok_kernels.tuning import WIDE_TOKENS
from tests.gpu.full_size import DEVICE


@pytest.mark.parametrize("weight", WIDE_TOKENS, ids=str)
def test_every_tile_has_the_same_bits(weight: torch.dtype) -> None:
    if reason := grok_kernels.backends()["moe"]["cuda"].reason:
        pytest.skip(reason)
    with torch.inference_mode():
        assert same_wide_bits(weight, DEVICE)
