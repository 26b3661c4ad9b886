"""The definition of every op in plain torch: what each backend is tested against. Clear before fast."""

from ..formats import FORMATS
from ..registry import Takes, set_takes
from . import attention, gemm, moe, norm, quantize, route, sample

__all__ = ["attention", "gemm", "moe", "norm", "quantize", "route", "sample"]

set_takes("reference", Takes(tuple(FORMATS), fp16_scales=True, mixed=True))
