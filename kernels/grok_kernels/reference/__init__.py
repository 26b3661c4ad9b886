"""The definition of every op in plain torch: what each backend is tested against. Clear before fast."""

from ..formats import FORMATS
from ..registry import set_formats
from . import attention, gemm, moe, norm, quantize, route, sample

__all__ = ["attention", "gemm", "moe", "norm", "quantize", "route", "sample"]

set_formats("reference", tuple(FORMATS))
