"""From a problem to its data: which function builds it, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..schema import KernelResult
from . import attention, gemm, moe, rowwise
from .case import Case, seed
from .data import forget
from .problems import Problem

BUILD: dict[str, Callable[[Problem, str, int], Case]] = {
    "rms_norm": rowwise.rms_norm,
    "sandwich_norm": rowwise.sandwich_norm,
    "sandwich_norm_fp8": rowwise.sandwich_norm_fp8,
    "rope_store_kv": rowwise.rope_store_kv,
    "paged_attention": attention.build,
    "route_topk": rowwise.route,
    "route_and_group": rowwise.route,
    "group_tokens": rowwise.group_tokens,
    "quantize_fp8": rowwise.quantize,
    "quantize_int8": rowwise.quantize,
    "grouped_gemm": gemm.build,
    "moe": moe.build,
    "moe_fp8": moe.build,
    "sample_top_p": rowwise.sample_top_p,
}
FOOTPRINT: dict[str, Callable[[Problem], float]] = {
    "paged_attention": attention.footprint,
    "grouped_gemm": gemm.footprint,
    "moe": moe.footprint,
    "moe_fp8": moe.footprint,
}


class TooLarge(ValueError):
    """A problem that the device's memory cannot hold."""


def build(p: Problem, device: str, cold: int = 0, free: float | None = None) -> Case:
    """The data of a problem; successive calls take other data until they have gone through `cold` bytes.

    TooLarge where `free` bytes do not hold it.
    """
    forget(p.op)
    need = cold + (FOOTPRINT[p.op](p) if p.op in FOOTPRINT else 0.0)
    if free is not None and need > free:
        raise TooLarge(f"{p.name} needs {need / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are available")
    seed(p.name)
    try:
        return BUILD[p.op](p, device, cold)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TooLarge(f"{p.name} does not fit on {device}: {str(error).splitlines()[0]}") from None


def work(p: Problem, case: Case) -> KernelResult:
    """The problem as a result has it, before anyone has computed it."""
    return KernelResult(
        problem=p.name, op=p.op, parameters=dict(p.parameters), operations=case.operations, bytes=case.bytes,
        arithmetic=case.arithmetic, tolerance=case.tolerance,
    )  # fmt: skip
