"""The kernels on a CPU, beside this machine's ceilings and other people's kernels: `python -m benchmarks.cpu --help`."""

from . import attention, gemm, moe
from .harness import PROBLEMS, register, run, select

register(*gemm.PROBLEMS, *moe.PROBLEMS, *attention.PROBLEMS)

__all__ = ["PROBLEMS", "run", "select"]
