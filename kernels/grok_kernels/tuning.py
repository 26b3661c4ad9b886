"""What the GPU kernels are shaped by: the chip, and pure functions from (shape, dtype, chip) to a block configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Chip:
    """A GPU as the kernels see it."""

    name: str
    arch: str  # sm_90, gfx942
    multiprocessors: int
    shared_bytes: int  # that one block may have

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where the chip is not NVIDIA's."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3."""
        return self.capability >= 89


CHIPS = {  # those that the kernels are compiled for without one at hand
    "h100": Chip("h100", "sm_90", 132, 232448),
    "a100": Chip("a100", "sm_80", 108, 166912),
    "l40s": Chip("l40s", "sm_89", 142, 101376),
    "b200": Chip("b200", "sm_100", 148, 232448),
    "mi300x": Chip("mi300x", "gfx942", 304, 65536),
}

_assumed: ContextVar[Chip] = ContextVar("grok_kernels_chip", default=CHIPS["h100"])


@contextmanager
def assume_chip(chip: Chip) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU (under the interpreter, or on `meta`) count as on this chip."""
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that this device is, or for a device that is no GPU the one assumed."""
    return _read(device.index or 0) if device.type == "cuda" else _assumed.get()


@lru_cache
def _read(index: int) -> Chip:
    p: Any = torch.cuda.get_device_properties(index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    known = next((name for name in CHIPS if name in p.name.lower()), p.name.lower().replace(" ", "-"))
    return Chip(known, arch, p.multi_processor_count, p.shared_memory_per_block_optin)
