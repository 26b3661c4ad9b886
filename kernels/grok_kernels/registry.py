"""Which backend serves an op: registered kernels, selection at the call, and what was chosen.

A kernel is a backend's function for one op, with a `supports` that looks at the call's arguments and returns None, or
the reason why the kernel cannot run it. On a device the first backend of `ORDER` whose kernel supports the call serves
it. A backend forced by `use_backend` or by `GROK_KERNELS_BACKEND` serves it or raises.
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

PRODUCTS = ("grouped_gemm", "moe")  # the ops that take weights in every backend

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
class Takes:
    """The weights that a backend multiplies by. formats: keys of `formats.FORMATS`. fp16_scales: whether int8 may have
    them. mixed: whether the weights of one call may differ in format."""

    formats: tuple[str, ...]
    fp16_scales: bool = False
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a backend can serve an op on this machine and, where it cannot, why."""

    available: bool
    reason: str = ""


_kernels: dict[tuple[str, str], Kernel] = {}
_missing: dict[str, str] = {}  # backend -> why none of its kernels can run here
_late_checks: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {}  # backend -> as given to `check_late`
_chosen: dict[str, set[str]] = {}
_takes: dict[str, Takes] = {}  # backend -> the weights that its products take
_forced: ContextVar[str | None] = ContextVar("grok_kernels_backend", default=None)

Key = tuple[str, bytes, "str | None"]  # op, signature, backend that `use_backend` forces

# The validated-call cache. An eager step makes hundreds of calls of a few microseconds each, all like those of the step
# before, and dispatch, checks and selection in Python would take longer than many a kernel. So a plain call that passed
# is remembered by its signature (types, shapes, strides, numbers), and the next such call goes straight to its kernel.
# A call without a signature (a mode, a tracer, gradients, another device, no extension) always takes the whole way.
KNOWN = 4096  # calls kept; past that all are dropped, since working sets are far smaller and a repeated check is cheap
_known: dict[Key, Kernel] = {}
_preferred: dict[tuple[str | None, str], tuple[str | None, ...]] = {}  # results of `preferred_all`
_fused: dict[tuple[str | None, str, Sequence[str], str], bool] = {}  # results of `fuses`, which every layer asks for


def _no_signature(args: tuple[Any, ...]) -> bytes | None:
    return None


Signature = Callable[[tuple[Any, ...]], "bytes | None"]
_signature: Signature = _no_signature
_key: Signature = _no_signature


def set_signature(signature: Signature, key: Signature) -> None:
    """Install the functions that key a call for the validated-call cache: bytes that hold all that checks and selection
    depend on, or None where the call is not to be cached. `signature` gives None under any mode of the thread too."""
    global _signature, _key
    _signature, _key = signature, key


def key(args: tuple[Any, ...]) -> bytes | None:
    """What a call of the extension with these arguments depends on, whatever the modes of the thread; None where it
    does not take them: a tensor of another device or kind, or one that gradients pass."""
    return _key(args)


def shortcut(op: str, args: tuple[Any, ...]) -> tuple[Kernel | None, Key | None]:
    """The kernel and the key of a cached call; (None, key) for a call to `remember` once it has passed; (None, None)
    for a call that cannot be cached."""
    found = _signature(args)
    if found is None:
        return None, None
    key = (op, found, _forced.get())
    kernel = _known.get(key)
    if kernel is not None and kernel.backend not in _chosen.get(op, ()):
        _choose(kernel, args)
    return kernel, key


def remember(key: Key, args: tuple[Any, ...]) -> None:
    """Cache this call, which has passed all checks."""
    if len(_known) >= KNOWN:
        _known.clear()
    _known[key] = select(key[0], args)


