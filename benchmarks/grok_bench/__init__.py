"""Benchmarks of the kernels and of the engine, and the one format of their results (`schema`).

`contestant` puts a function of yours among the kernels that are measured.
"""

from .kernels.contestant import contestant

__all__ = ["contestant"]
