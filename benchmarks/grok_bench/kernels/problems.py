"""Every problem by its name, OP/MODEL/PHASE/DETAILS, without its data, which `cases.build` makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import cache, cached_property
from itertools import product

from grok_engine.config import ModelConfig

from .shapes import NAMES, shape, smoke

Value = int | str
TOKENS = tuple(2**i for i in range(15))  # 1 to 16384
DECODE = 256  # tokens of a step that only decodes, at most
BATCHES = TOKENS[:9]
CONTEXTS = tuple(2**i for i in range(7, 18))  # 128 to 131072
PAGES = (16, 64, 256)
KV = ("bf16", "fp8")
ROUTINGS = ("even", "zipf", "one")  # as many rows for each expert; by 1 / rank; all rows on one
# The weights' format, with rows in bf16; with rows quantised beforehand (x); with rows quantised within the time (dyn).
GEMM_FORMATS = ("bf16", "int8", "fp8", "int8xint8", "fp8xfp8", "int8dyn", "fp8dyn")
MOE_FORMATS = ("bf16", "int8", "fp8", "int8dyn", "fp8dyn")


@dataclass(frozen=True)
class Family:
    """The problems of one op that differ in the model and in the values of `axes`; the last axis varies fastest."""

    op: str
    details: str  # of the name, with the axes in braces
    axes: Mapping[str, tuple[Value, ...]]
    phase: str = ""  # "" is decode up to DECODE tokens, and prefill above
    keep: Callable[[Mapping[str, Value]], bool] = lambda values: True

    def __iter__(self) -> Iterator[Problem]:
        for model in NAMES:
            for values in product(*self.axes.values()):
                named = dict(zip(self.axes, values, strict=True))
                if self.keep(named):
                    yield Problem(self, model, tuple(named.items()))


@dataclass(frozen=True)
class Problem:
    """One problem. `problem["tokens"]` is the value of an axis."""

    family: Family
    model: str
    values: tuple[tuple[str, Value], ...]

    @property
    def op(self) -> str:
        return self.family.op

    @property
    def parameters(self) -> dict[str, Value]:
        return {"model": self.model, **dict(self.values)}

    @cached_property
    def name(self) -> str:
        values = dict(self.values)
        phase = self.family.phase or ("decode" if int(values["tokens"]) <= DECODE else "prefill")
        return f"{self.op}/{self.model}/{phase}/{self.family.details.format(**values)}"

    @property
    def shape(self) -> ModelConfig:
        return shape(self.model)

    def __getitem__(self, axis: str) -> Value:
        return dict(self.values)[axis]

    def number(self, axis: str) -> int:
        return int(self[axis])

    def small(self) -> Problem:
        """The same problem at a tiny size, for tests of the benchmark itself."""
        most = {"tokens": 4, "batch": 2, "queries": 4, "context": 256, "page": 16}
        values = ((axis, min(v, most[axis]) if isinstance(v, int) else v) for axis, v in self.values)
        return Problem(self.family, smoke(self.model), tuple(values))


FAMILIES: tuple[Family, ...] = (
    Family("rms_norm", "t{tokens}", {"tokens": TOKENS}),
    Family("sandwich_norm", "t{tokens}", {"tokens": TOKENS}),
    Family("sandwich_norm_fp8", "t{tokens}", {"tokens": TOKENS}),
    Family("rope_store_kv", "{kv}-p{page}-t{tokens}", {"kv": KV, "page": PAGES, "tokens": TOKENS}),
    # one query for each request of the batch
    Family(
        "paged_attention", "{kv}-p{page}-b{batch}-l{context}",
        {"kv": KV, "page": PAGES, "batch": (1, 8, 64, 256), "context": CONTEXTS}, "decode",
    ),
    # the last queries of one request
    Family(
        "paged_attention", "{kv}-p{page}-q{queries}-l{context}",
        {"kv": KV, "page": PAGES, "queries": (128, 512, 2048, 16384), "context": CONTEXTS}, "prefill",
        lambda values: int(values["queries"]) <= int(values["context"]),
    ),
    Family("route_topk", "t{tokens}", {"tokens": TOKENS}),
    Family("route_and_group", "t{tokens}", {"tokens": TOKENS}),
    Family("group_tokens", "{routing}-t{tokens}", {"routing": ROUTINGS, "tokens": TOKENS}),
    Family("quantize_fp8", "t{tokens}", {"tokens": TOKENS}),
    Family("quantize_int8", "t{tokens}", {"tokens": TOKENS}),
    # the experts' matrices, then the dense ones (E = 1)
    Family(
        "grouped_gemm", "{matrix}-{format}-{routing}-t{tokens}",
        {"matrix": ("w13", "w2"), "format": GEMM_FORMATS, "routing": ROUTINGS, "tokens": TOKENS},
    ),
    Family(
        "grouped_gemm", "{matrix}-{format}-t{tokens}",
        {"matrix": ("qkv", "o", "head"), "format": GEMM_FORMATS, "tokens": TOKENS},
    ),
    Family("moe", "{format}-{routing}-t{tokens}", {"format": MOE_FORMATS, "routing": ROUTINGS, "tokens": TOKENS}),
    Family("moe_fp8", "{format}-{routing}-t{tokens}", {"format": ("fp8xfp8",), "routing": ROUTINGS, "tokens": TOKENS}),
    Family("sample_top_p", "b{batch}", {"batch": BATCHES}, "decode"),
)  # fmt: skip
OPS = tuple(dict.fromkeys(family.op for family in FAMILIES))


def _set(template: str, **axes: Sequence[Value]) -> list[str]:
    return [template.format(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


# Named sets. @cpu and @cuda run where no pattern is given, in minutes; the CPU's are sizes that its memory holds.
SETS: dict[str, tuple[str, ...]] = {
    "cpu": (
        *_set("grouped_gemm/{m}/*/w13-{f}-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), f=("int8", "fp8"),
              t=(1, 4, 64, 512, 2048)),
        *_set("grouped_gemm/{m}/*/w13-int8dyn-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), t=(64, 512, 2048)),
        *_set("moe/{m}/*/{f}-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), f=("int8", "fp8", "int8dyn"),
              t=(1, 16, 64, 512)),
        *_set("paged_attention/{m}/decode/bf16-p16-b1-l{n}", m=("grok-1-quarter", "grok-1"), n=(4096, 32768)),
        *_set("paged_attention/{m}/prefill/bf16-p16-q512-l{n}", m=("grok-1-quarter", "grok-1"), n=(4096, 32768)),
        *_set("{op}/grok-1/*/t{t}", op=("rms_norm", "sandwich_norm", "route_topk", "quantize_int8"), t=(1, 64, 1024)),
        *_set("rope_store_kv/grok-1/*/bf16-p16-t{t}", t=(1, 64, 1024)),
        *_set("group_tokens/grok-1/*/zipf-t{t}", t=(64, 1024)),
        *_set("sample_top_p/grok-1/decode/b{b}", b=(1, 16)),
    ),
    "cuda": (
        *_set("grouped_gemm/grok-1/*/{w}-{f}-even-t{t}", w=("w13", "w2"), f=("fp8xfp8", "int8", "bf16"),
              t=(1, 8, 64, 1024, 4096)),
        *_set("grouped_gemm/grok-1/*/w13-fp8xfp8-{r}-t{t}", r=("zipf", "one"), t=(64, 4096)),
        *_set("grouped_gemm/grok-1/*/qkv-{f}-t{t}", f=("fp8xfp8", "bf16"), t=(1, 64, 4096)),
        *_set("moe/{m}/*/{f}-even-t{t}", m=("grok-1", "mixtral-8x7b"), f=("fp8dyn", "int8"), t=(1, 8, 32, 1024, 4096)),
        *_set("moe_fp8/grok-1/*/fp8xfp8-even-t{t}", t=(1, 32, 4096)),
        *_set("paged_attention/grok-1/decode/{kv}-p64-b{b}-l{n}", kv=KV, b=(1, 64), n=(1024, 8192)),
        *_set("paged_attention/grok-1/prefill/{kv}-p64-q2048-l{n}", kv=KV, n=(2048, 32768)),
        *_set("{op}/grok-1/*/t{t}", op=("rms_norm", "sandwich_norm", "sandwich_norm_fp8", "route_topk", "quantize_fp8"),
              t=(1, 256, 4096)),
        *_set("route_and_group/grok-1/*/t{t}", t=(1, 256)),
        *_set("rope_store_kv/grok-1/*/{kv}-p64-t{t}", kv=KV, t=(1, 256, 4096)),
        *_set("group_tokens/grok-1/*/zipf-t{t}", t=(256, 16384)),
        *_set("sample_top_p/grok-1/decode/b{b}", b=(1, 64)),
    ),
    # the first part of `make bench-gpu`, a minute and a half: the most important first
    "cuda-first": (
        *_set("grouped_gemm/grok-1/prefill/{w}-fp8xfp8-even-t4096", w=("w13", "w2")),
        *_set("moe/grok-1/*/fp8dyn-even-t{t}", t=(1, 4, 64, 4096)),
        *_set("paged_attention/grok-1/decode/{kv}-p64-b64-l8192", kv=KV),
        "route_topk/grok-1/decode/t64", "group_tokens/grok-1/decode/zipf-t256", "sample_top_p/grok-1/decode/b64",
        "paged_attention/grok-1/decode/bf16-p64-b1-l8192", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
        *_set("moe/grok-1/*/int8-even-t{t}", t=(1, 64, 4096)),
        *_set("grouped_gemm/grok-1/*/w13-fp8xfp8-{r}", r=("zipf-t4096", "even-t64")),
        *_set("{op}/grok-1/*/t256", op=("rms_norm", "sandwich_norm", "quantize_fp8")),
        "rope_store_kv/grok-1/*/bf16-p64-t256",
    ),
    # the second part, beside peers that compile
    "cuda-compiling": (
        "grouped_gemm/grok-1/prefill/w2-fp8xfp8-even-t4096", "paged_attention/grok-1/decode/bf16-p64-b64-l8192",
        "grouped_gemm/grok-1/decode/w2-fp8xfp8-even-t64", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
    ),
    # the second part, two minutes: every class once, and what decides between kernels
    "cuda-quick": (
        *_set("grouped_gemm/grok-1/*/{w}-fp8xfp8-even-t{t}", w=("w13", "w2"), t=(1, 64, 4096)),
        "grouped_gemm/grok-1/prefill/w13-fp8xfp8-zipf-t4096", "grouped_gemm/grok-1/decode/w13-bf16-even-t64",
        *_set("grouped_gemm/grok-1/*/w13-int8-even-t{t}", t=(1, 64, 4096)),
        *_set("moe/grok-1/*/fp8dyn-even-t{t}", t=(1, 8, 32, 1024, 4096)),
        *_set("moe/grok-1/*/int8-even-t{t}", t=(1, 32)), "moe_fp8/grok-1/decode/fp8xfp8-even-t32",
        *_set("paged_attention/grok-1/decode/bf16-p64-b{b}-l8192", b=(1, 64)),
        "paged_attention/grok-1/decode/fp8-p64-b64-l8192", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
        *_set("route_topk/grok-1/*/t{t}", t=(1, 256, 4096)), "route_and_group/grok-1/decode/t64",
        "group_tokens/grok-1/prefill/zipf-t16384",
        *_set("{op}/grok-1/*/t256", op=("rms_norm", "sandwich_norm", "sandwich_norm_fp8", "quantize_fp8")),
        "rope_store_kv/grok-1/*/bf16-p64-t256", "sample_top_p/grok-1/decode/b64",
    ),
    "quick": (
        "rms_norm/grok-1/decode/t64", "sandwich_norm/grok-1/decode/t64", "rope_store_kv/grok-1/decode/bf16-p16-t64",
        *_set("paged_attention/grok-1-quarter/decode/{kv}-p16-b1-l4096", kv=KV),
        "paged_attention/grok-1-quarter/prefill/bf16-p16-q128-l1024", "route_topk/grok-1/decode/t64",
        "group_tokens/grok-1/decode/zipf-t64", "quantize_fp8/grok-1/decode/t64", "quantize_int8/grok-1/decode/t64",
        "grouped_gemm/mixtral-8x22b-quarter/decode/w2-int8-even-t4", "moe/mixtral-8x22b-quarter/decode/int8-even-t4",
        "sample_top_p/grok-1/decode/b1",
    ),
}  # fmt: skip


@cache
def _every() -> tuple[Problem, ...]:
    return tuple(problem for family in FAMILIES for problem in family)


def select(patterns: Sequence[str]) -> list[Problem]:
    """The problems that match any of the patterns (`*` also matches /), each once, in the order of the patterns.

    ValueError, with what there is, for a pattern that none matches.
    """
    if not patterns:
        return list(_every())
    matches = re.compile("|".join(map(translate, patterns))).match
    any_of = [problem for problem in _every() if matches(problem.name)]
    found: dict[str, Problem] = {}
    for pattern in patterns:
        own = {problem.name: problem for problem in any_of if fnmatchcase(problem.name, pattern)}
        found |= {name: problem for name, problem in own.items() if name not in found}
        if not own:
            raise ValueError(
                f"no problem matches {pattern!r}: names are OP/MODEL/PHASE/DETAILS, of ops {', '.join(OPS)} and models "
                f"{', '.join(NAMES)}; `grok-engine bench list` shows the rest"
            )
    return list(found.values())


def overview() -> str:
    """A summary of all names: each family with the values of its axes."""
    lines = [f"MODEL   {' '.join(NAMES)}", f"PHASE   decode (up to {DECODE} tokens) prefill", ""]
    for family in FAMILIES:
        name = f"{family.op}/MODEL/{family.phase or 'PHASE'}/{family.details}"
        lines.append(f"{name}   {sum(1 for _ in family):,} problems")
        lines += [f"    {axis:8} {' '.join(map(str, values))}" for axis, values in family.axes.items()]
    return "\n".join(lines)
