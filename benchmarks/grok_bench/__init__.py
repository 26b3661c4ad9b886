"""Benchmarks of the kernels and of the engine, and the one format of their results (`schema`).

`contestant` puts a function of yours among the kernels that are measured, `problem` adds an op, `model` the sizes of a
model; `calls` gives what is measured to pytest-benchmark.
"""

from .kernels.calls import calls
from .kernels.contestant import contestant
from .kernels.own import problem
from .kernels.shapes import model

__all__ = ["calls", "contestant", "model", "problem"]
