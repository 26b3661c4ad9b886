"""A small valid call of every op, and every way in which one of its tensor arguments can be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from grok_kernels.ops.define import flatten
from tests.kernels import oracle

FP8 = torch.float8_e4m3fn
TIED = (
    "B_plus_1",
    "TA",
    "groups",
    "groups13",
    "groups2",
    "2F",
    "H",
)  # sizes that only one argument has, and that are checked all the same


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def mapped(a: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with every tensor in it changed: itself, or a weight's planes."""
    if isinstance(a, Weight):
        return Weight(a.format, a.layout, a.shape, tuple(map(change, a.planes)))
    return change(a) if isinstance(a, Tensor) else a


def copied(weight: Weight) -> Weight:
    copy: Weight = mapped(weight, Tensor.clone)
    return copy


def tensors(args: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor among the arguments, the planes of weights too, by name."""
    found = {n: a for n, a in args.items() if isinstance(a, Tensor)}
    for n, a in args.items():
        if isinstance(a, Weight):
            found.update({f"{n}.{i}": plane for i, plane in enumerate(a.planes)})
    return found


@dataclass(frozen=True)
class Case:
    """A valid call: the arguments in their order, and the dimensions of each tensor or weight among them."""

    op: str
    name: str
    dims: dict[str, str]
    build: Callable[[], dict[str, Any]] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.grok, self.op).default

    def flat(self, args: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments as torch's schema has them."""
        return tuple(flatten(self.op, tuple(args.values())))

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(grok_kernels, self.op)  # type: ignore[no-any-return]


CASES: list[Case] = []


def case(op: str, name: str = "fp32", **dims: str) -> Callable[[Callable[[], dict[str, Any]]], Any]:
    def add(build: Callable[[], dict[str, Any]]) -> None:
        CASES.append(Case(op, name, dims, build))

    return add


@case("rms_norm", x="T D", weight="D")
def _() -> dict[str, Any]:
    return {"x": randn(5, 48), "weight": randn(48, seed=1), "eps": 1e-5}


@case("sandwich_norm", h="T D", delta="T D", post_weight="D", pre_weight="D")
def _() -> dict[str, Any]:
    weights = {"post_weight": randn(48, seed=2), "pre_weight": randn(48, seed=3)}
    return {"h": randn(5, 48), "delta": randn(5, 48, seed=1), **weights, "eps": 1e-5}


@case("sandwich_norm", "no_post_weight", h="T D", delta="T D", pre_weight="D")
def _() -> dict[str, Any]:
    weights = {"post_weight": None, "pre_weight": randn(48, seed=3)}
    return {"h": randn(5, 48), "delta": randn(5, 48, seed=1), **weights, "eps": 1e-5}


@case("sandwich_norm_fp8", h="T D", delta="T D", post_weight="D", pre_weight="D")
def _() -> dict[str, Any]:
    weights = {"post_weight": randn(200, seed=2), "pre_weight": randn(200, seed=3)}
    return {"h": randn(5, 200), "delta": randn(5, 200, seed=1), **weights, "eps": 1e-5}


CACHE = {"k_cache": "P G S C", "v_cache": "P G S C"}
SCALES = {"k_scale": "P G S", "v_scale": "P G S"}


def _caches(dtype: torch.dtype) -> dict[str, Any]:
    return {"k_cache": randn(6, 2, 4, 16, seed=5).to(dtype), "v_cache": randn(6, 2, 4, 16, seed=6).to(dtype)}


def _scales(dtype: torch.dtype) -> dict[str, Any]:
    names = ("k_scale", "v_scale")
    return {n: randn(6, 2, 4, seed=i).abs() if dtype == FP8 else None for i, n in enumerate(names)}


def _rope(dtype: torch.dtype) -> dict[str, Any]:
    qkv = {"q": randn(5, 4, 16), "k": randn(5, 2, 16, seed=1), "v": randn(5, 2, 16, seed=2)}
    where = {"positions": ints(0, 1, 2, 7, 0), "slots": ints(9, 4, -1, 23, 0)}
    table = {"cos_sin": grok_kernels.rope_table(11, 16, 1e4)}
    return {**qkv, **_caches(dtype), **where, **table, **_scales(dtype)}


QKV = {"q": "T H C", "k": "T G C", "v": "T G C", **CACHE, "positions": "T", "slots": "T", "cos_sin": "L C"}
case("rope_store_kv", **{**QKV, "q": "T free C"})(lambda: _rope(torch.float32))
case("rope_store_kv", "fp8", **{**QKV, **SCALES, "q": "T free C"})(lambda: _rope(FP8))


def _attention(dtype: torch.dtype) -> dict[str, Any]:
    requests = {"block_table": ints([3, 1], [5, 0]), "query_start": ints(0, 1, 5), "seq_lens": ints(7, 5)}
    flags = {"max_query_len": 4, "scale": 0.3, "softcap": 5.0, "window": 3, "temperature_len": 4}
    return {"q": randn(5, 4, 16), **_caches(dtype), **requests, **flags, **_scales(dtype)}


ATTENTION = {"q": "T H C", **CACHE, "block_table": "B N", "query_start": "B_plus_1", "seq_lens": "B"}
case("paged_attention", **ATTENTION)(lambda: _attention(torch.float32))
case("paged_attention", "fp8", **ATTENTION, **SCALES)(lambda: _attention(FP8))


def _route() -> dict[str, Any]:
    return {"x": randn(5, 48), "router": randn(6, 48, seed=1), "k": 2, "softcap": 3.0, "renormalize": True}


case("route_topk", x="T D", router="E D")(_route)
case("route_and_group", x="T D", router="E D")(_route)


@case("group_tokens", experts="T A")
def _() -> dict[str, Any]:
    return {"experts": ints([1, 3], [0, 1], [3, 1]), "num_experts": 5}


case("quantize_fp8", x="T D")(lambda: {"x": randn(3, 200), "group_size": 128})
case("quantize_int8", x="T D")(lambda: {"x": randn(3, 200), "group_size": 128})


def fp8(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).to(FP8)


def _gemm(x: Tensor, x_scale: Tensor | None, weight: Weight) -> dict[str, Any]:
    offsets = ints(0, 2, 2, 5)
    return {"x": x, "weight": weight, "offsets": offsets, "x_scale": x_scale, "out_dtype": torch.float32}


GEMM = {"x": "M K", "weight": "E N K", "offsets": "B_plus_1"}
SCALED = {**GEMM, "x_scale": "M groups13"}
case("grouped_gemm", **GEMM)(lambda: _gemm(randn(5, 256), None, Weight.of(randn(3, 8, 256, seed=1))))
case("grouped_gemm", "int8", **SCALED)(
    lambda: _gemm(randint8(5, 256), randn(5, 2).abs(), Weight.of(randint8(3, 8, 256, seed=1), randn(3, 4, 8).abs()))
)
case("grouped_gemm", "fp8", **SCALED)(
    lambda: _gemm(fp8(5, 256), randn(5, 2).abs(), Weight.of(fp8(3, 8, 256, seed=1), randn(3, 1, 8).abs()))
)


def _moe(w13: Weight, w2: Weight, fmt: str) -> dict[str, Any]:
    topk = {"topk_weights": randn(5, 2, seed=1).abs(), "experts": ints([1, 0], [2, 1], [0, 2], [1, 2], [0, 1])}
    own = {"order": None, "offsets": None}
    return {"x": randn(5, 16), **topk, "w13": w13, "w2": w2, "activation": "gelu_tanh", "act_format": fmt, **own}


def _grouped(c: dict[str, Any]) -> dict[str, Any]:
    """The case with `order` and `offsets`, as `group_tokens` returns them for its experts."""
    return {**c, "order": ints(1, 4, 8, 0, 3, 6, 9, 2, 5, 7), "offsets": ints(0, 3, 7, 10)}


MOE = {"x": "T D", "topk_weights": "T A", "experts": "T A", "w13": "E 2F D", "w2": "E D F"}
GROUPED = {"order": "TA", "offsets": "B_plus_1"}
FLOAT = Weight.of(randn(3, 24, 16)), Weight.of(randn(3, 16, 12, seed=2))
case("moe", **MOE)(lambda: _moe(*map(copied, FLOAT), "none"))
case("moe", "int8", **MOE)(
    lambda: _moe(
        Weight.of(randint8(3, 24, 16), randn(3, 4, 24).abs()), Weight.of(randint8(3, 16, 12), randn(3, 4, 16).abs()),
        "int8",
    )
)  # fmt: skip
case("moe", "fp8", **MOE)(
    lambda: _moe(
        Weight.of(fp8(3, 24, 16), randn(3, 1, 24).abs()), Weight.of(fp8(3, 16, 12), randn(3, 1, 16).abs()), "fp8"
    )
)
case("moe", "grouped", **MOE, **GROUPED)(lambda: _grouped(_moe(*map(copied, FLOAT), "none")))


MOE_FP8 = {"x": "T D", "x_scale": "T groups", **{n: dims for n, dims in MOE.items() if n != "x"}}


def _moe_fp8() -> dict[str, Any]:
    w13, w2 = fp8(3, 24, 200), fp8(3, 200, 12)
    c = _moe(Weight.of(w13, randn(3, 1, 24).abs()), Weight.of(w2, randn(3, 1, 200).abs()), "fp8")
    x = {"x": fp8(5, 200), "x_scale": randn(5, 2, seed=3).abs()}
    grouping = {n: c.pop(n) for n in ("order", "offsets")}
    return {**x, **{n: v for n, v in c.items() if n not in ("x", "act_format")}, "out_dtype": torch.float32, **grouping}


case("moe_fp8", "fp8", **MOE_FP8)(_moe_fp8)
case("moe_fp8", "grouped", **MOE_FP8, **GROUPED)(lambda: _grouped(_moe_fp8()))


@case("sample_top_p", logits="B V", temperature="B", top_p="B", uniform="B")
def _() -> dict[str, Any]:
    row = {"temperature": torch.tensor([0.0, 0.5, 1.0]), "top_p": torch.tensor([0.5, 0.9, 1.0])}
    return {"logits": randn(3, 11), **row, "uniform": torch.tensor([0.1, 0.5, 0.9])}


def of(*ops: str) -> list[Case]:
    return [c for c in CASES if c.op in ops]


def _strided(x: Tensor) -> Tensor:
    """The same values with a last dimension that is not contiguous."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)
    wide[..., ::2].copy_(x)
    return wide[..., ::2]


def _longer(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] += 1
    return torch.zeros(shape, dtype=x.dtype)


def _show(x: Tensor) -> str:
    return str(tuple(x.shape))


def _wrong(c: Case) -> Iterator[tuple[str, str, Any, str]]:
    """Yields (what is wrong, argument, its value, what the message must show)."""
    args = c.build()
    uses = Counter(symbol for dims in c.dims.values() for symbol in dims.split())
    for name, dims in c.dims.items():
        x = args[name]
        if isinstance(x, Weight):
            yield from _wrong_weight(name, x, dims, uses)
            continue
        yield "ndim+1", name, x.unsqueeze(0), _show(x.unsqueeze(0))
        yield "ndim0", name, torch.zeros((), dtype=x.dtype), "()"
        for dim, symbol in enumerate(dims.split()):
            if uses[symbol] > 1 or symbol in TIED:
                longer = _longer(x, dim)
                yield f"size-{symbol}", name, longer, str(longer.shape[dim])
        other = torch.int64 if x.dtype == torch.int32 else torch.float16
        for dtype in (other, torch.float64, torch.bool):
            yield f"dtype-{dtype}", name, torch.zeros(x.shape, dtype=dtype), str(dtype).removeprefix("torch.")
        if len(c.dims) > 1:
            yield "device", name, x.to("meta"), "meta"
        yield "strides", name, _strided(x), str(tuple(_strided(x).stride()))
        yield "str", name, "wrong", "str"
        yield "list", name, [1.0], "list"
        if name != "post_weight":  # the one tensor that is always optional
            yield "None", name, None, "None"
    scalars = [n for n in args if n not in c.dims and not (n.endswith(("_scale", "_weight")) and args[n] is None)]
    for name in scalars:
        yield "type", name, ["wrong"], "['wrong']"


def _wrong_weight(name: str, x: Weight, dims: str, uses: Counter[str]) -> Iterator[tuple[str, str, Any, str]]:
    """What `Weight.of` cannot know: logical sizes and the device. A weight is refused by what its planes are there."""
    scales = [None] * len(x.planes[1:]) or [None]
    for dim, symbol in enumerate(dims.split()):
        if uses[symbol] > 1 or symbol in TIED:
            longer = _longer(x.values, dim)
            if x.scales is not None:
                scales = [torch.ones(longer.shape[0], 1, longer.shape[1])]
            yield f"size-{symbol}", name, Weight.of(longer, *scales), str(longer.shape[dim])
    yield "device", name, mapped(x, lambda t: t.to("meta")), "meta"
    for wrong in (x.values, "wrong", [1.0], None):
        kind = type(wrong).__name__
        yield kind, name, wrong, kind


def refusals(*ops: str) -> list[Any]:
    """Parameters (case, argument, wrong value, what the message must show) for every tensor argument of these ops."""
    return [
        pytest.param(c, name, value, shown, id=f"{c}-{name}-{what}".replace("torch.", ""))
        for c in of(*ops)
        for what, name, value, shown in _wrong(c)
    ]


def assert_refused(c: Case, name: str, value: Any, *shown: str) -> None:
    """The call raises a ValueError with the op, the argument, its value and what was expected, and writes nothing."""
    args = c.build()
    kept = {n: a.clone() for n, a in tensors(args).items()}
    with pytest.raises(ValueError) as caught:
        c.function(**{**args, name: value})
    message = str(caught.value)
    for part in (c.op, name, *shown, "xpected"):
        assert part in message, f"{part!r} is missing from: {message}"
    for n, after in tensors(args).items():
        assert torch.equal(kept[n].view(torch.uint8), after.view(torch.uint8)), f"{n} was written"


@dataclass(frozen=True)
class Batch:
    """Requests over shuffled pages. What no kernel may read is poisoned: NaN, or a page id out of range."""

    args: dict[str, Any]
    lengths: list[tuple[int, int]]  # queries, keys
    keys: list[Tensor]  # of each request, (L, G, C) fp64, as the cache rounds them
    values: list[Tensor]

    def expected(self, **flags: Any) -> Any:
        """The oracle's attention of every request, (T, H, C)."""
        parts, start = [], 0
        for (n, _), k, v in zip(self.lengths, self.keys, self.values, strict=True):
            q_NHC = oracle.f64(self.args["q"][start : start + n])
            parts.append(oracle.attend(q_NHC, k.numpy(), v.numpy(), **flags))
            start += n
        return np.concatenate(parts)


def _fp8_rows(x_LGC: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = oracle.quantize_fp8(x_LGC.flatten(0, 1).numpy(), 0)
    bits = torch.from_numpy(q.view(np.uint8)).view(x_LGC.shape)
    return bits.view(FP8), torch.from_numpy(scale).view(x_LGC.shape[:2])


def batch(
    lengths: list[tuple[int, int]], heads: int = 4, groups: int = 2, c: int = 16, page: int = 4,
    dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None, seed: int = 0,
) -> Batch:  # fmt: skip
    cache_dtype = cache_dtype or dtype
    counts = [-(-length // page) for _, length in lengths]
    total = sum(counts) + 3
    free = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    nan = torch.full((total, groups, page, c), float("nan")).to(cache_dtype)
    caches = {"k": nan, "v": nan.clone()}
    scales = {name: torch.full((total, groups, page), float("nan")) for name in caches}
    table = torch.full((len(lengths), max(counts, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    held: dict[str, list[Tensor]] = {"k": [], "v": []}
    for b, ((_, length), count) in enumerate(zip(lengths, counts, strict=True)):
        pages = [free.pop() for _ in range(count)]
        table[b, :count] = ints(*pages)
        for i, (name, cache) in enumerate(caches.items()):
            x = randn(length, groups, c, seed=seed + 10 * b + i + 1)
            stored, scale = _fp8_rows(x) if cache_dtype == FP8 else (x.to(cache_dtype), torch.ones(length, groups))
            held[name].append(stored.double() * scale.double().unsqueeze(-1))
            for j in range(length):
                cache.view(torch.uint8)[pages[j // page], :, j % page] = stored[j].view(torch.uint8)
                scales[name][pages[j // page], :, j % page] = scale[j]
    starts = np.cumsum([0, *(n for n, _ in lengths)]).tolist()
    args = {
        "q": randn(starts[-1], heads, c, seed=seed + 5, dtype=dtype) * 2,
        "k_cache": caches["k"],
        "v_cache": caches["v"],
        "block_table": table,
        "query_start": ints(*starts),
        "seq_lens": ints(*(length for _, length in lengths)),
        "max_query_len": max((n for n, _ in lengths), default=0),
        **{f"{name}_scale": scales[name] if cache_dtype == FP8 else None for name in scales},
    }
    return Batch(args, lengths, held["k"], held["v"])
