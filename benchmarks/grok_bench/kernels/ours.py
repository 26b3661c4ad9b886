"""Every call of grok_kernels that the problems and the contestants make: the one place that knows its signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grok_kernels

from .data import Weights

BACKENDS = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}  # and their devices
WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")  # by rope_store_kv
within = grok_kernels.use_backend  # a context in which one backend is forced
rope_table = grok_kernels.rope_table


def missing(op: str, backend: str) -> str:
    """Why the backend cannot run the op here; empty if it can."""
    status = grok_kernels.backends()[op][backend]
    return "" if status.available else status.reason


def quantize(x_MK: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Rows in int8 or e4m3, with scales (M, K / 128)."""
    return grok_kernels.quantize_int8(x_MK) if fmt == "int8" else grok_kernels.quantize_fp8(x_MK)


def reference(op: str, args: Iterable[Any]) -> Any:
    """The reference's result, of the same values in fp32."""
    exact = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
    with within("reference"):
        return getattr(grok_kernels, op)(*exact)


def arguments(args: Iterable[Any], packs: bool = False) -> tuple[Any, ...]:
    """`args` as the ops take them: each `Weights` becomes a `Weight`, packed where it can be and `packs` is set."""
    return tuple(_weight(a, packs) if isinstance(a, Weights) else a for a in args)


def _weight(weights: Weights, packs: bool) -> grok_kernels.Weight:
    weight = weights.once("rows", lambda w: grok_kernels.Weight.of(**w.planes, format=w.format))
    _, n, k = weight.shape
    if not packs or not weight.spec.can_pack(n, k):
        return weight
    return weights.once("panels", lambda _: weight.with_layout("panels"))


def bind(op: str, backend: str, inputs: Any) -> Callable[[], Any]:
    """One call of `op`. Inputs with a format in `dynamic` are quantised within the call."""
    args = arguments(inputs.args, packs=backend == "cpu" and op != "moe_fp8")
    if fmt := getattr(inputs, "dynamic", ""):
        return partial(_quantized_product, fmt, args)
    return partial(getattr(grok_kernels, op), *args)


def _quantized_product(fmt: str, args: tuple[Any, ...]) -> Tensor:
    x_MK, weight, offsets, _, out_dtype = args
    q_MK, x_scale = quantize(x_MK, fmt)
    return grok_kernels.grouped_gemm(q_MK, weight, offsets, x_scale, out_dtype)


def due(op: str, inputs: Any) -> Any:
    """Tensors without data, of the shapes and dtypes that the op's contract states."""
    stated = getattr(grok_kernels, op).__wrapped__(*arguments(inputs.args))
    several = isinstance(stated[0], tuple) and hasattr(stated[0], "dtype")
    made = [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in (stated if several else (stated,))]
    return made if several else made[0]


def names(op: str) -> list[str]:
    """The names of the arguments of an op."""
    return list(inspect.signature(getattr(grok_kernels, op)).parameters)


def watched(op: str, inputs: Any) -> dict[str, Tensor]:
    """The tensors among the arguments, by their names, but for those that the op writes."""

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, value in zip(names(op), inputs.args, strict=False):
            if isinstance(value, Weights):
                yield from ((f"{name}.{plane}", tensor) for plane, tensor in value.planes.items())
            elif name not in WRITTEN:
                yield name, value

    return {name: x for name, x in tensors() if isinstance(x, Tensor)}


def memory(size: int) -> Tensor:
    """Zeroed bytes of a CPU in huge pages, where packed weights lie."""
    return grok_kernels.weight_memory((size,), torch.int8, "cpu").zero_()


def probes() -> Any:
    """The extension with the CPU's probes of reading and multiplying; None where it was not built."""
    if missing("rms_norm", "cpu"):
        return None
    from grok_kernels import _C

    return _C
