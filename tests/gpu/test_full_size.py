"""Every op of every backend for a GPU at the sizes of one layer of Grok-1: against the reference on the same device,
a row alone and among others, and captured in a CUDA graph that is replayed with other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import tuning
from grok_kernels.chips import Chip, chip_of
from grok_kernels.tuning import Gemm, default_gemm
from tests.gpu.full_size import BF16, CALLS, DEVICE, EXACT, FP8, FP32, ON_GPU, TOKENS, Call, experts, matrices
from tests.gpu.full_size import D as WIDTH
from tests.gpu.full_size import E as EXPERTS

BACKENDS = ("triton", "selected")  # what is selected is the cuda backend where it takes the call
over_calls = pytest.mark.parametrize("c", CALLS, ids=str)
over_backends = pytest.mark.parametrize("backend", BACKENDS)
MOST = max(TOKENS)


@contextmanager
def serving(backend: str) -> Iterator[None]:
    with nullcontext() if backend == "selected" else grok_kernels.use_backend(backend):
        yield


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def copied(args: dict[str, Any], names: Any = None) -> dict[str, Any]:
    """The tensors of `names`, or all that are small, apart from their originals."""
    return {
        name: x.clone() if isinstance(x, Tensor) and (name in names if names else x.nbytes < 1 << 28) else x
        for name, x in args.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def distance(got: Tensor, expected: Tensor) -> float:
    if got.dtype in (torch.int32, torch.int64):
        return float((got != expected).sum())
    a, b = got.float(), expected.float()
    assert torch.equal(a.isfinite(), b.isfinite())
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-30))


@over_calls
@over_backends
@pytest.mark.parametrize("t", TOKENS)
def test_as_the_reference(t: int, backend: str, c: Call) -> None:
    if c.name.startswith("paged_attention-decode") and t > 64:
        pytest.skip("the reference goes through the requests one by one, for minutes")
    args = c.make(t, 1)
    with serving(backend):
        got = c(copied(args, c.written or ("",)))
    with grok_kernels.use_backend("reference"):
        expected = c(copied(args, c.written or ("",)))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if c.bound == EXACT:
            assert same_bits(a, b)
        else:
            assert distance(a, b) <= (0 if a.dtype == torch.int32 else c.bound)


@over_calls
@over_backends
def test_a_row_has_the_same_bits_alone_and_among_others(backend: str, c: Call) -> None:
    """So the variants of a kernel for few rows and for many, where both serve, give the same."""
    if not c.rows:
        pytest.skip("its rows are not independent, or are told apart by other arguments")
    args = c.make(MOST, 1)
    with serving(backend):
        whole = c(copied(args, c.written or ("",)))[
            : {"sandwich_norm": 2, "sandwich_norm_fp8": 4, "route_topk": 2, "route_and_group": 2}.get(c.op, 1)
        ]
        for rows in (slice(0, 1), slice(0, 8), slice(0, 64), slice(0, 65), slice(MOST // 3, MOST // 3 + 5)):
            own = c.part(copied(args, c.written or ("",)), rows)
            if c.op == "paged_attention":
                own["query_start"] = args["query_start"][: len(own["q"]) + 1]
            for a, b in zip(c(own), whole, strict=False):
                assert same_bits(a, b[rows]), rows


@over_backends
@pytest.mark.parametrize("fmt", ["fp8", "int8", "bf16"])
def test_an_expert_s_row_has_the_same_bits_with_any_number_of_others(fmt: str, backend: str) -> None:
    name = {"fp8": "down-fp8xfp8-1", "int8": "down-nonexint8-8", "bf16": "down-nonexbf16-1"}[fmt]
    c = next(c for c in CALLS if c.name == name)
    args = c.make(MOST, 1)
    bounds = args["offsets"].tolist()
    with serving(backend):
        (whole,) = c(args)
        for e in range(EXPERTS):
            for count in (1, 7, 64, 65):
                lo, hi = bounds[e], min(bounds[e] + count, bounds[e + 1])
                if lo == hi:
                    continue
                offsets = torch.zeros_like(args["offsets"])
                offsets[e + 1 :] = hi - lo
                own = {**args, "x": args["x"][lo:hi], "offsets": offsets}
                own["x_scale"] = None if args["x_scale"] is None else args["x_scale"][lo:hi]
                (alone,) = c(own)
                assert same_bits(alone, whole[lo:hi]), (e, count)


@over_backends
@pytest.mark.parametrize("queries", [1, 5, 17])
@pytest.mark.parametrize("pages", ["", "-fp8"])
def test_a_query_has_the_same_bits_in_a_prompt_a_chunk_and_alone(pages: str, queries: int, backend: str) -> None:
    """A prompt's queries, divided into requests of so many; a single query is decoded, by another kernel. All are
    compared, since another order of additions rounds to another bf16 only once in ten thousand times."""
    c = next(c for c in CALLS if c.name == f"paged_attention-prefill{pages}")
    args = c.make(MOST, 1)
    requests = MOST // queries
    count, before = requests * queries, int(args["seq_lens"][0]) - MOST
    with serving(backend):
        (whole,) = c(args)
        starts = torch.arange(0, count + 1, queries, dtype=torch.int32, device=DEVICE)
        own = {**args, "q": args["q"][:count], "max_query_len": queries, "query_start": starts}
        own["seq_lens"] = before + starts[1:]
        own["block_table"] = args["block_table"].expand(requests, -1).contiguous()
        assert same_bits(c(own)[0], whole[:count])


def captured(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The run as a CUDA graph."""
    if not ON_GPU:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


