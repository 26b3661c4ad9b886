"""Memory for weights on a CPU."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20


def weight_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`; large ones on a CPU under Linux in huge pages, where the system gives such on request.

    Weights are read from end to end in every step: with pages of 4 kB the address translation shows in the time.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return huge_pages(size).view(dtype).view(*shape)


def huge_pages(size: int) -> Tensor:
    """`size` bytes of zeros, uint8, that go with the last view of them; on Linux in huge pages where there are such."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    # more than is needed, and never touched, so that a huge page can begin where the data does
    room = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]
