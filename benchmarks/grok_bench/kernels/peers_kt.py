"""kt-kernel, KTransformers' experts on CPUs: the whole expert layer, in the formats that both have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .contestant import Call, Contestant, register
from .data import BLOCK, Weights
from .moe import Layer, with_silu
from .problems import Problem

MOST = 2048  # tokens of a call, for which it allocates buffers
SPINS = 0.06  # seconds: its threads spin for 50 ms after a call, on cores that the next contestant needs
# By our format: its classes, of which a build has those of its instruction set, the better one first; the columns that
# share a scale; bytes of a weight.
KINDS: dict[str, tuple[tuple[str, ...], int, float]] = {
    "bf16": (("AMXBF16_MOE", "AVX2BF16_MOE"), 0, 2),
    "fp8": (("AMXFP8_MOE", "AVX2FP8_MOE"), BLOCK, 1),
    "int4": (("AVX2GPTQInt4_MOE",), 32, 0.5 + 4 / 32),
    "int4_g128": (("AVX2GPTQInt4_MOE",), 128, 0.5 + 4 / 128),
}


def add() -> None:
    for fmt, (_, _, weight_bytes) in KINDS.items():
        one = Contestant(  # it has no other activation
            name=f"kt-kernel, {fmt}, silu", op="moe", bind=partial(_bind, fmt), devices=("cpu",),
            enters=partial(_enters, fmt), missing=partial(_missing, fmt), instead=with_silu,
            within=_until_quiet, weight_bytes=weight_bytes,
        )  # fmt: skip
        register(one)


def _enters(fmt: str, p: Problem) -> bool:
    return p["format"] == fmt and p.number("tokens") <= MOST


def _missing(fmt: str) -> str:
    try:
        _class(fmt)
    except ModuleNotFoundError:
        return "kt-kernel is not installed: pip install --no-deps --target DIR kt-kernel, then PYTHONPATH=DIR"
    except Exception as error:  # whatever its search for an instruction set raises
        return f"kt-kernel does not load: {(str(error).splitlines() or [''])[0]}"
    return ""


@contextmanager
def _until_quiet() -> Iterator[None]:
    yield
    time.sleep(SPINS)


def _extension() -> Any:
    from kt_kernel import kt_kernel_ext

    return kt_kernel_ext


def _class(fmt: str) -> Any:
    kt_kernel_ext = _extension()
    names = KINDS[fmt][0]
    found = [getattr(kt_kernel_ext.moe, name) for name in names if hasattr(kt_kernel_ext.moe, name)]
    if not found:
        raise LookupError(f"it has none of {', '.join(names)}")
    return found[0]


@cache
def _pool(threads: int) -> Any:
    kt_kernel_ext = _extension()
    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return kt_kernel_ext.CPUInfer(config)


def _planes(w_ENK: Tensor, scale_EGN: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Values and scales of all experts as it takes them."""
    if w_ENK.dtype == torch.int8:
        u_EKN = (w_ENK + 8).mT.int().contiguous()
        words = torch.zeros_like(u_EKN[:, ::8])
        for i in range(8):  # GPTQ's words: eight columns of one output
            words |= u_EKN[:, i::8] << 4 * i
        return words, scale_EGN.float().contiguous()
    # e4m3 has a scale for each block of 128 x 128, ours is constant along K
    blocks = scale_EGN.mT[:, ::BLOCK].expand(-1, -1, w_ENK.shape[2] // columns)
    return w_ENK.contiguous(), blocks.contiguous()


def _layer(fmt: str, topk: int, w2: Weights, w13: Weights) -> Any:
    """The layer with its own copy of the weights."""
    kt_kernel_ext = _extension()
    experts, d, f = w2.values.shape
    pool, columns = _pool(torch.get_num_threads()), KINDS[fmt][1]
    config = kt_kernel_ext.moe.MOEConfig(experts, topk, d, f, 0)
    config.pool, config.max_len = pool.backend_, MOST
    config.quant_config.bits, config.quant_config.group_size = 4 if fmt.startswith("int4") else 8, columns
    kept = []  # until it has copied them
    for name, w, rows in (("gate", w13, slice(f)), ("up", w13, slice(f, None)), ("down", w2, slice(None))):
        values = w.values[:, rows].contiguous()
        planes = _planes(values, w.scale[..., rows], columns) if columns else (values,)
        for plane, tensor in zip(("proj", "scale"), planes, strict=False):
            setattr(config, f"{name}_{plane}", tensor.data_ptr())
            kept.append(tensor)
    layer, order = _class(fmt)(config), torch.arange(experts)
    pool.submit(layer.load_weights_task(order.data_ptr()))
    pool.sync()
    return layer


def _bind(fmt: str, inputs: Layer) -> Call:
    tokens, topk = inputs.experts.shape
    layer = inputs.w13.once(f"kt-kernel {fmt}", partial(_layer, fmt, topk, inputs.w2))
    pool, experts = _pool(torch.get_num_threads()), inputs.experts.long()
    count = torch.tensor([tokens], dtype=torch.int32)

    def run() -> Tensor:
        y_TD = torch.empty_like(inputs.x_TD)
        pointers = [x.data_ptr() for x in (experts, inputs.topk_weights, inputs.x_TD, y_TD)]
        pool.submit(layer.forward_task(count.data_ptr(), topk, *pointers, False))
        pool.sync()
        return y_TD

    return run
