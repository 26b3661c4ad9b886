"""Random weights of any format whose scales are shared by groups of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from grok_kernels import Weight
from grok_kernels.formats import FORMATS, Spec

FP16, FP32 = torch.float16, torch.float32
# (format, columns that share a scale, those that share a subscale or 0, dtype of the scales), as files have them
KINDS = [
    ("int8", 32, 0, FP16), ("int8", 16, 0, FP32),
    ("int4", 32, 0, FP16), ("int4", 128, 0, FP32), ("int4_zero", 128, 0, FP16), ("int4_zero", 32, 0, FP32),
    ("int4_min", 32, 0, FP16), ("int4_k", 256, 32, FP16),
    ("int5", 32, 0, FP16), ("int5_min", 32, 0, FP16), ("int5_k", 256, 32, FP16), ("int6_k", 256, 16, FP16),
]  # fmt: skip
Kind = tuple[str, int, int, torch.dtype]


def spec_of(kind: Kind, k: int) -> Spec:
    format, columns, sub, scales = kind
    return Spec(format, k // columns, k // sub if sub else 0, scales)


def random_weight(spec: Spec, e: int, n: int, k: int, seed: int = 0) -> Weight:
    """In rows. Every value that the format's bits have occurs; scales have either sign."""
    generator = torch.Generator().manual_seed(seed)
    format, planes = FORMATS[spec.format], dict[str, Tensor]()
    for name, (shape, dtype) in spec.planes("rows", (e, n, k)).items():
        if name == "values":
            low = -128 if format.bits == 8 else -format.zero_point
            planes[name] = torch.randint(low, low + (1 << format.bits), shape, generator=generator).to(dtype)
        elif dtype.is_floating_point:
            planes[name] = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
        else:
            low, high = {"zeros": (0, 17)}.get(name, (-128, 128) if format.signed else (0, 64))
            planes[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
    return Weight.of(**planes, format=spec.format)
