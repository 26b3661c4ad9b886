"""A run on the CPU, recorded as native calls on the same tensors: what a CUDA graph is to a GPU.

Streaming the weights evicts the interpreter from the caches, so Python between kernels runs cold, for longer than many
a kernel. A replay goes from one native call to the next without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import registry
from .ops.define import tensors_in, unflatten

Step = Callable[[], object]


class Recorded:
    """A recorded run. Calling it computes the run again from the current contents of its input tensors, into the same
    result tensors, which it returns.

    ValueError, before anything is written, where a tensor that the run read has had another shape, dtype or memory
    since, as by `resize_` or `.data =`; and where a call has not ended, in another thread or in this one.
    """

    def __init__(self, native: Any, steps: Sequence[Step], result: Any) -> None:
        self._native, self._steps, self._result = native, steps, result
        self._running = Lock()

    @torch.inference_mode()
    def __call__(self) -> Any:
        if not self._running.acquire(blocking=False):
            raise ValueError("a recorded run is called again before its last call has ended; it has one set of results")
        try:
            self._native.verify()
            for step in self._steps:
                step()
        finally:
            self._running.release()
        return self._result

    def seconds(self) -> dict[str, float]:
        """The seconds spent in each op's native kernel, over all replays so far."""
        return dict(self._native.seconds())


class _Recorder(TorchDispatchMode):
    """Sees every op below autograd. An op that the native recording does not capture becomes a Python step: it runs
    on the same arguments, and its result is copied to the memory of the first one."""

    def __init__(self, native: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._native, self._steps, self._from = native, list[Step](), 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler, which takes a second

    def steps(self) -> list[Step]:
        """All steps so far, in their order."""
        if self._native.calls > self._from:
            self._steps.append(partial(self._native.replay, self._from, self._native.calls))
            self._from = self._native.calls
        return self._steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # a composite op such as reshape may return a view or not: record the ops it is made of
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        before = self._native.calls
        result = func(*args, **kwargs)
        kept = self._native.calls - before
        kernel, flat = None, args
        if func.namespace == "grok":
            args = unflatten(func._opname, args)
            kernel = registry.select(func._opname, args)
        if kept != (kernel is not None and kernel.backend == "cpu"):
            raise RuntimeError(f"{func} made {kept} native calls in a way that cannot be recorded")
        if not kept:
            self._watch(func, flat, kwargs)
            again = partial(func if kernel is None else kernel.fn, *args, **kwargs)
            self._keep(func, again, result)
        return result

    def _watch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            for tensor in tensors_in([value]):
                self._native.watch(f"{func}: {name}", tensor)

    def _keep(self, func: Any, again: Callable[[], Any], result: Any) -> None:
        results = _listed(result)
        if not all(isinstance(r, Tensor) for r in results):
            raise RuntimeError(f"{func} gives a value, {result}, that may be another in a replay")
        fresh = [r.alias_info is None for r in func._schema.returns]  # neither an argument nor a view of one
        fresh = fresh * len(results) if isinstance(result, list) else fresh
        if any(fresh):
            self.steps().append(partial(_refill, list(compress(results, fresh)), fresh, again))
        elif func._schema.is_mutable:
            self.steps().append(again)


def _refill(kept: Sequence[Tensor], fresh: Sequence[bool], again: Callable[[], Any]) -> None:
    for old, new in zip(kept, compress(_listed(again()), fresh), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"a result of the recording has shape {tuple(old.shape)} and dtype {old.dtype}, that of the replay "
                f"{tuple(new.shape)} and {new.dtype}"
            )
        old.copy_(new)


def _listed(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else (result,)


def record(module: Any, run: Callable[[], Any]) -> Recorded:
    """Call `run` under the native recording of `module`."""
    native = module.Recording()
    recorder = _Recorder(native)
    with torch.inference_mode(), recorder:
        result = native.record(run)
    return Recorded(native, recorder.steps(), result)
