"""Runs the ops' tests on another device. The tests keep their tensors on the CPU and know nothing of the device.

With GROK_TEST_DEVICE=cuda, each op of `grok_kernels` copies the storages behind its tensors to the device, runs on
views of the copies with the same shapes, strides and offsets, and copies the storages back. So a test sees every write,
those between the columns of a view too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grok_kernels
from tests.kernels.cases import mapped, tensors

DEVICE = os.environ.get("GROK_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"


def carried(function: Callable[..., Any], device: str = DEVICE) -> Callable[..., Any]:
    """The same function, run on copies of its CPU tensors on `device`. Calls with gradients run as they are."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        given = dict(enumerate(args)) | options
        if any(t.requires_grad for t in tensors(given).values()):
            return function(*args, **options)
        there: dict[int, tuple[Tensor, Tensor]] = {}  # by the storage's address: its bytes here and there

        def moved(x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() not in there:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                there[storage.data_ptr()] = here, here.to(device, copy=True)
            copy = there[storage.data_ptr()][1].untyped_storage()
            like = torch.empty(0, dtype=x.dtype, device=device)
            return like.set_(copy, x.storage_offset(), x.size(), x.stride())

        there_too = {name: mapped(x, moved) for name, x in options.items()}
        result = function(*(mapped(x, moved) for x in args), **there_too)
        for here, copy in there.values():
            here.copy_(copy)
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    return call


def install() -> None:
    """Redirects every op of `grok_kernels` to `DEVICE`, for all later look-ups of the op."""
    for op in grok_kernels.backends():
        setattr(grok_kernels, op, carried(getattr(grok_kernels, op)))
