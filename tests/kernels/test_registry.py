"""Which backend serves a call: selection, forcing, refusal, and what can be asked for afterwards."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import grok_kernels
from grok_kernels import registry
from tests.kernels.cases import CASES, Case

OP = "noop"
X = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with its own copies of what the registry holds, no forced backend, and a kernel `noop` or two."""
    monkeypatch.delenv(registry.ENV, raising=False)
    for name in ("_kernels", "_missing"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    for name in ("_chosen", "_late_checks", "_preferred", "_fused"):
        monkeypatch.setattr(registry, name, {})
    registry.register(OP, "reference")(lambda *args: "reference")


def add(backend: str, reason: str | None = None) -> list[Any]:
    """A kernel for `noop`, and the arguments that its `supports` was asked about."""
    asked: list[Any] = []

    def supports(*args: Any) -> str | None:
        asked.append(args)
        return reason

    registry.register(OP, backend, supports)(lambda *args: backend)
    return asked


def test_the_first_that_can_is_taken() -> None:
    assert registry.call(OP, X) == "reference"
    asked = add("cpu")
    assert registry.call(OP, X, 7) == "cpu"
    assert asked == [(X, 7)]
    assert registry.select(OP, (X,)).backend == "cpu"


def test_a_reason_passes_the_call_on_and_a_forced_backend_raises_it() -> None:
    asked = add("cpu", "rows are too short")
    assert registry.call(OP, X) == "reference"
    assert len(asked) == 1
    with pytest.raises(NotImplementedError) as caught, grok_kernels.use_backend("cpu"):
        registry.call(OP, X)
    assert str(caught.value) == "grok::noop on cpu with float32 cannot run: cpu: rows are too short"


def test_kernels_of_other_devices_are_not_asked() -> None:
    asked = add("triton"), add("cuda")
    assert registry.call(OP, X) == "reference"
    assert asked == ([], [])
    assert registry.ORDER["cuda"] == ("cuda", "triton", "reference")
    assert registry.call(OP, X.to("meta")) == "reference"  # a device without an order of its own


def test_where_nothing_can_every_reason_is_given() -> None:
    registry._kernels.pop((OP, "reference"))
    add("cpu", "no")
    message = (
        "grok::noop on cpu with bfloat16 cannot run: cpu: no; reference: the reference backend has no kernel for it"
    )
    with pytest.raises(NotImplementedError) as caught:
        registry.call(OP, X.bfloat16())
    assert str(caught.value) == message


def test_a_missing_backend_says_why() -> None:
    add("cpu")
    registry.mark_missing("cpu", "it was not built")
    assert registry.call(OP, X) == "reference"
    with pytest.raises(NotImplementedError, match="cpu: it was not built"), grok_kernels.use_backend("cpu"):
        registry.call(OP, X)
    assert not grok_kernels.backends()[OP]["cpu"].available


@pytest.mark.parametrize("c", [c for c in CASES if c.name == "fp32"], ids=str)
def test_forcing_a_backend_without_a_kernel_names_op_dtype_device_and_why(c: Case) -> None:
    args = c.build()
    kept = {n: a.clone() for n, a in args.items() if isinstance(a, torch.Tensor)}
    dtype = str(next(iter(kept.values())).dtype).removeprefix("torch.")
    registry._kernels.pop((c.op, "cuda"), None)
    registry._missing.pop("cuda", None)
    message = f"grok::{c.op} on cpu with {dtype} cannot run: cuda: the cuda backend has no kernel for it"
    with pytest.raises(NotImplementedError) as caught, grok_kernels.use_backend("cuda"):
        c.function(**args)
    assert str(caught.value) == message
    assert all(torch.equal(a, args[n]) for n, a in kept.items())


def test_what_is_preferred_can_be_used() -> None:
    """A reason that is looked for late counts, and is looked for only where that backend would be the one."""
    asked: list[str] = []

    def asks(name: str, reason: str) -> Any:
        return lambda: asked.append(name) or reason

    add("cuda"), add("triton")
    registry.register("part", "cuda")(lambda *args: None)
    registry.register("part", "triton")(lambda *args: None)
    registry._missing.clear()
    registry._kernels.pop((OP, "cuda"))
    registry.check_late("cuda", asks("chip", ""), asks("load", ""))
    assert (registry.preferred("part", "cuda"), registry.preferred(OP, "cuda")) == ("cuda", "triton")
    assert not grok_kernels.fuses(OP, ("part",), "cuda")
    assert set(asked) == {"chip", "load"}
    asked.clear()
    registry.check_late("cuda", asks("chip", ""), asks("load", "it does not compile"))
    assert registry.preferred("part", "cuda") == "triton"
    assert grok_kernels.fuses(OP, ("part",), "cuda")
    registry.check_late("cuda", asks("chip", "an old one"), asks("never", ""))
    assert registry.preferred("part", "cuda") == "triton"
    assert "never" not in asked
    asked.clear()
    registry.preferred("part", "cpu")
    assert asked == []
    with grok_kernels.use_backend("cuda"):
        assert registry.preferred("part", "cuda") is None
    asked.clear()
    assert grok_kernels.backends()["route_topk"]["cuda"].reason == "an old one"
    assert set(asked) == {"chip"}  # a table that is shown compiles nothing


def test_arguments_are_checked_before_a_backend_is_looked_for() -> None:
    with pytest.raises(ValueError, match="rms_norm: weight"), grok_kernels.use_backend("cuda"):
        grok_kernels.rms_norm(X, torch.ones(5))


def test_use_backend_nests_and_restores() -> None:
    assert registry.forced_backend() is None
    with grok_kernels.use_backend("cpu"):
        with grok_kernels.use_backend("reference"):
            assert registry.forced_backend() == "reference"
        assert registry.forced_backend() == "cpu"
        with pytest.raises(KeyError), grok_kernels.use_backend("triton"):
            raise KeyError
        assert registry.forced_backend() == "cpu"
    assert registry.forced_backend() is None


def test_use_backend_is_the_thread_s_own() -> None:
    seen: list[str | None] = []
    with grok_kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("name", ["", "gpu", "Reference", "cpu "])
def test_unknown_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "reference, cpu, triton, cuda"
    with pytest.raises(ValueError) as caught, grok_kernels.use_backend(name):
        raise AssertionError("not reached")
    assert str(caught.value) == f"backend={name!r} is not a backend: expected one of {known}"
    with pytest.raises(ValueError, match=f"backend={name!r} is not one of {known}"):
        registry.register(OP, name)
    monkeypatch.setenv(registry.ENV, name)
    if name:
        with pytest.raises(
            ValueError, match=f"GROK_KERNELS_BACKEND={name!r} is not a backend: expected one of {known}"
        ):
            grok_kernels.rms_norm(X, torch.ones(3))
    else:  # an empty variable is an unset one
        assert registry.forced_backend() is None


def test_the_environment_forces_and_use_backend_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    add("cpu")
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "reference")
    assert registry.call(OP, X) == "reference"
    with grok_kernels.use_backend("cpu"):
        assert registry.call(OP, X) == "cpu"
    monkeypatch.setenv("GROK_KERNELS_BACKEND", "triton")
    with pytest.raises(NotImplementedError, match="triton"):
        registry.call(OP, X)


