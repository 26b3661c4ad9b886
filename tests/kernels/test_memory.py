"""Memory for weights: what is asked for, aligned to huge pages, kept as long as it is used."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

import grok_kernels
from grok_kernels import layouts

HUGE = 2 << 20


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 1000, 9000])
def test_the_shape_and_type_that_were_asked_for(rows: int, dtype: torch.dtype) -> None:
    memory = grok_kernels.weight_memory((rows, 3, 100), dtype, "cpu")
    assert (tuple(memory.shape), memory.dtype) == ((rows, 3, 100), dtype)
    assert memory.is_contiguous()
    assert torch.equal(memory.fill_(1), torch.ones(rows, 3, 100, dtype=dtype))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on request here")
def test_large_memory_begins_where_a_huge_page_can() -> None:
    assert grok_kernels.weight_memory((HUGE + 1,), torch.int8, "cpu").data_ptr() % HUGE == 0
    assert grok_kernels.huge_pages(5).data_ptr() % HUGE == 0


def test_a_view_keeps_the_memory() -> None:
    view = grok_kernels.huge_pages(3 * HUGE)[HUGE : 2 * HUGE]
    gc.collect()
    assert not view.any()
    view.fill_(7)
    assert int(view.sum(dtype=torch.int64)) == 7 * HUGE


def test_another_device_has_its_own_memory() -> None:
    assert grok_kernels.weight_memory((HUGE,), torch.int8, "meta").device.type == "meta"


def test_packed_weights_lie_in_it() -> None:
    packed = layouts.pack(torch.zeros(2, 1024, 1024, dtype=torch.int8))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert packed.data_ptr() % HUGE == 0
