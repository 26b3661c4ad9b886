"""The fused expert layers, and the attention over pages, of vLLM's build for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .data import BLOCK, Weights
from .peers import BF16_ERROR, INT8_ERROR, load_vllm

FP8, INT8 = "vLLM fused_experts_cpu, fp8, silu", "vLLM fused_experts_cpu, int8 × int8, silu"
SILU_ONLY = (FP8, INT8)
PAGE = 32  # keys
_INT8_W8A8, _FP8_W8A16 = 1, 2  # vLLM's CPUQuantMethod


@dataclass(frozen=True)
class Layer:
    name: str
    pack: Callable[[Weights, Weights], Any]
    run: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # x, weights and experts of each token, packed
    weight_bytes: int
    tolerance: float
    missing: str


def _pack_bf16(*matrices: Weights) -> list[Tensor]:
    packed = []
    for weights in matrices:
        bf16 = weights.bf16()
        packed.append(torch.empty_like(bf16))
        torch.ops._C.prepack_moe_weight(bf16, packed[-1], "vec")
    return packed


def _bf16(x_TD: Tensor, weights_TA: Tensor, experts_TA: Tensor, packed: list[Tensor]) -> Tensor:
    y = torch.empty_like(x_TD)
    op = torch.ops._C.cpu_fused_moe
    op(y, x_TD, *packed, None, None, weights_TA, experts_TA, False, "gelu_tanh", "vec")
    return y


def _pack_quantized(*matrices: Weights) -> list[tuple[Tensor, Tensor]]:
    packed = []
    for weights in matrices:
        scale = weights.scale[:, 0]
        if weights.values.dtype != torch.int8:  # a scale for each block of 128 x 128, here the same along the inputs
            scale = scale[:, ::BLOCK, None].expand(-1, -1, -(-weights.values.shape[2] // BLOCK))
        packed.append((torch.ops._C.convert_weight_packed(weights.values), scale.contiguous()))
    return packed


def _quantized(method: int, block: list[int] | None) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
    def run(x_TD: Tensor, weights_TA: Tensor, experts_TA: Tensor, packed: Any) -> Tensor:
        y = torch.empty_like(x_TD)
        (w13, scale13), (w2, scale2) = packed
        torch.ops._C.fused_experts_cpu(
            y, x_TD, w13, w2, weights_TA, experts_TA, method, scale13, scale2, None, None, None, block,
            None, None, None, None, True,
        )  # fmt: skip
        return y

    return run


@cache
def layers(fmt: str, arithmetic: str) -> tuple[Layer, ...]:
    missing = load_vllm()
    found = [Layer("vLLM cpu_fused_moe, bf16", _pack_bf16, _bf16, 2, BF16_ERROR, missing)]
    if fmt == "fp8":
        run = _quantized(_FP8_W8A16, [BLOCK, BLOCK])
        found.append(Layer(FP8, _pack_quantized, run, 1, BF16_ERROR, missing))
    if arithmetic == "int8":
        found.append(Layer(INT8, _pack_quantized, _quantized(_INT8_W8A8, None), 1, INT8_ERROR, missing))
    return tuple(found)


def pages(k_GLC: Tensor, v_GLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in scattered pages, in the order in which it wants them; and the table of pages."""
    groups, length, c = k_GLC.shape
    cache = torch.zeros(length // PAGE, groups, 2 * PAGE, c, dtype=k_GLC.dtype)
    keys, values = cache.chunk(2, dim=2)
    table = torch.randperm(length // PAGE)
    slots = (table[:, None] * PAGE + torch.arange(PAGE)).flatten()
    k, v = (x.transpose(0, 1).contiguous() for x in (k_GLC, v_GLC))
    torch.ops._C.cpu_attn_reshape_and_cache(k, v, keys, values, slots, "vec", 1.0, 1.0, "auto")
    return keys, values, table.int()[None]


def attention(
    queries: int, keys: int, heads: int, groups: int, c: int, softcap: float
) -> Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Its plan of the work is made here, once, as it makes one for all the layers of a step."""
    starts = torch.tensor([0, queries], dtype=torch.int32)
    lengths = torch.tensor([keys], dtype=torch.int32)
    plan = torch.ops._C.get_scheduler_metadata(
        1, heads, groups, c, lengths, torch.bfloat16, starts, True, -1, "vec", True, None, "auto"
    )

    def attend(q_THC: Tensor, packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        k, v, table = packed
        out = torch.empty_like(q_THC)
        torch.ops._C.cpu_attention_with_kv_cache(
            q_THC, k, v, out, starts, lengths, c**-0.5, True, None, -1, table, softcap, plan,
            None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return attend
