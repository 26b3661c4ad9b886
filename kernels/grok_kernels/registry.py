"""Which backend serves an op: registered kernels, selection at the call, and what was chosen.

A kernel is a backend's function for one op plus a `supports` that looks at the call's arguments and
answers None, or the reason why not. On a device the first backend of `ORDER` whose kernel supports the
call serves it. A backend forced by `use_backend` or by `GROK_KERNELS_BACKEND` serves it or raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

ENV = "GROK_KERNELS_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

Supports = Callable[..., "str | None"]
log = logging.getLogger("grok_kernels")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One backend's implementation of one op."""

    op: str
    backend: str
    fn: Callable[..., Any]
    supports: Supports


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a backend can serve an op on this machine and, where it cannot, why."""

    available: bool
    reason: str = ""


_kernels: dict[tuple[str, str], Kernel] = {}
_missing: dict[str, str] = {}  # backend -> why none of its kernels can run here
_later: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {}  # backend -> as `ask_later` has them
_chosen: dict[str, set[str]] = {}
_forced: ContextVar[str | None] = ContextVar("grok_kernels_backend", default=None)

Key = tuple[str, bytes, "str | None"]  # op, signature, backend that `use_backend` forces

# A decode step is hundreds of calls of a few microseconds each, all like those of the step before: dispatch, checks
# and selection in Python would take longer than many a kernel. So a plain call that passed is known by its signature,
# and goes straight to its kernel when one like it comes. What has no signature (a mode, a tracer, gradients, another
# device, no extension to take one) always goes the whole way.
KNOWN = 4096  # calls kept; then all are forgotten, since working sets are far smaller and a repeated check is cheap
_known: dict[Key, Kernel] = {}
_preferred: dict[tuple[str | None, str], tuple[str | None, ...]] = {}  # as `preferred_all` gives it
_fused: dict[tuple[str | None, str, Sequence[str], str], bool] = {}  # as `fuses` does, asked in every layer of a step


def _no_signature(args: tuple[Any, ...]) -> bytes | None:
    return None


_signature: Callable[[tuple[Any, ...]], bytes | None] = _no_signature


def take_signatures(signature: Callable[[tuple[Any, ...]], bytes | None]) -> None:
    """Use this function: bytes that hold all that checks and selection depend on, or None where the call is not plain."""
    global _signature
    _signature = signature


def shortcut(op: str, args: tuple[Any, ...]) -> tuple[Kernel | None, Key | None]:
    """The kernel of a plain call that is known, and its key; (None, key) for one to `remember` once it has passed."""
    signature = _signature(args)
    if signature is None:
        return None, None
    key = (op, signature, _forced.get())
    kernel = _known.get(key)
    if kernel is not None and kernel.backend not in _chosen.get(op, ()):
        _choose(kernel, args)
    return kernel, key


def remember(key: Key, args: tuple[Any, ...]) -> None:
    """Know this call, which passed all checks, from now on."""
    if len(_known) >= KNOWN:
        _known.clear()
    _known[key] = select(key[0], args)


def register(op: str, backend: str, supports: Supports = lambda *args: None) -> Callable[[Any], Any]:
    """Decorator: the function is `backend`'s kernel for `op`. A second one for the same pair raises.

    `supports` may look at types, shapes, strides, devices and numbers, never at the values in tensors: its answer is
    kept for the calls that are alike.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if (op, backend) in _kernels:
        raise ValueError(f"op {op!r} already has a kernel of backend {backend!r}")

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _kernels[op, backend] = Kernel(op, backend, fn, supports)
        _forget()
        return fn

    return add


def _forget() -> None:
    """What was selected, since there is another choice now."""
    _known.clear()
    _preferred.clear()
    _fused.clear()


def mark_missing(backend: str, reason: str) -> None:
    """Say why no kernel of `backend` can run on this machine, for `backends()` and for errors."""
    _missing[backend] = reason
    _forget()


