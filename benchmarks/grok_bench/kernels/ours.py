"""The backends of grok_kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

import grok_kernels

from .attention import plain
from .contestant import Call, Contestant, register
from .data import Weights
from .gemm import Product, parts, quantize
from .moe import Layer
from .problems import OPS, Problem

DEVICES = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


def add() -> None:
    for op in OPS:
        for backend, devices in DEVICES.items():
            packs = backend == "cpu" and op in ("grouped_gemm", "moe")
            one = Contestant(
                name=f"grok_kernels {backend}",
                op=op,
                bind=partial(_bind, op, packs),
                ours=True,
                devices=devices,
                missing=partial(_missing, op, backend),
                within=partial(grok_kernels.use_backend, backend),
                on_request=backend == "reference",  # the definition: right, and not fast
            )
            register(one)
            if op == "paged_attention" and backend != "reference":
                # beside peers that have none: the same work as theirs
                register(replace(one, name=f"{one.name}, no softcap", instead=plain, enters=capped))


def capped(problem: Problem) -> bool:
    m = problem.shape
    return bool(m.attn_softcap or m.attn_temperature_len)


def _missing(op: str, backend: str) -> str:
    status = grok_kernels.backends()[op][backend]
    return "" if status.available else status.reason


def _bind(op: str, packs: bool, inputs: Any) -> Call:
    function = getattr(grok_kernels, op)
    args = inputs.args
    if isinstance(inputs, Product):
        args = (args[0], _weight(inputs.weights, packs), *args[2:])
        if inputs.fmt.endswith("dyn"):
            return partial(_quantized_product, parts(inputs.fmt)[1], args)
    elif isinstance(inputs, Layer):
        own = {id(w.weight): _weight(w, packs) for w in (inputs.w13, inputs.w2)}
        args = tuple(own.get(id(a), a) for a in args)
    return partial(function, *args)


def _weight(weights: Weights, packs: bool) -> grok_kernels.Weight:
    _, n, k = weights.values.shape
    if not packs or not grok_kernels.can_pack(n, k, weights.values.dtype):
        return weights.weight
    return weights.once("grok_kernels", lambda w: w.weight.with_layout("panels"))


def _quantized_product(fmt: str, args: tuple[Any, ...]) -> Tensor:
    x, weight, offsets, _, out = args
    q, x_scale = quantize(x, fmt)
    return grok_kernels.grouped_gemm(q, weight, offsets, x_scale, out)
