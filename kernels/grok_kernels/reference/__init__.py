"""The definition of every op in plain torch: what each backend is tested against. Clear before fast."""

from . import attention, gemm, moe, norm, quantize, route, sample

__all__ = ["attention", "gemm", "moe", "norm", "quantize", "route", "sample"]
