"""The tests of the ops on another device: their tensors stay on the CPU, and each call is carried there and back.

With GROK_TEST_DEVICE=cuda, every function of `grok_kernels` that is an op copies the storages behind its tensors, calls
on views of the copies of the same shapes, strides and offsets, and copies the storages back. So a test sees what was
written where, what lies between the columns of a view is carried too, and no test knows of the device.
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
    """The same function, its CPU tensors on `device` while it runs. Gradients and tensors elsewhere go as they are."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        given = dict(enumerate(args)) | options
        if any(t.requires_grad for t in tensors(given).values()):
            return function(*args, **options)
        there: dict[int, tuple[Tensor, Tensor]] = {}  # of each storage, by its address: its bytes here and there

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
    """Carry every op to `DEVICE`, for all tests that find it in `grok_kernels` from now on."""
    for op in grok_kernels.backends():
        setattr(grok_kernels, op, carried(getattr(grok_kernels, op)))
