"""Registers the native CPU kernels of the extension `grok_kernels._C`, or says once why there are none.

The kernels exist for AVX-512 with BF16 and VNNI, for AVX-512, for AVX2 and for any CPU; the best that the machine has
runs. `GROK_CPU_ISA` (avx512_bf16, avx512, avx2 or portable), read at the first call, or `use_isa` forces one.

Where the extension cannot be used, importing grok_kernels logs one warning, `backends()` gives the reason, and the
reference serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import packing, registry
from .recording import Recorded
from .recording import record as _record

BUILD = "build it with `python setup.py build_ext --inplace` in the sources, or reinstall where there is a C++ compiler"
OPS = (
    "group_tokens", "grouped_gemm", "moe", "paged_attention", "quantize_fp8", "quantize_int8", "rms_norm",
    "rope_store_kv", "route_topk", "sample_top_p", "sandwich_norm",
)  # fmt: skip
log = logging.getLogger("grok_kernels")


def _load() -> tuple[Any, str]:
    """The extension, or None and the reason."""
    name = "grok_kernels._C"
    try:
        import grok_kernels._C as module
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None, f"the extension {name} was not built; {BUILD}"
        return None, f"the extension {name} does not load ({error}); {BUILD}"
    built, running = (".".join(v.split(".")[:2]) for v in (module.torch_version, torch.__version__))
    if built != running:  # the ABI holds within a minor version only: it may load, and then fail anywhere
        return None, f"the extension {name} was built against torch {built}, this is torch {running}; {BUILD}"
    if stale := [op for op in OPS if not hasattr(module, op)]:
        return None, f"the extension {name} is older than these sources and has no {', '.join(stale)}; {BUILD}"
    return module, ""


_module, _reason = _load()
if _module is None:
    registry.mark_missing("cpu", _reason)
    log.warning("no native CPU kernels, the reference serves: %s", _reason)


def _extension() -> Any:
    if _module is None:
        raise NotImplementedError(f"no native CPU kernels: {_reason}")
    return _module


def isas() -> tuple[str, ...]:
    """The instruction sets that the kernels can use on this machine, best first."""
    return tuple(_extension().available_isas())


def isa() -> str:
    """The instruction set in use. ValueError where `GROK_CPU_ISA` names one that is unknown or not on this machine."""
    return str(_extension().current_isa())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set inside the block, in every thread of the process. ValueError as in `isa`."""
    module = _extension()
    before = module.current_isa()
    module.use_isa(name)
    try:
        yield
    finally:
        module.use_isa(before)


def recordable() -> tuple[str | None, ...] | None:
    """What a run recorded now will hold: the preferred backend of every op. None where this one serves nothing here."""
    found = registry.preferred_all("cpu")
    return found if "cpu" in found else None


def record(run: Callable[[], Any]) -> Recorded:
    """Call `run`, and keep what it does on the CPU so that it can be done again without the Python in it.

    What is returned computes `run`'s result again when called, from what is then in the tensors that `run` read, into
    the tensors that it made: write new inputs into the old ones, and use a result before the next call. Whatever `run`
    decides from values of tensors, sizes or Python objects stays as it was. Results have the bits of `run` itself.
    RuntimeError where `run` asks a tensor for a value; NotImplementedError without the extension.
    """
    return _record(_extension(), run)


def _supports(*args: Any) -> str | None:
    where = next(str(a.device) for a in args if isinstance(a, Tensor))
    return None if where == "cpu" else f"its tensors are on {where}, the cpu backend takes those on cpu"


def _supports_moe(*args: Any) -> str | None:
    """A packed w13 holds the gate and the up projection side by side: each must begin with a panel."""
    w13, w2 = args[3], args[5]
    f = packing.plain_shape(w2)[2]
    if packing.is_packed(w13) and f % packing.WIDTH:
        return f"w13 is packed with F={f}, the cpu backend takes multiples of {packing.WIDTH}"
    return _supports(*args)


class _Weight(NamedTuple):
    """A weight and its scale as the extension takes them."""

    format: str
    layout: str
    shape: tuple[int, int, int]
    planes: tuple[Tensor, ...]


_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _weight(values: Tensor, scale: Tensor | None) -> _Weight:
    layout = "panels" if packing.is_packed(values) else "rows"
    planes = (values,) if scale is None else (values, scale)
    return _Weight(_FORMATS[values.dtype], layout, packing.plain_shape(values), planes)


def _grouped_gemm(x: Tensor, weight: Tensor, weight_scale: Tensor | None, *rest: Any) -> Any:
    return _module.grouped_gemm(x, _weight(weight, weight_scale), *rest)


def _moe(
    x: Tensor, topk_weights: Tensor, experts: Tensor,
    w13: Tensor, w13_scale: Tensor | None, w2: Tensor, w2_scale: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    return _module.moe(x, topk_weights, experts, _weight(w13, w13_scale), _weight(w2, w2_scale), *rest)


if _module is not None:
    registry.take_signatures(_module.signature)
    packing.take_native(_module)
    _adapted = {"grouped_gemm": _grouped_gemm, "moe": _moe}
    for _op in OPS:
        _check = _supports_moe if _op == "moe" else _supports
        registry.register(_op, "cpu", supports=_check)(_adapted.get(_op) or getattr(_module, _op))
