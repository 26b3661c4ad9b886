"""From tokens to experts: the router, and the order of rows by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FP32, INT, Checker
from ..dtypes import FLOATS
from .define import op, result


@op()
def route_topk(
    x: Tensor, router: Tensor, k: int, softcap: float = 0.0, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights.

    l = x · routerᵀ in fp32; with a softcap l = softcap · tanh(l / softcap); p = softmax(l) over all E; the k largest p,
    larger first, ties to the lower index; divided by their sum only where renormalize.

    x (T, D) fp32 or bf16; router (E, D) fp32. Returns weights (T, k) fp32 and experts (T, k) int32.
    """
    _check_route("route_topk", x, router, k, softcap)
    return result((x.shape[0], k), torch.float32), result((x.shape[0], k), torch.int32)


@op()
def group_tokens(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the (token, slot) rows by expert, stably: their order, and the offsets at which each expert's rows start.

    experts (T, A) int32 in 0..num_experts−1; the cpu backend refuses others. Returns order (T·A,) int32, whose entry
    i is the flat index t·A + a of the i-th grouped row, and offsets (num_experts + 1,) int32. No host
    synchronisation.
    """
    c = Checker("group_tokens")
    c.tensor("experts", experts, "T A", INT)
    c.at_least("num_experts", num_experts, 1)
    return result((experts.shape[0] * experts.shape[1],), torch.int32), result((num_experts + 1,), torch.int32)


@op()
def route_and_group(
    x: Tensor, router: Tensor, k: int, softcap: float = 0.0, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route_topk` and `group_tokens` of its experts, in one pass: all that `moe` takes beside rows and weights.

    Arguments as for `route_topk`. Returns weights and experts (T, k), order (T·k,) and offsets (E + 1,): bit for bit
    what the backend's two ops return.
    """
    _check_route("route_and_group", x, router, k, softcap)
    t = x.shape[0]
    weights, experts = result((t, k), torch.float32), result((t, k), torch.int32)
    return weights, experts, result((t * k,), torch.int32), result((router.shape[0] + 1,), torch.int32)


def _check_route(name: str, x: Tensor, router: Tensor, k: int, softcap: float) -> None:
    c = Checker(name)
    c.tensor("x", x, "T D", FLOATS)
    c.tensor("router", router, "E D", FP32)
    c.at_least("softcap", softcap, 0.0)
    if not 1 <= k <= c.size("E"):
        c.fail(f"k={k}, expected 1..E={c.size('E')}")
