"""A run on the CPU, recorded as native calls on the same tensors: what a CUDA graph is to a GPU.

Streaming the weights evicts the interpreter from the caches, so Python between kernels runs cold, for longer than many
a kernel. A replay goes from one native call to the next without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import registry
from .ops.define import unflatten

Step = Callable[[], object]


class Recorded:
    """A recorded run. Calling it computes the run again from the current contents of its input tensors, into the same
    result tensors, which it returns. One thread at a time may call it."""

    def __init__(self, native: Any, steps: Sequence[Step], result: Any) -> None:
        self._native, self._steps, self._result = native, steps, result

    @torch.inference_mode()
    def __call__(self) -> Any:
        for step in self._steps:
            step()
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
        kernel = None
        if func.namespace == "grok":
            args = unflatten(func._opname, args)
            kernel = registry.select(func._opname, args)
        if kept != (kernel is not None and kernel.backend == "cpu"):
            raise RuntimeError(f"{func} made {kept} native calls in a way that cannot be recorded")
        if not kept:
            again = partial(func if kernel is None else kernel.fn, *args, **kwargs)
            self._keep(func, again, result)
        return result

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
        old.copy_(new)


def _listed(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else (result,)


def record(module: Any, run: Callable[[], Any]) -> Recorded:
    """Call `run` under the native recording of `module`."""
    native = module.Recording()
    recorder = _Recorder(native)
    native.start()
    try:
        with torch.inference_mode(), recorder:
            result = run()
    finally:
        native.stop()
    return Recorded(native, recorder.steps(), result)
