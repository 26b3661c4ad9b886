"""Registers the native CPU kernels of the extension `grok_kernels._C`, or says once why there are none.

The kernels are compiled for AVX-512 with BF16 and VNNI, with VNNI alone and without either, for AVX2 and for any CPU;
on 64-bit Arm for NEON with BF16 and I8MM, for NEON and for any CPU. The best that the machine has runs. `GROK_CPU_ISA`
(avx512_bf16, avx512_vnni, avx512, avx2, neon_bf16, neon or portable), read at the first call, or `use_isa` forces one.

Where the extension cannot be used, importing grok_kernels logs one warning, `backends()` gives the reason, and the
reference serves. In a wheel, which holds the extension compiled, it is an ImportError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from . import layouts, registry, threads
from .experts import ExpertLayer
from .extension import check_wheel, in_wheel, misfit
from .formats import FORMATS, WIDTH
from .recording import Recorded
from .recording import record as _record
from .weights import Weight, unsupported

BUILD = "build it with `python setup.py build_ext --inplace` in the sources, or reinstall where there is a C++ compiler"
OPS = (
    "group_tokens", "grouped_gemm", "moe", "paged_attention", "quantize_fp8", "quantize_int8", "rms_norm",
    "rope_store_kv", "route_topk", "sample_top_p", "sandwich_norm",
)  # fmt: skip
registry.set_takes("cpu", registry.Takes(tuple(FORMATS), fp16_scales=True, mixed=True))
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
    if reason := misfit(module, name, BUILD):
        return None, reason
    native = (*OPS, "bind_threads", "key", "scaled_sum", "weight_rows")
    if stale := [op for op in native if not hasattr(module, op)]:
        return None, f"the extension {name} is older than these sources and has no {', '.join(stale)}; {BUILD}"
    return module, ""


check_wheel()  # before the extension is loaded, which may crash
_module, _reason = _load()
if _module is None:
    if in_wheel():
        raise ImportError(_reason)
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


def bind_threads() -> bool:
    """Bind torch's worker threads to cores or nodes, for the process, where it reaches several NUMA nodes or
    `GROK_KERNELS_BIND` is 1 (0: never). Whether it was done; False without the extension."""
    return _module is not None and threads.bind(_module)


def recordable() -> tuple[str | None, ...] | None:
    """The backends that a run recorded now will contain (`preferred_all`). None where this one serves nothing here."""
    found = registry.preferred_all("cpu")
    return found if "cpu" in found else None


def record(run: Callable[[], Any]) -> Recorded:
    """Call `run` and record what it does on the CPU, for replays without Python.

    Calling the result computes `run` again, from the current contents of the tensors that `run` read into the tensors
    that it made: write new inputs into the old tensors, and use a result before the next call. Whatever `run` decided
    from sizes, Python objects or values of tensors stays as it was. The bits are those of `run` itself. RuntimeError
    where `run` reads a value out of a tensor; NotImplementedError without the extension.
    """
    return _record(_extension(), run)


def _supports(*args: Any) -> str | None:
    if reason := unsupported("cpu", args, ("rows", "panels")):
        return reason
    where = next(str(a.device) for a in args if isinstance(a, Tensor))
    return None if where == "cpu" else f"its tensors are on {where}, the cpu backend takes those on cpu"


def _supports_moe(x: Tensor, *args: Any) -> str | None:
    layer = ExpertLayer(*args)
    f = layer.w2.shape[2]
    if layer.w13.layout == "panels" and f % WIDTH:  # gate and up lie side by side, and each begins with a panel
        return f"w13 is packed with F={f}, the cpu backend takes multiples of {WIDTH}"
    return _supports(x, *args)


if _module is not None:
    registry.set_signature(_module.signature, _module.key)
    layouts.set_native(_module)
    _module.set_weight_type(Weight)
    for _op in OPS:
        _check = _supports_moe if _op == "moe" else _supports
        registry.register(_op, "cpu", supports=_check)(getattr(_module, _op))
