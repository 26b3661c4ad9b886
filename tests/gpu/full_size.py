"""Calls of every op at Grok-1's sizes, with tensors made on the device. Rows depend on the seed; weights do not, since
they would not fit into memory twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from grok_kernels.chips import multiplies_fp8

DEVICE = torch.device(os.environ.get("GROK_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
# Divides the sizes, for testing the tests themselves and for a quick first run.
BY = int(os.environ.get("GROK_TEST_SHRINK", 1 if ON_GPU else 48))
D, F, V, X = (size // BY // 128 * 128 for size in (6144, 32768, 131072, 8192))
E, A, H, G, C, PAGE = 8, 2, 48, 8, 128, 16
TOKENS = (1, 8, 64, 1024) if ON_GPU else (1, 3, 9)
KEYS = 4100 if ON_GPU else 70
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
TYPES = {"fp8": FP8, "int8": torch.int8, "bf16": BF16, "none": BF16}

# Bounds of ‖got − reference‖ / ‖reference‖. ROUNDED: both round to bf16, not always alike. SHORT_SUMS: a tensor core
# adds e4m3 products with about 14 bits. TURNED: rows are quantised inside, and a value beside a rounding boundary may
# go to the neighbouring step, a sixteenth away.
EXACT, ROUNDED, SHORT_SUMS, TURNED = 0.0, 2e-3, 4e-3, 1.5e-2


@dataclass(frozen=True)
class Call:
    """`op` with the arguments `make(t, seed)`; `rows` names the arguments that have a row for each token."""

    name: str
    op: str
    make: Callable[[int, int], dict[str, Any]]
    rows: Sequence[str]
    bound: float
    written: Sequence[str] = ()

    def __str__(self) -> str:
        return self.name

    def __call__(self, args: dict[str, Any]) -> tuple[Tensor, ...]:
        """The results, followed by the tensors written in place."""
        found = getattr(grok_kernels, self.op)(**args)
        return (*(found if isinstance(found, tuple) else (found,)), *(args[name] for name in self.written))

    def part(self, args: dict[str, Any], rows: slice) -> dict[str, Any]:
        own = {name: args[name][rows].clone() for name in self.rows if args[name] is not None}
        return {**args, **own}


def _random(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def _normal(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=_random(seed), device=DEVICE).to(dtype)


def _ints(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=_random(seed), device=DEVICE, dtype=torch.int32)


@lru_cache(maxsize=3)  # those of one layer, in one format
def matrices(e: int, n: int, k: int, fmt: str, groups: int, seed: int) -> Weight:
    """(e, n, k), with scales that make a product of normal rows about normal."""
    generator, dtype = _random(seed), TYPES[fmt]
    weight = torch.empty(e, n, k, dtype=dtype, device=DEVICE)
    for matrix in weight:
        if fmt == "int8":
            matrix.copy_(torch.randint(-127, 128, (n, k), generator=generator, device=DEVICE, dtype=torch.int8))
        else:
            size = 64.0 if fmt == "fp8" else k**-0.5
            matrix.copy_((torch.randn(n, k, generator=generator, device=DEVICE) * size).clamp_(-448, 448))
    if fmt == "bf16":
        return Weight.of(weight)
    rms = 73.3 if fmt == "int8" else 64.0
    scale = (torch.rand(e, groups, n, generator=generator, device=DEVICE) + 0.5) / (rms * k**0.5)
    return Weight.of(weight, scale)


def _rows(t: int, k: int, fmt: str, seed: int) -> tuple[Tensor, Tensor | None]:
    x = _normal(t, k, seed=seed)
    if fmt == "none":
        return x, None
    return (grok_kernels.quantize_fp8 if fmt == "fp8" else grok_kernels.quantize_int8)(x, 128)


def experts(t: int, seed: int) -> Tensor:
    """Experts (t, A), distinct for each token, and unevenly chosen."""
    noise = torch.rand(t, E, generator=_random(seed), device=DEVICE) * torch.arange(1, E + 1, device=DEVICE)
    return noise.topk(A).indices.int()


CALLS: list[Call] = []


def call(name: str, *rows: str, op: str = "", bound: float = ROUNDED, written: Sequence[str] = ()) -> Any:
    def add(make: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
        CALLS.append(Call(name, op or name, make, rows, bound, written))
        return make

    return add


@call("rms_norm", "x")
def _(t: int, seed: int) -> dict[str, Any]:
    return {"x": _normal(t, D, seed=seed), "weight": _normal(D, seed=1, dtype=FP32)}


@call("sandwich_norm_fp8", "h", "delta", bound=TURNED)  # y may round to the next bf16, then to the next e4m3
@call("sandwich_norm", "h", "delta")
def _sandwich(t: int, seed: int) -> dict[str, Any]:
    weights = {"post_weight": _normal(D, seed=1, dtype=FP32), "pre_weight": _normal(D, seed=2, dtype=FP32)}
    return {"h": _normal(t, D, seed=seed), "delta": _normal(t, D, seed=seed + 100), **weights}


call("quantize_fp8", "x", bound=EXACT)(lambda t, seed: {"x": _normal(t, D, seed=seed), "group_size": 128})
call("quantize_int8", "x", bound=EXACT)(lambda t, seed: {"x": _normal(t, D, seed=seed), "group_size": 128})


@call("route_and_group", "x")
@call("route_topk", "x")
def _(t: int, seed: int) -> dict[str, Any]:
    return {"x": _normal(t, D, seed=seed), "router": _normal(E, D, seed=1, dtype=FP32) * D**-0.5, "k": A}


call("group_tokens", bound=EXACT)(lambda t, seed: {"experts": experts(t, seed), "num_experts": E})


@call("sample_top_p", "logits", "temperature", "top_p", "uniform", bound=EXACT)
def _(t: int, seed: int) -> dict[str, Any]:
    chance = torch.rand(3, t, generator=_random(seed + 1), device=DEVICE)
    row = {"temperature": chance[0] + 0.5, "top_p": chance[1].clamp(min=0.1), "uniform": chance[2]}
    return {"logits": _normal(t, V, seed=seed, dtype=FP32) * 3, **{name: x.contiguous() for name, x in row.items()}}


def _cache(pages: int, dtype: torch.dtype) -> dict[str, Any]:
    x = [_normal(pages, G, PAGE, C, seed=20 + i) for i in range(2)]
    scales = [torch.rand(pages, G, PAGE, generator=_random(22 + i), device=DEVICE) + 0.5 for i in range(2)]
    if dtype != FP8:
        scales = [None, None]  # type: ignore[list-item]
    return dict(zip(("k_cache", "v_cache", "k_scale", "v_scale"), (*(v.to(dtype) for v in x), *scales), strict=True))


def _rope(dtype: torch.dtype) -> Callable[[int, int], dict[str, Any]]:
    def make(t: int, seed: int) -> dict[str, Any]:
        pages = -(-t // PAGE) + 3
        slots = torch.randperm(pages * PAGE, generator=_random(seed), device=DEVICE)[:t].int()
        slots[-1] = -1
        return {
            "q": _normal(t, H, C, seed=seed), "k": _normal(t, G, C, seed=seed + 1),
            "v": _normal(t, G, C, seed=seed + 2),
            "positions": _ints(8192, t, seed=seed), "slots": slots,
            "cos_sin": grok_kernels.rope_table(8192, C, 1e4, DEVICE), **_cache(pages, dtype),
        }  # fmt: skip

    return make


WRITTEN = ("k_cache", "v_cache")
call("rope_store_kv", "q", "k", "v", "positions", "slots", written=WRITTEN)(_rope(BF16))
# the rotation rounds differently on the two sides, and then a key may go to the next of e4m3's steps
call(
    "rope_store_kv-fp8", "q", "k", "v", "positions", "slots",
    op="rope_store_kv", written=(*WRITTEN, "k_scale", "v_scale"), bound=TURNED,
)(_rope(FP8))  # fmt: skip


def _attention(dtype: torch.dtype, queries: int) -> Callable[[int, int], dict[str, Any]]:
    """With queries == 1, t requests of about KEYS keys with one query each; else one request with t queries."""

    def make(t: int, seed: int) -> dict[str, Any]:
        requests, each = (t, 1) if queries == 1 else (1, t)
        width = -(-KEYS // PAGE) + 1
        pages = min(requests, 16) * width  # requests may share pages
        table = _ints(pages, requests, width, seed=seed)
        lengths = _ints(1, 1, seed=0) + KEYS
        if queries == 1:
            lengths = KEYS - _ints(min(KEYS - 1, 3000), requests, seed=seed + 1)
        return {
            "q": _normal(t, H, C, seed=seed), **_cache(pages, dtype), "block_table": table,
            "query_start": torch.arange(0, t + 1, each, device=DEVICE, dtype=torch.int32), "seq_lens": lengths,
            "max_query_len": each, "scale": C**-0.5, "softcap": 30.0,
        }  # fmt: skip

    return make


for _dtype, _name in ((BF16, ""), (FP8, "-fp8")):
    _rows_of = ("q", "block_table", "seq_lens")
    call(f"paged_attention-decode{_name}", *_rows_of, op="paged_attention")(_attention(_dtype, 1))
    call(f"paged_attention-prefill{_name}", op="paged_attention")(_attention(_dtype, 2))

# rows, weights, groups of their scales
FORMATS = [
    ("none", "int8", 1), ("none", "int8", 8), ("fp8", "fp8", 1), ("none", "fp8", 1), ("none", "bf16", 1),
    ("int8", "int8", 8),
]  # fmt: skip


def _short(rows: str, weights: str) -> bool:
    return rows == weights == "fp8" and (not ON_GPU or multiplies_fp8(DEVICE))


def _dense(n: int, k: int, fmt: tuple[str, str, int], out: torch.dtype) -> Callable[[int, int], dict[str, Any]]:
    def make(t: int, seed: int) -> dict[str, Any]:
        x, x_scale = _rows(t, k, fmt[0], seed)
        return {"x": x, "weight": matrices(1, n, k, fmt[1], fmt[2], 5), "x_scale": x_scale, "out_dtype": out}

    return make


def _experts(n: int, k: int, fmt: tuple[str, str, int]) -> Callable[[int, int], dict[str, Any]]:
    def make(t: int, seed: int) -> dict[str, Any]:
        x, x_scale = _rows(t, k, fmt[0], seed)
        weight = matrices(E, n, k, fmt[1], fmt[2], 6)  # the expert layer's own
        _, offsets = grok_kernels.group_tokens(experts(t, seed)[:, :1].contiguous(), E)
        return {"x": x, "weight": weight, "offsets": offsets, "x_scale": x_scale, "out_dtype": BF16}

    return make


def _moe(fmt: tuple[str, str, int]) -> Callable[[int, int], dict[str, Any]]:
    def make(t: int, seed: int) -> dict[str, Any]:
        weights = torch.rand(t, A, generator=_random(seed + 1), device=DEVICE)
        return {
            "x": _normal(t, D, seed=seed), "topk_weights": weights, "experts": experts(t, seed),
            "w13": matrices(E, 2 * F, D, *fmt[1:], 5), "w2": matrices(E, D, F, *fmt[1:], 6), "act_format": fmt[0],
        }  # fmt: skip

    return make


for _fmt in FORMATS:
    _label = f"{_fmt[0]}x{_fmt[1]}-{_fmt[2]}"
    _bound = SHORT_SUMS if _short(*_fmt[:2]) else ROUNDED
    _turned = TURNED if _short(*_fmt[:2]) else ROUNDED
    call(f"moe-{_label}", "x", "topk_weights", "experts", op="moe", bound=_turned)(_moe(_fmt))
    call(f"down-{_label}", op="grouped_gemm", bound=_bound)(_experts(D, F, _fmt))
    call(f"qkv-{_label}", "x", "x_scale", op="grouped_gemm", bound=_bound)(_dense(X, D, _fmt, BF16))


def _grouped(make: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    def grouped(t: int, seed: int) -> dict[str, Any]:
        args = make(t, seed)
        order, offsets = grok_kernels.group_tokens(args["experts"], E)
        return {**args, "order": order, "offsets": offsets}

    return grouped


for _fmt in (("fp8", "fp8", 1), ("none", "int8", 8)):
    call(f"moe-grouped-{_fmt[1]}", op="moe", bound=TURNED if _short(*_fmt[:2]) else ROUNDED)(_grouped(_moe(_fmt)))


@call("moe_fp8", "x", "x_scale", "topk_weights", "experts", bound=TURNED)
def _moe_fp8(t: int, seed: int) -> dict[str, Any]:
    args = _moe(("fp8", "fp8", 1))(t, seed)
    x, x_scale = grok_kernels.quantize_fp8(args.pop("x"), 128)
    del args["act_format"]
    return {"x": x, "x_scale": x_scale, **args}


call("head", "x", op="grouped_gemm")(_dense(V, D, ("none", "bf16", 1), FP32))
