"""From the router's product to experts, weights and grouped rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register
from .invariant import matmul_t


@register("route_topk", "reference")
def route_topk(x_TD: Tensor, router_ED: Tensor, k: int, softcap: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    logits_TE = matmul_t(x_TD.float(), router_ED)
    if softcap:
        logits_TE = softcap * torch.tanh(logits_TE / softcap)
    # a stable sort, because topk leaves the order of ties open
    probs_TE, experts_TE = torch.softmax(logits_TE, -1).sort(dim=-1, descending=True, stable=True)
    weights_TA = probs_TE[:, :k]
    if renormalize:
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
    return weights_TA.contiguous(), experts_TE[:, :k].to(torch.int32).contiguous()


@register("group_tokens", "reference")
def group_tokens(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = experts_TA.flatten()
    order = flat.argsort(stable=True).to(torch.int32)
    counts_E = (flat[:, None] == torch.arange(num_experts, device=flat.device)).sum(0)
    offsets = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0)).to(torch.int32)
    return order, offsets


@register("route_and_group", "reference")
def route_and_group(
    x_TD: Tensor, router_ED: Tensor, k: int, softcap: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights_TA, experts_TA = route_topk(x_TD, router_ED, k, softcap, renormalize)
    return weights_TA, experts_TA, *group_tokens(experts_TA, router_ED.shape[0])
