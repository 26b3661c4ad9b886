"""The one table of the dtypes that weights, activations and caches come in."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16)
FP8_MAX = 448.0  # the largest e4m3
TINY = 2.0**-100  # the smallest amax of what is quantised, which keeps 1 / scale finite


def dtype_of(name: str) -> torch.dtype:
    """By its name in DTYPES ("fp8_e4m3") or torch's own ("bfloat16")."""
    found: torch.dtype = DTYPES.get(name) or getattr(torch, name)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """torch's own name, for messages: "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")