def register(op: str, backend: str, supports: Supports = lambda *args: None) -> Callable[[Any], Any]:
    """Decorator: the function is `backend`'s kernel for `op`. A second one for the same pair raises.

    `supports` may look at types, shapes, strides, devices and numbers, never at the values in tensors: its answer is
    cached for all calls with the same signature.
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
    """Drop every cached selection, since what there is to select from has changed."""
    _known.clear()
    _preferred.clear()
    _fused.clear()


def set_takes(backend: str, takes: Takes) -> None:
    """Say which weights `backend` multiplies by."""
    _takes[backend] = takes


def taken(backend: str) -> Takes:
    """Which weights `backend` multiplies by."""
    return _takes[backend]


def takes_format(format: str, device: str, fp16_scales: bool = False) -> bool:
    """Whether weights of this format are multiplied as they are on a device of this type, by another backend than the
    reference, which takes all and serves where there is no other or where it is forced."""
    return any(
        format in takes.formats and (takes.fp16_scales or format != "int8" or not fp16_scales)
        for takes in _serving(device)
    )


def mixes_formats(device: str) -> bool:
    """Whether the two weights of an expert layer may differ in format on a device of this type."""
    return any(takes.mixed for takes in _serving(device))


def _serving(device: str) -> list[Takes]:
    """What the backends take that multiply on a device of this type."""
    forced = forced_backend()
    usable = (
        {forced}
        if forced
        else {
            backend
            for backend in ORDER.get(device, ())
            if backend != "reference"
            and all((op, backend) in _kernels for op in PRODUCTS)
            and backend not in _missing
            and not any(check() for check in _late_checks.get(backend, ()))
        }
    )
    return [_takes[backend] for backend in usable or {"reference"}]


def mark_missing(backend: str, reason: str) -> None:
    """Say why no kernel of `backend` can run on this machine, for `backends()` and for errors."""
    _missing[backend] = reason
    _forget()


def check_late(backend: str, no_chip: Callable[[], str], unusable: Callable[[], str]) -> None:
    """Two checks of `backend` that are too slow for import; each returns why the backend serves nothing, "" if it does.

    `no_chip` may start a device: `backends()` and `preferred` call it. `unusable` may compile for minutes: `preferred`
    alone calls it, for a device that is about to be used. A call relies on its kernel's `supports`.
    """
    _late_checks[backend] = no_chip, unusable
    _forget()


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend: expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend; what that cannot run raises NotImplementedError.

    It holds for this thread or asyncio task. To force the threads of an AsyncLLM too, set `GROK_KERNELS_BACKEND`.
    """
    token = _forced.set(_check(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `use_backend`, or else the environment, forces; None where the device decides."""
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
    """The kernel that serves this call of `op`. NotImplementedError where none can, or the forced one cannot."""
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
    """The backend that is tried first for `op` on a device of this type: the forced one, or the first that has a kernel
    and can be used on this machine."""
    forced = forced_backend()
    for backend in (forced,) if forced else ORDER.get(device, ("reference",)):
        if (
            (op, backend) in _kernels
            and backend not in _missing
            and not any(check() for check in _late_checks.get(backend, ()))
        ):
            return backend
    return None


def fuses(op: str, parts: Sequence[str], device: str) -> bool:
    """Whether `op` is a faster way to compute `parts` on a device of this type: one backend serves it and all of them.
    Another backend's `op` may be slower than the parts."""
    key = forced_backend(), op, parts, device
    if key not in _fused:
        backend = preferred(op, device)
        _fused[key] = backend is not None and all(preferred(part, device) == backend for part in parts)
    return _fused[key]


def preferred_all(device: str) -> tuple[str | None, ...]:
    """The preferred backends of all ops, sorted by name, on a device of this type: what a graph captured or a run
    recorded now will contain."""
    key = forced_backend(), device
    if key not in _preferred:
        _preferred[key] = tuple(preferred(op, device) for op in sorted({op for op, _ in _kernels}))
    return _preferred[key]


def capturable(device: str) -> tuple[str | None, ...] | None:
    """`preferred_all`; None where the reference is among them, which reads values back to the host: no graph can."""
    found = preferred_all(device)
    return None if "reference" in found else found


def call(op: str, *args: Any) -> Any:
    """Run `op` on the backend that `select` finds."""
    return select(op, args).fn(*args)


def chosen() -> dict[str, tuple[str, ...]]:
    """The backends that have served each op so far in this process."""
    return {op: tuple(sorted(backends)) for op, backends in sorted(_chosen.items())}


def backends() -> dict[str, dict[str, Status]]:
    """For every op and backend, whether it is available on this machine and, if not, why."""
    ops = sorted({op for op, backend in _kernels if backend == "reference"})
    return {op: {backend: _status(op, backend) for backend in BACKENDS} for op in ops}


def _status(op: str, backend: str) -> Status:
    reason = _missing.get(backend)
    if reason is None and (op, backend) not in _kernels:
        reason = f"the {backend} backend has no kernel for it"
    if reason is None and backend in _late_checks:
        reason = _late_checks[backend][0]() or None
    return Status(reason is None, reason or "")