@over_calls
@over_backends
@pytest.mark.parametrize("t", TOKENS[1:])
def test_in_a_graph_with_other_inputs(t: int, backend: str, c: Call) -> None:
    """With other rows, routing, lengths and pages than it was captured with; what the host read then would show."""
    first, second = c.make(t, 1), c.make(t, 2)
    held = {name: x for name, x in first.items() if isinstance(x, Tensor) and x is not second[name]}
    with serving(backend):
        expected = [r.clone() for r in c(copied(second, c.written or ("",)))]
        replay = captured(lambda: c(first))
        for _ in range(2):
            for name, x in held.items():
                x.copy_(second[name])
            for got, b in zip(replay(), expected, strict=True):
                assert same_bits(got, b)


def few_rows(n: int, k: int, dot: str, weight: torch.dtype, chip: Chip, rows: int, *, pair: bool = False) -> Gemm:
    return default_gemm(dot, weight, chip, few=rows <= tuning.FEW_ROWS, pair=pair)


@pytest.mark.parametrize(
    "fmt", [("fp8", "fp8", 1), ("none", "int8", 8), ("none", "bf16", 1), ("int8", "int8", 8)], ids=str
)
@pytest.mark.parametrize("tiles", ["tuned", "default"])
def test_variants_of_triton_s_products(tiles: str, fmt: tuple[str, str, int], request: pytest.FixtureRequest) -> None:
    """The tiles that a tuned file lets serve together, and the defaults, of which only one serves until then."""
    from grok_kernels.triton import gemm as module

    if tiles == "tuned" and not tuning._tuned(chip_of(DEVICE).name):
        pytest.skip(f"no tuned/{chip_of(DEVICE).name}.json: `python -m grok_kernels.autotune` makes one")
    if tiles == "default":
        request.applymarker(pytest.mark.xfail(reason="the autotuner then keeps them apart, and nothing relies on it"))
    c = next(c for c in CALLS if c.name == f"moe-{fmt[0]}x{fmt[1]}-{fmt[2]}")
    args = c.make(MOST, 3)
    with serving("triton"), patch.object(module, "gemm", few_rows if tiles == "default" else module.gemm):
        (whole,) = c(args)
        for rows in (1, 2, 16, 32, 33):  # 32 tokens are 64 rows
            assert same_bits(c(c.part(args, slice(0, rows)))[0], whole[:rows]), rows


@over_backends
@pytest.mark.parametrize("tokens", TOKENS)
def test_routing_and_grouping_in_one(tokens: int, backend: str) -> None:
    """As the backend's two ops, to the bit, in a graph with other rows; and so is the layer on what it gives."""
    c, layer = (next(c for c in CALLS if c.name == name) for name in ("route_topk", "moe-nonexint8-8"))
    args, other, rest = c.make(tokens, 1), c.make(tokens, 2), layer.make(tokens, 1)
    for name in ("topk_weights", "experts"):
        del rest[name]
    with serving(backend):
        if not grok_kernels.fuses("route_and_group", ("route_topk", "moe"), DEVICE.type):
            pytest.skip("several backends serve these ops, each with bits of its own")
        weights, chosen = c(other)
        expected = (weights, chosen, *grok_kernels.group_tokens(chosen, EXPERTS))
        (whole,) = layer({**rest, "topk_weights": weights, "experts": chosen})

        def both() -> tuple[Tensor, ...]:
            found = grok_kernels.route_and_group(args["x"], args["router"], args["k"])
            named = dict(zip(("topk_weights", "experts", "order", "offsets"), found, strict=True))
            return (*found, *layer({**rest, **named}))

        run = captured(both)
        args["x"].copy_(other["x"])
        for _ in range(2):  # its counter is as it was
            for a, b in zip(run(), (*expected, whole), strict=True):
                assert same_bits(a, b)


@over_backends
def test_rows_of_nan_stay_their_own(backend: str) -> None:
    c = next(c for c in CALLS if c.name == "moe-fp8xfp8-1")
    args = c.make(TOKENS[-2], 1)
    args["x"][2, 5] = float("nan")
    with serving(backend):
        (got,) = c(args)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [2]


@over_backends
@pytest.mark.parametrize("lone", [0, EXPERTS - 1])
def test_all_rows_on_one_pair_of_experts(lone: int, backend: str) -> None:
    """The others' weights are NaN, and not read."""
    c = next(c for c in CALLS if c.name == "moe-nonexbf16-1")
    args = c.make(TOKENS[-2], 1)
    args["experts"][:] = torch.tensor([lone, (lone + 1) % EXPERTS], dtype=torch.int32, device=DEVICE)
    idle = [e for e in range(EXPERTS) if e not in (lone, (lone + 1) % EXPERTS)]
    with grok_kernels.use_backend("reference"):
        (expected,) = c(args)
    try:
        for e in idle:
            args["w13"].values[e], args["w2"].values[e] = float("nan"), float("nan")
        with serving(backend):
            (got,) = c(args)
    finally:
        matrices.cache_clear()  # for the tests to come
    assert distance(got, expected) <= c.bound


def test_every_op_has_a_call() -> None:
    assert {c.op for c in CALLS} == set(grok_kernels.backends())
    assert experts(64, 0).shape == (64, 2)
    assert WIDTH % 128 == 0
    assert {BF16, FP8, FP32} <= {a.dtype for c in CALLS for a in c.make(2, 0).values() if isinstance(a, Tensor)}