def ask_later(backend: str, no_chip: Callable[[], str], unusable: Callable[[], str]) -> None:
    """Reasons why `backend` serves nothing here that are not to be looked for at import; "" for none.

    `no_chip` may start a device: `backends()` and `preferred` ask it. `unusable` may compile for minutes: `preferred`
    alone asks, on a device that is about to be used. A call asks its kernel's `supports`.
    """
    _later[backend] = no_chip, unusable
    _forget()


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend: expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend; what it cannot run raises NotImplementedError.

    It holds for this thread or asyncio task. For other threads too, as an AsyncLLM's, set `GROK_KERNELS_BACKEND`.
    """
    token = _forced.set(_check(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced here, by `use_backend` or else by the environment; None selects by device."""
    name = _forced.get()
    if name is None:
        name = os.environ.get(ENV) or None
        if name is not None:
            _check(name, ENV)
    return name


def _why_not(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    if backend in _missing:
        return _missing[backend]
    kernel = _kernels.get((op, backend))
    if kernel is None:
        return f"the {backend} backend has no kernel for it"
    return kernel.supports(*args)


def _place(args: tuple[Any, ...]) -> tuple[str, str]:
    tensor = next(a for a in args if isinstance(a, torch.Tensor))
    return tensor.device.type, str(tensor.dtype).removeprefix("torch.")


def select(op: str, args: tuple[Any, ...]) -> Kernel:
    """The kernel that serves this call of `op`. Raises NotImplementedError where none, or not the forced one, can."""
    device, dtype = _place(args)
    forced = forced_backend()
    reasons = []
    for backend in (forced,) if forced else ORDER.get(device, ("reference",)):
        reason = _why_not(op, backend, args)
        if reason is None:
            kernel = _kernels[op, backend]
            _choose(kernel, args)
            return kernel
        reasons.append(f"{backend}: {reason}")
    raise NotImplementedError(f"grok::{op} on {device} with {dtype} cannot run: {'; '.join(reasons)}")


def _choose(kernel: Kernel, args: tuple[Any, ...]) -> None:
    chosen = _chosen.setdefault(kernel.op, set())
    if kernel.backend not in chosen:
        chosen.add(kernel.backend)
        log.info("grok::%s on %s (%s) is served by %s", kernel.op, *_place(args), kernel.backend)


def preferred(op: str, device: str) -> str | None:
    """The backend asked first for `op` on a device of this type: the forced one, or the first that has a kernel and can
    be used on this machine."""
    forced = forced_backend()
    for backend in (forced,) if forced else ORDER.get(device, ("reference",)):
        if (op, backend) in _kernels and backend not in _missing and not any(ask() for ask in _later.get(backend, ())):
            return backend
    return None


def fuses(op: str, parts: Sequence[str], device: str) -> bool:
    """Whether `op` is one pass in place of `parts` on a device of this type: it is served by the backend that serves them,
    and not by another, which may be slower than all of them."""
    key = forced_backend(), op, parts, device
    if key not in _fused:
        backend = preferred(op, device)
        _fused[key] = backend is not None and all(preferred(part, device) == backend for part in parts)
    return _fused[key]


def preferred_all(device: str) -> tuple[str | None, ...]:
    """Of every op, in the order of their names, the preferred backend on a device of this type: what is captured or
    recorded now will hold."""
    key = forced_backend(), device
    if key not in _preferred:
        _preferred[key] = tuple(preferred(op, device) for op in sorted({op for op, _ in _kernels}))
    return _preferred[key]


def capturable(device: str) -> tuple[str | None, ...] | None:
    """`preferred_all`, what a CUDA graph captured now will hold.

    None where one of them is the reference, which waits for values on the device, as no graph can.
    """
    found = preferred_all(device)
    return None if "reference" in found else found


def call(op: str, *args: Any) -> Any:
    """Run `op` on the backend that `select` finds."""
    return select(op, args).fn(*args)


def chosen() -> dict[str, tuple[str, ...]]:
    """For every op called so far in this process, the backends that served it."""
    return {op: tuple(sorted(backends)) for op, backends in sorted(_chosen.items())}


def backends() -> dict[str, dict[str, Status]]:
    """For every op, every backend: available on this machine or, where not, why."""
    ops = sorted({op for op, backend in _kernels if backend == "reference"})
    return {op: {backend: _status(op, backend) for backend in BACKENDS} for op in ops}


def _status(op: str, backend: str) -> Status:
    reason = _missing.get(backend)
    if reason is None and (op, backend) not in _kernels:
        reason = f"the {backend} backend has no kernel for it"
    if reason is None and backend in _later:
        reason = _later[backend][0]() or None
    return Status(reason is None, reason or "")
