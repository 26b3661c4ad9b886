"""Plain calls on the CPU that are known go straight to their kernel; nothing else about a call may change by that."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import grok_kernels
from grok_kernels import registry
from tests.kernels.cases import CASES, Case, of, randn

STATUS = grok_kernels.backends()["rms_norm"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
X, W = randn(3, 8), randn(8, seed=1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENV, raising=False)
    monkeypatch.setattr(registry, "_known", {})


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops whose selection was asked for: those calls that went the whole way."""
    asked: list[str] = []
    select = registry.select

    def watched(op: str, args: tuple[Any, ...]) -> registry.Kernel:
        asked.append(op)
        return select(op, args)

    monkeypatch.setattr(registry, "select", watched)
    return asked


@pytest.mark.parametrize("c", CASES, ids=str)
def test_a_known_call_gives_the_same_and_is_not_checked_again(c: Case, dispatched: list[str]) -> None:
    results = [c.function(**c.build()) for _ in range(3)]
    assert dispatched == [c.op, c.op]  # by the first call, and to remember it
    for result in results[1:]:
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (results[0], result)), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("c", CASES, ids=str)
def test_errors_come_after_a_good_call_too(c: Case) -> None:
    c.function(**c.build())
    tensors = [name for name, value in c.build().items() if isinstance(value, Tensor)]
    for name in tensors:
        for wrong in (lambda t: t.double(), lambda t: t[None], lambda t: t.to("meta")):
            args = c.build()
            args[name] = wrong(args[name])
            if args[name].is_meta and len(tensors) == 1:
                continue
            with pytest.raises(ValueError, match=f"{c.op}: "):
                c.function(**args)
        args = c.build()
        if args[name].dim() > 1:
            args[name] = args[name].transpose(-1, -2).contiguous().transpose(-1, -2)  # alike but for its strides
        if args[name].stride(-1) != 1:
            with pytest.raises(ValueError, match="contiguous"):
                c.function(**args)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf"), -1])
def test_numbers_are_checked_each_for_itself(eps: float) -> None:
    for good in (0.0, 1e-5, 1):
        grok_kernels.rms_norm(X, W, good)
    with pytest.raises(ValueError, match="rms_norm: eps="):
        grok_kernels.rms_norm(X, W, eps)


