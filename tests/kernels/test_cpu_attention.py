"""rope_store_kv and paged_attention of the native CPU backend: bits, long contexts, odd sizes, and what it refuses.

That both do what their contracts say is tested in test_ops_attention.py, on every backend.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import registry
from tests.kernels.cases import FP8, batch, ints, of, randn
from tests.kernels.oracle import assert_near

OPS = ("rope_store_kv", "paged_attention")
STATUS = grok_kernels.backends()["paged_attention"]["cpu"]
pytestmark = [pytest.mark.skipif(not STATUS.available, reason=STATUS.reason), pytest.mark.usefixtures("isa")]
FLOATS = (torch.float32, torch.bfloat16)
CACHES = (*FLOATS, FP8)
NAN, INF = float("nan"), float("inf")


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype == FP8:
        a, b = a.float(), b.float()
    nan = a.isnan()
    same = a.nan_to_num(0.0).contiguous().view(torch.uint8) == b.nan_to_num(0.0).contiguous().view(torch.uint8)
    return torch.equal(nan, b.isnan()) and bool(same.all())


# rope_store_kv


def stored(backend: str, qkv: list[Tensor], cache_dtype: torch.dtype, t: int, page: int = 4) -> list[Tensor | None]:
    """Turned q, both caches and both scales, after one call."""
    groups, c = qkv[1].shape[1:]
    count = t // page + 2
    caches = [torch.full((count, groups, page, c), 7.0).to(cache_dtype) for _ in range(2)]
    scales = [torch.full((count, groups, page), 7.0) if cache_dtype == FP8 else None for _ in range(2)]
    positions, slots = torch.randperm(t + 3)[:t].int(), torch.randperm(count * page)[:t].int()
    slots[t // 2 :: 7] = -1
    with grok_kernels.use_backend(backend):
        q = grok_kernels.rope_store_kv(*qkv, *caches, positions, slots, grok_kernels.rope_table(t + 3, c, 1e4), *scales)
    return [q, *caches, *scales]


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("t", "heads", "groups", "c"), [(1, 1, 1, 2), (9, 3, 3, 6), (5, 6, 1, 62), (300, 6, 2, 128)])
def test_rope_store_kv_has_the_reference_s_bits(
    t: int, heads: int, groups: int, c: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    fused = randn(t, (heads + 2 * groups) * c + 3, dtype=dtype)[:, 3:]  # unaligned, and rows with gaps
    qkv = [x.unflatten(1, (-1, c)) for x in fused.split((heads * c, groups * c, groups * c), dim=1)]
    results = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        results.append(stored(backend, qkv, cache_dtype, t))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_store_kv_of_extremes(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    x = randn(12, 2, 40, dtype=dtype)
    for t, value in enumerate((NAN, -NAN, INF, -INF, 0.0, -0.0, 3e38, 1e30, 1e-30, 2.0**-100, 2.0**-126)):
        x[t, :, 7] = value
    x[4:6] = 0.0
    results = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(1)
        results.append(stored(backend, [x, x, x], cache_dtype, 12))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_every_bf16_and_every_border_of_e4m3_is_encoded_as_torch_does() -> None:
    """A row whose largest is 448 has the scale 1, so that its numbers are cast as they are."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    ties = (codes[1:] + codes[:-1]) / 2
    borders = torch.cat((codes, ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)))
    values = torch.cat((every[every.abs() <= 448], borders, -borders))
    rows = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    v = torch.nn.functional.pad(rows, (0, 1), value=448.0).unsqueeze(1)
    t = len(v)
    cache, scale = torch.zeros(t, 1, 1, 64).to(FP8), torch.zeros(t, 1, 1)
    where = torch.arange(t, dtype=torch.int32)
    grok_kernels.rope_store_kv(v, v, v, cache.clone(), cache, where * 0, where, torch.ones(1, 64), scale.clone(), scale)
    assert scale.eq(1.0).all()
    assert torch.equal(cache.view(torch.uint8)[:, :, 0], v.to(FP8).view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_of_e4m3_is_decoded_exactly(dtype: torch.dtype) -> None:
    """With a window of 1 a token's result is its own value."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, -1, -1, 33).contiguous().view(FP8)
    scale = torch.ones(256, 1, 1)
    table = torch.arange(256, dtype=torch.int32).flip(0).unsqueeze(1)
    got = grok_kernels.paged_attention(
        randn(256, 1, 33, dtype=dtype), codes.view(torch.uint8).clamp(max=7).view(FP8), codes, table,
        torch.arange(257, dtype=torch.int32), torch.ones(256, dtype=torch.int32), 1, 1.0, window=1,
        k_scale=scale, v_scale=scale,
    )  # fmt: skip
    assert same_bits(got, codes.float().to(dtype).view(256, 1, 33).flip(0) + 0.0)


def rope_args() -> dict[str, Any]:
    return of("rope_store_kv")[0].build()


@pytest.mark.parametrize(
    ("name", "at", "value"), [("positions", 3, -1), ("positions", 4, 11), ("slots", 0, 24), ("slots", 4, -2)]
)
def test_rope_store_kv_refuses_a_place_that_is_not_there_and_writes_nothing(name: str, at: int, value: int) -> None:
    args = rope_args()
    args[name][at] = value
    before = args["k_cache"].clone(), args["v_cache"].clone()
    with pytest.raises(ValueError, match=rf"rope_store_kv: {name}\[{at}\] is {value}, expected"):
        grok_kernels.rope_store_kv(**args)
    assert torch.equal(args["k_cache"], before[0])
    assert torch.equal(args["v_cache"], before[1])


# paged_attention


def attend(b: Any, **flags: Any) -> Tensor:
    return grok_kernels.paged_attention(**{**b.args, "scale": 0.3, **flags})


def exact(b: Any, scale: float = 0.3) -> Tensor:
    """Attention in float64, without pages, softcap, window or temperature."""
    parts, start = [], 0
    for (n, length), k, v in zip(b.lengths, b.keys, b.values, strict=True):
        q = b.args["q"][start : start + n].double()
        start += n
        shared = q.shape[1] // k.shape[1]
        s = scale * torch.einsum("nhc,lhc->hnl", q, k.repeat_interleave(shared, 1))
        hidden = torch.arange(length) > torch.arange(length - n, length)[:, None]
        p = s.masked_fill(hidden, -INF).softmax(-1)
        parts.append(torch.einsum("hnl,lhc->nhc", p, v.repeat_interleave(shared, 1)))
    return torch.cat(parts)


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_contexts_of_many_blocks_and_spans(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    b = batch([(1, 1536), (1, 511), (40, 1100), (1, 1025)], 6, 1, 32, 64, dtype=dtype, cache_dtype=cache_dtype)
    assert_near(attend(b), exact(b).numpy(), rel=5e-6)


@pytest.mark.parametrize("c", [1, 3, 31, 32, 33, 40, 72, 96, 160, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=str)
def test_head_sizes(c: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    b = batch([(5, 70), (1, 3)], 2, 1, c, 5, dtype=dtype, cache_dtype=cache_dtype)
    expected = exact(b, c**-0.5)
    size = expected.abs().max().item()  # of all rows: where C is 1 a row's one number may have cancelled out
    assert_near(attend(b, scale=c**-0.5), expected.numpy(), rel=3e-6, size=size)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (5, 5), (7, 1), (10, 2), (13, 1), (100, 1)])
def test_rows_of_a_tile(heads: int, groups: int) -> None:
    b = batch([(19, 90), (1, 130)], heads, groups, 32, 16, dtype=torch.bfloat16)
    assert_near(attend(b), exact(b).numpy(), rel=5e-6)


FLAGS = {"softcap": 4.0, "window": 700, "temperature_len": 128}


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "flags"])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8), (torch.float32, torch.float32)]
)
def test_a_query_s_bits_depend_on_nothing_but_its_request(
    dtype: torch.dtype, cache_dtype: torch.dtype, flags: dict[str, Any], threads: None
) -> None:
    """In one prompt of 1100, alone, in chunks of any size, beside others, on other pages, on more threads."""
    n = 1100
    b = batch([(1, 30), (n, n), (4, 9)], 6, 2, 32, 16, dtype=dtype, cache_dtype=cache_dtype)
    args = b.args
    torch.set_num_threads(1)
    whole = attend(b, **flags)
    torch.set_num_threads(2)
    assert same_bits(attend(b, **flags), whole)
    whole = whole[1 : n + 1]
    k, v = args["k_cache"], args["v_cache"]
    moved = torch.randperm(len(k), generator=torch.Generator().manual_seed(7))
    k, v = (x.view(torch.uint8)[moved].view(x.dtype) for x in (k, v))
    scales = {x: None if args[x] is None else args[x][moved] for x in ("k_scale", "v_scale")}
    row = moved.argsort()[args["block_table"][1:2, : -(-n // 16)].long()].int()
    chunks = [(0, 1), (63, 64), (64, 65), (700, 701), (1099, 1100), (0, 511), (511, 530), (530, 1100), (1090, 1097)]
    for first, last in chunks:
        q = args["q"][1 + first : 1 + last]
        for count in (1, 2):
            torch.set_num_threads(count)
            got = grok_kernels.paged_attention(
                q, k, v, row, ints(0, last - first), ints(last), last - first, 0.3, **flags, **scales
            )
            assert same_bits(got, whole[first:last]), (first, last, count)


@pytest.mark.parametrize("page", [1, 7, 64, 256])
def test_bits_do_not_depend_on_the_page_size(page: int) -> None:
    lengths = [(1, 600), (70, 133)]
    a, b = (batch(lengths, 4, 2, 32, size, dtype=torch.bfloat16) for size in (16, page))
    assert same_bits(attend(a), attend(b))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_caches_that_are_views(cache_dtype: torch.dtype) -> None:
    """Keys and values in one tensor, page by page and interleaved by place; what lies between is NaN."""
    b = batch([(3, 40), (1, 20)], page=8, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    k, v = b.args["k_cache"], b.args["v_cache"]
    pages, groups, places, c = k.shape
    wide = torch.full((pages, 2, places, groups, c + 5), NAN).to(cache_dtype)
    views = [wide[:, i, :, :, 2 : c + 2].transpose(1, 2) for i in range(2)]
    for view, x in zip(views, (k, v), strict=True):
        view.view(torch.uint8).copy_(x.view(torch.uint8))
    scales = {}
    for name in ("k_scale", "v_scale"):
        x = b.args[name]
        scales[name] = None if x is None else torch.nn.functional.pad(x, (1, 2), value=NAN)[..., 1 : places + 1]
    assert same_bits(attend(b, k_cache=views[0], v_cache=views[1], **scales), attend(b))


def test_nan_of_one_request_stays_there() -> None:
    b = batch([(1, 70), (3, 70), (1, 9)], dtype=torch.bfloat16)
    clean = attend(b)
    for name in ("k_cache", "v_cache"):
        b.args[name][b.args["block_table"][1, 3].item()] = NAN
    got = attend(b)
    assert same_bits(got[[0, 4]], clean[[0, 4]])
    assert got[1:4].isnan().any()


def test_infinite_and_hidden_keys() -> None:
    """A key in the future, or before the window, may be anything finite; one of infinite score is NaN as in torch."""
    b = batch([(2, 20)], 1, 1, 16, 4)
    clean = attend(b, window=4)
    b.args["k_cache"][b.args["block_table"][0, 0].item()] = 3e38
    assert same_bits(attend(b, window=4), clean)
    b.args["q"].fill_(3e38)
    assert attend(b).isnan().all()


BAD = [
    ("block_table", (0, 1), 9, r"block_table\[0, 1\] is 9, expected 0 or more and less than P=6"),
    ("block_table", (1, 0), -1, r"block_table\[1, 0\] is -1"),
    ("query_start", (0,), 1, r"query_start goes from 1 to 5, expected 0 to T=5"),
    ("query_start", (0,), -1, r"query_start\[0\] is -1"),
    ("query_start", (1,), 6, r"query_start\[1\] is 6, expected at least 0 and at most T=5"),
    ("query_start", (2,), 0, r"query_start\[2\] is 0, expected at least 1"),
    ("query_start", (2,), 4, r"query_start goes from 0 to 4, expected 0 to T=5"),
    ("seq_lens", (0,), 9, r"seq_lens\[0\] is 9, expected at least its 1 queries and at most N\*S=8"),
    ("seq_lens", (1,), 3, r"seq_lens\[1\] is 3, expected at least its 4 queries"),
    ("seq_lens", (0,), -5, r"seq_lens\[0\] is -5"),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), BAD, ids=[f"{x[0]}-{x[2]}" for x in BAD])
def test_paged_attention_refuses_what_would_leave_its_memory(
    name: str, at: tuple[int, ...], value: int, message: str
) -> None:
    args = of("paged_attention")[0].build()
    args["window"] = 0
    args[name][at] = value
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        grok_kernels.paged_attention(**args)


@pytest.mark.parametrize("op", OPS)
def test_the_native_ops_check_shapes_and_types_themselves(op: str) -> None:
    """Below grok::, whose checks come first; every tensor wrong in every size, or in type."""
    from grok_kernels import _C

    for c in of(op):
        args = c.build()
        native = getattr(_C, op)
        for name, dims in c.dims.items():
            for i, symbol in enumerate(dims.split()):
                if symbol in ("P", "N", "L", "free") or (name, symbol) in (("q", "T"), ("q", "H")):
                    continue
                if symbol == "S" and not name.endswith("scale"):
                    continue
                wrong = args[name].narrow(i, 0, args[name].shape[i] - 1)
                with pytest.raises(ValueError, match=r"expected|goes from"):
                    native(*{**args, name: wrong}.values())
            with pytest.raises(ValueError, match="expected"):
                native(*{**args, name: args[name].to(torch.float64)}.values())
            with pytest.raises(ValueError, match="expected"):
                native(*{**args, name: args[name].unsqueeze(0)}.values())


def test_the_ops_reach_it_through_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENV, raising=False)
    monkeypatch.setattr(registry, "_chosen", {})
    token = registry._forced.set(None)
    try:
        for op in OPS:
            for c in of(op):
                c.function(**c.build())
    finally:
        registry._forced.reset(token)
    assert grok_kernels.chosen() == dict.fromkeys(sorted(OPS), ("cpu",))


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump")
def test_the_inner_loops_are_vector_instructions() -> None:
    """A compiler that left them scalar would give the same results, some fifteen times slower."""
    from grok_kernels import _C

    dump = ["objdump", "-dC", "--no-show-raw-insn", str(_C.__file__)]
    text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n(?=[0-9a-f]+ <)", text)

    def count(names: str, instruction: str) -> int:
        bodies = [f for f in functions if re.search(rf"::({names})[<(]", f.split("\n", 1)[0])]
        assert bodies
        return sum(len(re.findall(instruction, body)) for body in bodies)

    bf16 = "attend_avx512_bf16|scores_avx512|accumulate_avx512"
    avx2, avx512 = "attend_avx2_bf16|scores_avx2|accumulate_avx2", "scores_f32_avx512|accumulate_f32_avx512"
    for names, register in (
        ("attend_avx2", "ymm"), ("attend_avx512", "zmm"), (avx2, "ymm"), (avx512, "zmm"), (bf16, "zmm")
    ):  # fmt: skip
        assert count(names, rf"vfmadd\w+ps .*%{register}") > 100
        assert count(names, r"vfmadd\w+ss ") == 0
    assert count(bf16, r"vdpbf16ps .*%zmm") >= 4 * sum(range(1, 7))  # 1 to 6 rows by 64 keys
