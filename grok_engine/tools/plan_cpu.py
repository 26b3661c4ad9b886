"""How fast a CPU could decode a model: the bytes that a step reads over a memory bandwidth, nothing loaded.

Bytes are counted from shapes. At a bandwidth that is given, the time is a floor that no engine beats. At rates that
`measure` found, it is what this machine's kernels should reach, as long as the weights are larger than the caches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, get_args

import torch

import grok_kernels
from grok_engine.checkpoint.rows import ROUNDED, rounded_spec
from grok_engine.config import ConfigError, ModelConfig, WeightFormat
from grok_kernels import Spec

from .plan import PlanKV, cached_tokens, check_counts, kv_bytes_per_token

PROBE_BYTES = 1 << 30  # of the weight that `measure` multiplies by: no cache holds it
PROBE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes/s at which weights of the layers, and everything else, are read."""

    layers: float
    other: float
    measured: bool = False

    @classmethod
    def of(cls, bandwidth: float) -> Rates:
        """Both at one bandwidth, in GB/s. ConfigError for what is no positive number."""
        if not 0 < bandwidth < math.inf:
            raise ConfigError(f"cpu={bandwidth!r}: expected the memory bandwidth in GB/s, a positive number")
        return cls(layers=bandwidth * 1e9, other=bandwidth * 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    """Bytes in memory, bytes that one decode step of all requests reads, and its time at `rates`."""

    model: str
    weights: WeightFormat
    head: WeightFormat
    kv: PlanKV
    context: int
    batch: int
    params_total: int
    params_active: int
    weight_bytes: int
    kv_bytes: int
    read_layers: float
    read_head: int
    read_kv: int
    rates: Rates
    step_s: float
    tokens_per_s: float
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON."""
        return asdict(self)


def plan_cpu(
    config: ModelConfig,
    rates: Rates,
    *,
    weights: WeightFormat = "int8",
    head: WeightFormat = "bf16",
    kv: PlanKV = "bf16",
    context: int | None = None,
    batch: int = 1,
) -> CpuPlan:
    """What decoding `batch` requests at `context` tokens each (None: the model's own context) reads and takes.

    Raises ConfigError, with the value and what was expected, for an unknown format and a context or batch out of range.
    """
    c, context = config, config.max_position if context is None else context
    formats, kinds = get_args(WeightFormat), get_args(PlanKV)
    for name, value, known in (("weights", weights, formats), ("head", head, formats), ("kv", kv, kinds)):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
    check_counts(c, context=context, batch=batch)
    expert, rest = _layer(c, weights)
    hit = 1 - (1 - c.num_experts_per_tok / c.num_experts) ** batch if c.num_experts else 0.0
    read_layers = c.num_layers * (hit * c.num_experts * expert + rest)
    read_head = _matrix(head, c.vocab_size, c.d_model)
    read_kv = batch * cached_tokens(c, context) * kv_bytes_per_token(c, kv, c.num_kv_heads)
    step_s = read_layers / rates.layers + (read_head + read_kv) / rates.other
    shared = c.tie_embeddings and head == "bf16"
    return CpuPlan(
        model=c.name, weights=weights, head=head, kv=kv, context=context, batch=batch, params_total=c.param_count(),
        params_active=c.active_param_count(),
        weight_bytes=c.num_layers * (c.num_experts * expert + rest)
        + _matrix("bf16", c.vocab_size, c.d_model) + (0 if shared else read_head),
        kv_bytes=read_kv, read_layers=read_layers, read_head=read_head, read_kv=read_kv, rates=rates, step_s=step_s,
        tokens_per_s=batch / step_s, assumptions=tuple(_assumptions(c, rates)),
    )  # fmt: skip


def _spec(weights: str, k: int) -> Spec:
    return rounded_spec(weights, k) if weights in ROUNDED else Spec(weights)


def _matrix(weights: str, n: int, k: int) -> int:
    """Bytes of a matrix (N, K) with its scales, as a CPU holds it."""
    spec = _spec(weights, k)
    return spec.nbytes("panels" if spec.can_pack(n, k) else "rows", (1, n, k))


def _layer(c: ModelConfig, weights: str) -> tuple[int, int]:
    """Bytes of one expert of a layer, and of the rest of the layer; norms and router are fp32."""

    def feed_forward(width: int) -> int:
        return _matrix(weights, 2 * width, c.d_model) + _matrix(weights, c.d_model, width) if width else 0

    rest = _matrix(weights, c.qkv_dim, c.d_model) + _matrix(weights, c.d_model, c.num_heads * c.head_dim)
    rest += feed_forward(c.dense_d_ff) + 4 * c.d_model * ((4 if c.post_norms else 2) + c.num_experts)
    return feed_forward(c.d_ff), rest


def measure(weights: WeightFormat = "int8", head: WeightFormat = "bf16") -> Rates:
    """The rates at which this machine multiplies one row by weights of these formats, larger than its caches."""
    layers = _rate(weights)
    return Rates(layers=layers, other=layers if head == weights else _rate(head), measured=True)


def _rate(weights: WeightFormat) -> float:
    k = 4096
    spec = _spec(weights, k)
    n = PROBE_BYTES // _matrix(weights, 64, k) * 64
    weight = grok_kernels.Weight.empty(spec, "panels" if spec.can_pack(n, k) else "rows", (1, n, k), "cpu")
    for plane in weight.planes:
        plane.view(torch.uint8).fill_(1)  # pages that were only read would all be the one page of zeros
    x, seconds = torch.zeros(1, k, dtype=torch.bfloat16), list[float]()
    end = time.perf_counter() + PROBE_SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        grok_kernels.grouped_gemm(x, weight)
        seconds.append(time.perf_counter() - began)
    return sum(plane.nbytes for plane in weight.planes) / median(seconds)


def _assumptions(c: ModelConfig, rates: Rates) -> Iterator[str]:
    yield "weights: scales included; bf16 embedding, and a head beside it where it is not the same matrix"
    if rates.measured:
        layers, other = rates.layers / 1e9, rates.other / 1e9
        yield f"rates: measured here, one row by a weight; layers {layers:.1f} GB/s, head and KV {other:.1f} GB/s"
    else:
        yield f"rate: {rates.other / 1e9:.1f} GB/s for every byte, as if no thread ever waited for another"
    yield "time: weights, head and KV of each step; activations, operations and what is in no kernel are not counted"
    yield "it holds for weights larger than the caches, and for few requests: more are bound by operations"
    if c.num_experts:
        e, a = c.num_experts, c.num_experts_per_tok
        yield f"routing: even, so that T tokens read {e}(1 - (1 - {a}/{e})^T) experts"
    yield "decode: every request at its full context"
