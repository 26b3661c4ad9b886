"""Every op as torch sees it: schema, fake, registration, tracing; by torch's own checks and by compiling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import grok_kernels
from grok_kernels import Weight, registry
from tests.kernels.cases import CASES, FP8, GEMM, MOE, Case, ints, mapped, of, randn, tensors
from tests.kernels.group_weights import FP16, random_weight, spec_of

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")
FP8_SCHEMA = "the schema test multiplies its inputs and results, which torch cannot for e4m3"
SUMMED = "the test adds up all results and differentiates, which torch cannot for 8-bit ones"
DATA_DEPENDENT = "with gradients the reference is traced, and it reads offsets and lengths on the host"
HOST_READS = ("paged_attention", "grouped_gemm", "moe", "moe_fp8")
QUANTISING = ("quantize_fp8", "quantize_int8", "sandwich_norm_fp8")

UP, DOWN = spec_of(("int4_k", 256, 32, FP16), 256), spec_of(("int6_k", 256, 16, FP16), 256)


def _call(op: str, args: dict[str, Any]) -> dict[str, Any]:
    return {**next(c for c in of(op) if c.name == "fp32").build(), "x": randn(5, 256), **args}


GROUP_CASES = [  # formats with two levels of scales, and two formats in one call
    Case("grouped_gemm", "int4_k", GEMM, lambda: _call("grouped_gemm", {"weight": random_weight(UP, 3, 8, 256)})),
    Case(
        "moe", "int4_k-int6_k", MOE,
        lambda: _call("moe", {"w13": random_weight(UP, 3, 512, 256), "w2": random_weight(DOWN, 3, 256, 256)}),
    ),
]  # fmt: skip


def _takes(backend: str, c: Case) -> bool:
    weights = [a for a in c.build().values() if isinstance(a, Weight)]
    return all(weight.format in registry.taken(backend).formats for weight in weights)


def _marks(c: Case, grad: bool, util: str) -> list[pytest.MarkDecorator]:
    fp8 = any(a.dtype == FP8 for a in tensors(c.build()).values())
    if util == "test_schema" and (fp8 or (grad and c.op in ("quantize_fp8", "sandwich_norm_fp8"))):
        return [pytest.mark.skip(reason=FP8_SCHEMA)]
    if util == "test_aot_dispatch_dynamic" and grad:
        if c.op in QUANTISING:
            return [pytest.mark.skip(reason=SUMMED)]
        if c.op in HOST_READS:
            return [pytest.mark.xfail(strict=True, reason=DATA_DEPENDENT)]
    return []


def _checks() -> Iterator[Any]:
    for c in [*CASES, *GROUP_CASES]:
        native = grok_kernels.backends()[c.op]["cpu"].available and c.name != "grouped" and _takes("cpu", c)
        for backend in ("reference", "cpu") if native else ("reference",):
            for grad, util in itertools.product((False, True), UTILS):
                ident = f"{backend}-{c}-{util.removeprefix('test_')}{'-grad' if grad else ''}"
                yield pytest.param(backend, c, grad, util, marks=_marks(c, grad, util), id=ident)


def build(c: Case, grad: bool) -> dict[str, Any]:
    args = c.build()
    if grad:
        for name, a in tensors(args).items():
            if a.is_floating_point() and a.dtype != FP8 and name not in (*WRITTEN, "cos_sin"):
                a.requires_grad_()
    return args


@pytest.mark.parametrize(("backend", "c", "grad", "util"), list(_checks()))
def test_opcheck(backend: str, c: Case, grad: bool, util: str) -> None:
    with grok_kernels.use_backend(backend):
        torch.library.opcheck(c.overload, c.flat(build(c, grad)), test_utils=(util,))


def test_every_op_and_argument_has_a_case() -> None:
    assert {c.op for c in CASES} == set(grok_kernels.backends())
    defined = {n.removeprefix("grok::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("grok::")}
    assert {c.op for c in CASES} == defined
    for c in CASES:
        args = c.build()
        parts = (f"{n}_{part}" for n, a in args.items() if isinstance(a, Weight) for part in ("form", "shape"))
        assert {*args, *parts} == {a.name for a in c.overload._schema.arguments}
        assert {n for n, a in args.items() if isinstance(a, (Tensor, Weight))} == set(c.dims)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_only_caches_are_declared_written_and_only_they_are(c: Case) -> None:
    declared = {a.name for a in c.overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert declared == (set(WRITTEN) if c.op == "rope_store_kv" else set())
    args = c.build()
    before = {n: a.clone() for n, a in tensors(args).items()}
    c.function(**args)
    changed = {n for n, a in tensors(args).items() if not torch.equal(a.view(torch.uint8), before[n].view(torch.uint8))}
    assert changed == {n for n in declared if isinstance(args[n], Tensor)}


@pytest.mark.parametrize("c", CASES, ids=str)
def test_meta_tensors_give_the_shapes_and_types_of_real_ones(c: Case) -> None:
    args = c.build()
    real = c.function(**args)
    meta = c.function(**{n: mapped(a, lambda t: t.to("meta")) for n, a in args.items()})
    real, meta = (x if isinstance(x, tuple) else (x,) for x in (real, meta))
    for a, b in zip(real, meta, strict=True):
        assert b.device.type == "meta"
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("c", [c for c in CASES if c.op in ("rms_norm", "grouped_gemm", "moe")], ids=str)
def test_meta_tensors_are_checked_too(c: Case) -> None:
    meta = {n: mapped(a, lambda t: t.to("meta")) for n, a in c.build().items()}
    with pytest.raises(ValueError, match=f"{c.op}: x has dtype float64"):
        c.function(**{**meta, "x": meta["x"].double()})


# Compiling


def two_norms(x: Tensor, weight: Tensor) -> Tensor:
    h, y = grok_kernels.sandwich_norm(x, grok_kernels.rms_norm(x, weight), weight, weight)
    return h * y


def experts(x: Tensor, router: Tensor, w13: Weight, w2: Weight) -> Tensor:
    weights, chosen = grok_kernels.route_topk(x, router, 2, 30.0)
    return grok_kernels.moe(x, weights, chosen, w13, w2) + x


def grouped(x: Tensor, router: Tensor, weight: Tensor) -> Tensor:
    order, offsets = grok_kernels.group_tokens(grok_kernels.route_topk(x, router, 2)[1], router.shape[0])
    q, scale = grok_kernels.quantize_int8(x[order // 2])
    return grok_kernels.grouped_gemm(q, Weight.of(weight), offsets, scale)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor | Weight, ...]]] = {
    "norms": (two_norms, (randn(16, seed=1),)),
    "moe": (
        experts,
        (randn(4, 16, seed=1), Weight.of(randn(4, 12, 16, seed=2)), Weight.of(randn(4, 16, 6, seed=3))),
    ),
    "grouped": (grouped, (randn(4, 16, seed=1), randn(4, 8, 16, seed=2))),
}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole_and_once_for_every_number_of_tokens(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    function, rest = FUNCTIONS[name]
    counter, frames = CompileCounterWithBackend(compiler), set()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for t in (5, 3, 17):
        x = randn(t, 16, seed=t)
        torch.testing.assert_close(compiled(x, *rest), function(x, *rest))
        frames.add(counter.frame_count)
    assert len(frames) == 1  # whatever the first call took


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_attention_writes_the_caches(compiler: str) -> None:
    """The order of the write and the read after it must hold in the graph."""
    torch._dynamo.reset()
    table = grok_kernels.rope_table(32, 16, 1e4)

    def step(
        q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, starts: Tensor, lengths: Tensor
    ) -> Tensor:
        q = grok_kernels.rope_store_kv(q, k, k, k_cache, v_cache, positions, positions, table)
        pages = torch.arange(8, dtype=torch.int32)[None]
        return grok_kernels.paged_attention(q, k_cache, v_cache, pages, starts, lengths, q.shape[0], 0.25)

    counter, frames = CompileCounterWithBackend(compiler), set()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    caches = [[torch.zeros(8, 2, 4, 16) for _ in range(2)] for _ in range(2)]
    first = 0
    for t in (5, 3, 17):
        args = randn(t, 4, 16, seed=t), randn(t, 2, 16, seed=t + 1)
        rest = torch.arange(first, first + t, dtype=torch.int32), ints(0, t), ints(first + t)
        first += t
        torch.testing.assert_close(compiled(*args, *caches[0], *rest), step(*args, *caches[1], *rest))
        for a, b in zip(*caches, strict=True):
            torch.testing.assert_close(a, b)
        frames.add(counter.frame_count)
    assert caches[0][0].any()
    assert len(frames) == 1  # whatever the first call took


def test_a_compiled_function_trains() -> None:
    torch._dynamo.reset()
    weight = randn(16, seed=1)
    grads = []
    for function in (two_norms, torch.compile(two_norms, fullgraph=True, backend="aot_eager")):
        x = randn(5, 16).requires_grad_()
        function(x, weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_gradients_are_the_reference_s_whatever_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", {})
    args = build(of("rms_norm")[0], True)
    with grok_kernels.use_backend("cuda"):
        grok_kernels.rms_norm(**args).sum().backward()
    assert grok_kernels.chosen() == {"rms_norm": ("reference",)}
    assert args["x"].grad is not None


def test_forward_mode_tangents_are_the_reference_s() -> None:
    x, weight, tangent = randn(5, 16), Weight.of(randn(1, 8, 16, seed=1)), randn(5, 16, seed=2)

    def function(x: Tensor) -> Tensor:
        return grok_kernels.grouped_gemm(grok_kernels.rms_norm(x, randn(16, seed=3)), weight)

    function(x)  # known from now on
    with grok_kernels.use_backend("reference"):
        jacobian = torch.autograd.functional.jacobian(function, x)
    expected = torch.einsum("tnsd,sd->tn", jacobian, tangent)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found, expected)
        planes = tuple(forward_ad.make_dual(plane, plane) for plane in weight.planes)  # y is linear in the weight
        y = grok_kernels.grouped_gemm(x, replace(weight, planes=planes))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, grok_kernels.grouped_gemm(x, weight))
        assert forward_ad.unpack_dual(grok_kernels.grouped_gemm(x, weight)).tangent is None