def test_a_tensor_in_place_of_a_number_is_read_each_time() -> None:
    eps = torch.tensor(1e-5)
    for _ in range(2):
        grok_kernels.rms_norm(X, W, eps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps=-1"):
        grok_kernels.rms_norm(X, W, eps.fill_(-1))  # type: ignore[arg-type]


def test_true_is_not_one_and_text_is_itself() -> None:
    signature = registry._signature
    keys = [signature((X, value)) for value in (1, True, 1.0, "1", None, torch.float32, torch.bfloat16, 0.0, -0.0)]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert signature((X, "ab", "c")) != signature((X, "a", "bc"))
    assert signature((X, 2**70)) is None
    assert signature((X, [1])) is None


def test_a_weight_is_keyed_by_its_own_signature() -> None:
    from grok_kernels import _C

    class Weight:
        def __init__(self, signature: object) -> None:
            self.signature = signature

    before = _C.set_weight_type(Weight)
    try:
        a, b = _C.signature((X, Weight(b"a"))), _C.signature((X, Weight(b"b")))
        assert None not in (a, b)
        assert len({a, b, _C.signature((X, "a")), _C.signature((X,))}) == 4
        assert a == _C.signature((X, Weight(b"a")))
        assert _C.signature((X, Weight(b"ab"), "c")) != _C.signature((X, Weight(b"a"), "bc"))
        assert _C.signature((X, Weight(None))) is None
        assert _C.signature((X, type("Other", (Weight,), {})(b"a"))) is None
    finally:
        assert _C.set_weight_type(before) is Weight
    assert _C.signature((X, Weight(b"a"))) is None


def test_a_weight_that_is_new_is_keyed_with_all_else_of_its_call() -> None:
    """It computes its signature in the middle of the call's, which must not lose what came before."""

    def key(x: Tensor, weight: grok_kernels.Weight) -> bytes | None:
        return registry._signature((x, weight, 1.0))

    def new() -> grok_kernels.Weight:
        return grok_kernels.Weight.of(randn(1, 4, 8))

    known = new()
    assert len({key(X, new()), key(X[:2], new()), key(X, known), key(X, known), key(X[:2], known)}) == 2


def test_the_number_of_known_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KNOWN", 5)
    for t in range(1, 40):
        grok_kernels.rms_norm(randn(t, 8), W)
        assert 1 <= len(registry._known) <= 5


def test_a_forced_backend_holds_for_known_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", {})
    for _ in range(2):
        grok_kernels.rms_norm(X, W)
    assert grok_kernels.chosen() == {"rms_norm": ("cpu",)}
    for _ in range(2):
        with grok_kernels.use_backend("reference"):
            grok_kernels.rms_norm(X, W)
        with pytest.raises(NotImplementedError, match="cuda"), grok_kernels.use_backend("cuda"):
            grok_kernels.rms_norm(X, W)
    assert grok_kernels.chosen() == {"rms_norm": ("cpu", "reference")}
    monkeypatch.setenv(registry.ENV, "cuda")
    with pytest.raises(NotImplementedError, match="cuda"):
        grok_kernels.rms_norm(X, W)
    monkeypatch.setenv(registry.ENV, "gpu")
    with pytest.raises(ValueError, match="GROK_KERNELS_BACKEND='gpu'"):
        grok_kernels.rms_norm(X, W)


def test_a_kernel_registered_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    grok_kernels.rms_norm(X, W)
    del registry._kernels["rms_norm", "cpu"]
    registry.register("rms_norm", "cpu")(lambda x, weight, eps: x * 0)
    assert not grok_kernels.rms_norm(X, W).any()
    monkeypatch.setattr(registry, "_missing", {})
    registry.mark_missing("cpu", "gone")
    assert grok_kernels.rms_norm(X, W).any()


def test_what_was_chosen_is_told_by_known_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    grok_kernels.rms_norm(X, W)
    monkeypatch.setattr(registry, "_chosen", {})
    grok_kernels.rms_norm(X, W)
    assert grok_kernels.chosen() == {"rms_norm": ("cpu",)}


def test_gradients_come_after_a_known_call() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            assert not grok_kernels.rms_norm(x, W).requires_grad
    grok_kernels.rms_norm(x, W).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_modes_and_subclasses_see_known_calls(dispatched: list[str]) -> None:
    for _ in range(2):
        grok_kernels.rms_norm(X, W)
    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(f"function {func}")
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(f"dispatch {func}")
            return func(*args, **(kwargs or {}))

    class Sub(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(f"subclass {func}")
            return super().__torch_function__(func, types, args, kwargs or {})

    with Functions():
        grok_kernels.rms_norm(X, W)
    with Dispatch():
        grok_kernels.rms_norm(X, W)
    grok_kernels.rms_norm(X.as_subclass(Sub), W)
    assert [s for s in seen if "rms_norm" in s] == [
        f"{who} grok.rms_norm.default" for who in ("function", "dispatch", "subclass")
    ]
    with FakeTensorMode() as mode:
        fake = grok_kernels.rms_norm(mode.from_tensor(X), mode.from_tensor(W))
    assert type(fake).__name__ == "FakeTensor"
    assert fake.shape == X.shape


def test_a_known_call_is_traced() -> None:
    def function(x: Tensor) -> Tensor:
        return grok_kernels.rms_norm(x, W) + 1

    for _ in range(2):
        expected = function(X)
    traced = torch.fx.experimental.proxy_tensor.make_fx(function)(X)
    assert "grok.rms_norm" in traced.code
    assert torch.equal(traced(X), expected)
    assert torch.equal(torch.vmap(lambda x: x * 2)(function(X)), 2 * expected)


def test_known_calls_from_many_threads() -> None:
    expected = {t: grok_kernels.rms_norm(randn(t, 8), W) for t in range(1, 9)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(200):
            t = (seed + i) % 8 + 1
            if not torch.equal(grok_kernels.rms_norm(randn(t, 8), W), expected[t]):
                wrong.append(t)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_tensors_and_strides_are_known_apart(dispatched: list[str]) -> None:
    wide = randn(3, 16)
    with torch.inference_mode():
        inner = X.clone()
        for x in (X, inner, wide[:, :8], wide[:, 8:], X[:0]):
            a, b = grok_kernels.rms_norm(x, W), grok_kernels.rms_norm(x.contiguous().clone(), W)
            assert torch.equal(a, b)
    assert of("rms_norm")


def test_a_known_call_goes_past_the_dispatcher_and_the_profiler_sees_it() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    grok_kernels.rms_norm(x, weight)  # known from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grok_kernels.rms_norm(x, weight)
    assert [event.name for event in profile.events()] == ["rms_norm"]
