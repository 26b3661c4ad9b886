"""Memory for weights and KV pages on a CPU."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .numa import interleave_here

HUGE = 2 << 20


def weight_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`, for large tensors on a Linux CPU in huge pages where the system gives them on request, and
    interleaved over the NUMA nodes of the process.

    Every step reads the weights from end to end, and with pages of 4 kB the TLB misses cost time.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return huge_pages(size).view(dtype).view(*shape)


def huge_pages(size: int) -> Tensor:
    """`size` bytes of zeros, uint8, freed with the last view of them; on Linux in huge pages where the system has
    them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    # 2 MiB more, never touched, so that the data can begin at a huge page
    room = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    interleave_here(whole.data_ptr(), size + HUGE)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]
