"""A file of weights before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Part = tuple[int, memoryview]  # the first byte, counted from the file's start, and what goes there


@dataclass(frozen=True, slots=True)
class NewFile:
    """What a file will hold. head: its first bytes, without which no reader takes it; they are written last.

    nbytes: of the whole file, head included. body: everything else, made while it is written, mostly in order.
    """

    name: str
    head: bytes
    nbytes: int
    body: Callable[[], Iterable[Part]]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, contiguous and in order."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