def test_the_environment_in_a_new_process() -> None:
    code = (
        "import torch, grok_kernels as g\n"
        "g.rms_norm(torch.ones(2, 3), torch.ones(3))\n"
        "print(g.chosen())\n"
        "try:\n with g.use_backend('cuda'): g.rms_norm(torch.ones(2, 3), torch.ones(3))\n"
        "except NotImplementedError as e: print(e)\n"
    )
    path = str(Path(grok_kernels.__file__).parents[1])
    env = {**os.environ, "GROK_KERNELS_BACKEND": "reference", "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "{'rms_norm': ('reference',)}" in out
    assert "grok::rms_norm on cpu with float32 cannot run: cuda: " in out


def test_registering_twice_raises_and_keeps_the_first() -> None:
    with pytest.raises(ValueError, match="op 'noop' already has a kernel of backend 'reference'"):
        registry.register(OP, "reference")(lambda *args: "second")
    assert registry.call(OP, X) == "reference"


def test_backends_lists_every_op_and_backend_with_a_reason() -> None:
    table = grok_kernels.backends()
    assert set(table) == {c.op for c in CASES} | {OP}
    for op, row in table.items():
        assert list(row) == ["reference", "cpu", "triton", "cuda"]
        assert row["reference"] == registry.Status(True)
        for backend, status in row.items():
            assert status.available == (status.reason == ""), (op, backend)
    assert table[OP]["cuda"].reason
    add("cpu")
    registry._missing.pop("cpu", None)
    assert grok_kernels.backends()[OP]["cpu"] == registry.Status(True)


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="grok_kernels"):
        yield caplog


def test_what_was_chosen_is_reported_and_logged_once(info: pytest.LogCaptureFixture) -> None:
    assert grok_kernels.chosen() == {}
    for _ in range(3):
        registry.call(OP, X)
    assert grok_kernels.chosen() == {OP: ("reference",)}
    assert info.messages == ["grok::noop on cpu (float32) is served by reference"]
    add("cpu")
    for _ in range(2):
        registry.call(OP, X)
    assert grok_kernels.chosen() == {OP: ("cpu", "reference")}
    assert info.messages[1:] == ["grok::noop on cpu (float32) is served by cpu"]


def test_a_refused_call_counts_as_no_choice(info: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotImplementedError), grok_kernels.use_backend("cuda"):
        registry.call(OP, X)
    assert grok_kernels.chosen() == {}
    assert not info.messages
