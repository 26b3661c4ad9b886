"""Other people's kernels on a GPU: DeepGEMM, where it is installed.

Written by its published interface and tested with a stand-in; on the chip it has not been timed yet. If the interface
has changed, it is reported as failed, with what it raised.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .contestant import Call, Contestant, register
from .data import BLOCK, Weights
from .gemm import Product

GET = "pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11"


def add() -> None:
    for layout in ("contiguous", "masked"):
        register(
            Contestant(
                name=f"DeepGEMM fp8, {layout}", op="grouped_gemm", bind=partial(_deep_gemm, layout == "masked"),
                devices=("cuda",), formats=("fp8xfp8",), missing=missing, compiles=True,
                prepares_rows=True,
            )
        )  # fmt: skip


@cache
def missing() -> str:
    try:
        import deep_gemm  # noqa: F401
    except Exception as error:  # a build for another torch or CUDA raises what it likes
        return f"DeepGEMM does not load ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}): {GET}"
    return ""


def _blocks(weights: Weights) -> tuple[Tensor, Tensor]:
    """Weights, and scales (E, N / 128, K / 128): ours are the same within a block of outputs and along the inputs."""
    groups = -(-weights.values.shape[2] // BLOCK)
    return weights.values, weights.scale[:, 0, ::BLOCK, None].expand(-1, -1, groups).contiguous()


def _deep_gemm(masked: bool, inputs: Product) -> Call:
    """Rows are padded: each expert's to a multiple of the alignment, or `masked`, every expert's to the largest's."""
    import deep_gemm

    dg: Any = deep_gemm
    rows, device = inputs.rows, inputs.x_MK.device
    assert inputs.quantized is not None
    counts = [b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)]
    block = 64 if masked else int(dg.get_mk_alignment_for_contiguous_layout())
    rooms = [-(-(max(counts) if masked else n) // block) * block for n in counts]
    total = sum(rooms)
    owner = torch.full((total,), -1, dtype=torch.int32, device=device)  # the padding belongs to no expert
    at = torch.empty(rows.total, dtype=torch.long, device=device)
    start = 0
    for e, (n, room) in enumerate(zip(counts, rooms, strict=True)):
        owner[start : start + n] = e
        at[rows.part(e)] = torch.arange(start, start + n, device=device)
        start += room
    q, scale = inputs.quantized
    x = torch.zeros(total, q.shape[1], dtype=q.dtype, device=device)
    x.view(torch.uint8)[at] = q.view(torch.uint8)
    sx = torch.ones(total, scale.shape[1], device=device)
    sx[at] = scale
    weight = inputs.weights.once("DeepGEMM", _blocks)
    out = torch.empty(total, inputs.weights.values.shape[1], dtype=torch.bfloat16, device=device)
    if masked:
        run = getattr(dg, "m_grouped_fp8_gemm_nt_masked", None) or dg.fp8_m_grouped_gemm_nt_masked
        x, sx, by_expert = (t.view(len(rooms), rooms[0], -1) for t in (x, sx, out))
        sizes = torch.tensor(counts, dtype=torch.int32, device=device)
        product = partial(run, (x, sx), weight, by_expert, sizes, max(1, rows.total // len(rooms)))
    else:
        product = partial(dg.m_grouped_fp8_gemm_nt_contiguous, (x, sx), weight, out, owner)

    def call() -> Call:
        product()
        return lambda: out[at]

    return call
