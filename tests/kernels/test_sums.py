"""The sum of two blocks, in plain torch and on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import grok_kernels
from grok_kernels import cpu, layouts
from tests.kernels.backends import ISAS
from tests.kernels.cases import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", [None, *ISAS])
def test_scaled_sum(isa: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, rounded once; of rows with gaps between them too."""
    a, b = randn(3, 70, dtype=dtype), randn(3, 70, seed=1, dtype=dtype)
    expected = ((a.double() + b.double()).float().double() / torch.tensor(math.sqrt(2)).double()).float().to(dtype)
    if isa is None:
        monkeypatch.setattr(layouts, "native", None)
        assert torch.equal(grok_kernels.scaled_sum(a, b, math.sqrt(2)), expected)
        return
    with cpu.use_isa(isa):
        with FakeTensorMode() as mode:
            assert grok_kernels.scaled_sum(mode.from_tensor(a), mode.from_tensor(b), 2.0).shape == (3, 70)
        assert torch.equal(grok_kernels.scaled_sum(a, b, math.sqrt(2)), expected)
        assert torch.equal(grok_kernels.scaled_sum(a[:, 1:], b[:, 1:], math.sqrt(2)), expected[:, 1:])
        with pytest.raises(ValueError, match=r"b has shape \[2, 70\] and dtype Float, expected \[3, 70\]"):
            layouts.native.scaled_sum(a, b.float()[:2], 1.0)  # type: ignore[union-attr]
