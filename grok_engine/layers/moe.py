"""The feed-forward block: experts, a dense one, or both side by side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import grok_kernels
from grok_engine.config import ActFormat, ModelConfig

from .norm import Normed
from .weight import Table, Weight


class Router(Table):
    """weight_ED in fp32 to each token's experts."""

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__(name, config.num_experts, config.d_model)
        self.config = config

    def forward(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """Expert weights (T, A) fp32 and experts (T, A) int32; with the rows grouped by expert, as `moe` takes them, where
        that is one pass here and `moe` would need another for it."""
        c, fuses = self.config, grok_kernels.fuses("route_and_group", ("route_topk", "moe"), x_TD.device.type)
        route: Callable[..., tuple[Tensor, ...]] = grok_kernels.route_and_group if fuses else grok_kernels.route_topk
        return route(x_TD, self.held(), c.num_experts_per_tok, c.router_softcap, c.renormalize)


def _gated(prefix: str, experts: int, d: int, f: int) -> tuple[Weight, Weight]:
    w13 = Weight(experts, d, {f"{prefix}.gate": f, f"{prefix}.up": f})
    return w13, Weight(experts, f, {f"{prefix}.down": d})


def _layer(
    x: Normed, routing: tuple[Tensor, ...], w13: Weight, w2: Weight, activation: str, activations: ActFormat
) -> Tensor:
    """routing: as a router gives it."""
    weights_TA, experts_TA, *grouping = routing
    weights = *w13.held(), *w2.held()
    if x.quantized is None:
        return grok_kernels.moe(x.x_TD, weights_TA, experts_TA, *weights, activation, activations, *grouping)
    q_TD, scale = x.quantized
    return grok_kernels.moe_fp8(
        q_TD, scale, weights_TA, experts_TA, *weights, activation, x.x_TD.dtype, *grouping
    )  # fmt: skip


class Experts(nn.Module):
    """Σ over a token's experts of weight · down(act(gate x) * up x); both products' rows rounded to `activations`."""

    def __init__(self, config: ModelConfig, prefix: str, activations: ActFormat) -> None:
        super().__init__()
        self.activation, self.activations = config.activation, activations
        self.router = Router(f"{prefix}.router", config)
        self.w13, self.w2 = _gated(prefix, config.num_experts, config.d_model, config.d_ff)
        self._steps = (self.router, self.w13, self.w2)  # found sooner than by name

    def forward(self, x: Normed) -> Tensor:
        router, w13, w2 = self._steps
        return _layer(x, router(x.x_TD), w13, w2, self.activation, self.activations)


class Dense(nn.Module):
    """down(act(gate x) * up x): one expert that every token takes whole."""

    def __init__(self, config: ModelConfig, prefix: str, activations: ActFormat) -> None:
        super().__init__()
        self.activation, self.activations = config.activation, activations
        self.w13, self.w2 = _gated(prefix, 1, config.d_model, config.dense_d_ff)

    def forward(self, x: Normed) -> Tensor:
        tokens, device = x.x_TD.shape[0], x.x_TD.device
        ones_T1 = torch.ones((tokens, 1), device=device)
        zeros_T1 = torch.zeros((tokens, 1), dtype=torch.int32, device=device)
        return _layer(x, (ones_T1, zeros_T1), self.w13, self.w2, self.activation, self.activations)


class DenseAndExperts(nn.Module):
    """(dense(x) + experts(x)) / √2."""

    def __init__(self, config: ModelConfig, dense: str, experts: str, activations: ActFormat) -> None:
        super().__init__()
        self.dense, self.experts = Dense(config, dense, activations), Experts(config, experts, activations)

    def forward(self, x: Normed) -> Tensor:
        y_TD: Tensor = ((self.dense(x).float() + self.experts(x).float()) / math.sqrt(2)).to(x.x_TD.dtype)
        return y_TD


def feed_forward(config: ModelConfig, prefix: str, activations: ActFormat = "none") -> nn.Module:
    """The block that `config` describes, its weights named under `prefix`.moe and `prefix`.mlp."""
    if not config.num_experts:
        return Dense(config, f"{prefix}.mlp", activations)
    if not config.dense_d_ff:
        return Experts(config, f"{prefix}.moe", activations)
    return DenseAndExperts(config, f"{prefix}.mlp", f"{prefix}.moe", activations)
