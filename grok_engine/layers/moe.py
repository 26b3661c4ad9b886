"""The feed-forward block: experts, a dense one, or both side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

import grok_kernels
from grok_engine.config import ActFormat, ModelConfig

from .norm import Normed
from .weight import FusedWeight, NamedTensor


class Router(NamedTensor):
    """weight_ED in fp32, from each token to its experts."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__(name, config.num_experts, config.d_model)
        self.config = config

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """Weights (T, A) fp32 and experts (T, A) int32; also order and offsets, where the router's pass can group
        rows by expert for `moe`."""
        c, fuses = self.config, grok_kernels.fuses("route_and_group", ("route_topk", "moe"), x_TD.device.type)
        route: Callable[..., tuple[Tensor, ...]] = grok_kernels.route_and_group if fuses else grok_kernels.route_topk
        return route(x_TD, self.weight, c.num_experts_per_tok, c.router_softcap, c.renormalize)


class Experts(nn.Module):
    """Σ_a weight_a · down(act(gate x) * up x) over the experts that the router chooses for each token.

    Not routed, it is one expert that every token takes whole. activations: the format to which the rows of both
    products are rounded.
    """

    def __init__(self, config: ModelConfig, prefix: str, activations: ActFormat, *, routed: bool) -> None:
        super().__init__()
        c, self.activation, self.activations = config, config.activation, activations
        experts, f = (c.num_experts, c.d_ff) if routed else (1, c.dense_d_ff)
        self.router = Router(f"{prefix}.router", c) if routed else None
        self.w13 = FusedWeight(experts, c.d_model, {f"{prefix}.gate": f, f"{prefix}.up": f})
        self.w2 = FusedWeight(experts, f, {f"{prefix}.down": c.d_model})

    def forward(self, x: Normed, routed: list[Tensor] | None = None) -> Tensor:
        """routed: gets the router's choice, experts (T, A) int32."""
        topk_weights_TA, experts_TA, *grouping = _whole(x.x_TD) if self.router is None else self.router(x.x_TD)
        if routed is not None and self.router is not None:
            routed.append(experts_TA)
        weights = self.w13.weight, self.w2.weight
        if x.quantized is None:
            return grok_kernels.moe(
                x.x_TD, topk_weights_TA, experts_TA, *weights, self.activation, self.activations, *grouping
            )
        q_TD, scale = x.quantized
        return grok_kernels.moe_fp8(
            q_TD, scale, topk_weights_TA, experts_TA, *weights, self.activation, x.x_TD.dtype, *grouping
        )


def _whole(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts as of a router: all of expert 0."""
    rows = x_TD.shape[0]
    ones_R1, zeros_R1 = _constants(max((rows - 1).bit_length(), 10), x_TD.device)
    return ones_R1[:rows], zeros_R1[:rows]


@cache
def _constants(log2_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones in fp32 and zeros in int32, (rows, 1). Kept, since captured steps go on reading them; a recorded step would
    make its own anew in each layer, by Python between kernels."""
    with torch.inference_mode(False):
        ones_R1 = torch.ones((1 << log2_rows, 1), device=device)
        return ones_R1, torch.zeros_like(ones_R1, dtype=torch.int32)


class DenseAndExperts(nn.Module):
    """(dense(x) + experts(x)) / √2."""

    def __init__(self, dense: Experts, experts: Experts) -> None:
        super().__init__()
        self.dense, self.experts = dense, experts

    def forward(self, x: Normed, routed: list[Tensor] | None = None) -> Tensor:
        return grok_kernels.scaled_sum(self.dense(x), self.experts(x, routed), math.sqrt(2))


def feed_forward(config: ModelConfig, prefix: str, activations: ActFormat = "none") -> nn.Module:
    """The block that `config` describes, its weights named under `prefix`.moe and `prefix`.mlp."""
    dense = Experts(config, f"{prefix}.mlp", activations, routed=False) if config.dense_d_ff else None
    if not config.num_experts:
        assert dense is not None
        return dense
    experts = Experts(config, f"{prefix}.moe", activations, routed=True)
    return DenseAndExperts(dense, experts) if dense else experts
