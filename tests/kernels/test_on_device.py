"""Carrying an op's tensors to another device and back: views stay views, and what is written anywhere shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.on_device import carried


def test_views_of_one_storage_and_what_is_written_beside_them() -> None:
    wide = torch.full((4, 10), float("nan"))
    wide[:, 2:7] = torch.arange(20.0).view(4, 5)
    left, right = wide[:, 2:5], wide[::2, 4:7]
    seen: dict[str, Any] = {}

    def op(a: Tensor, *, b: Tensor, n: int, none: None) -> tuple[Tensor, Tensor]:
        seen.update(strides=(a.stride(), b.stride()), offsets=(a.storage_offset(), b.storage_offset()), n=n, none=none)
        assert a.data_ptr() != left.data_ptr()  # another place
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()  # and one, as here
        assert torch.equal(a, left)
        assert torch.equal(b, right)
        b[0, 0] = 100.0
        torch.as_strided(a, (1,), (1,), 1)[0] = -7.0  # past its columns
        return a + 1, b.sum(1)

    more, sums = carried(op, "cpu")(left, b=right, n=3, none=None)
    assert seen == {"strides": ((10, 1), (20, 1)), "offsets": (2, 4), "n": 3, "none": None}
    assert wide[0, 4] == 100.0
    assert wide[0, 1] == -7.0
    assert torch.equal(more, wide[:, 2:5] + 1)
    assert torch.equal(sums, wide[::2, 4:7].sum(1))


def test_e4m3_empty_tensors_and_other_devices() -> None:
    x = torch.randn(3, 4).to(torch.float8_e4m3fn)
    nothing, elsewhere = torch.empty(0, 3), torch.empty(2, device="meta")

    def op(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        assert (a.dtype, tuple(b.shape), c.device.type) == (torch.float8_e4m3fn, (0, 3), "meta")
        return a.float()

    assert torch.equal(carried(op, "cpu")(x, nothing, elsewhere), x.float())


def test_gradients_stay_where_they_are() -> None:
    x = torch.randn(3, requires_grad=True)
    y = carried(lambda a: a * 2, "cpu")(x)
    y.sum().backward()
    assert x.grad is not None
