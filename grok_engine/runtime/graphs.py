"""Decode steps as graphs: captured once per number of rows and width of the block table, then replayed.

A decode step is hundreds of small kernels. A GPU finishes them faster than Python launches them; on a CPU, streaming
the weights evicts the interpreter from cache, so Python between kernels runs cold. A replay makes all of the calls at
once, on inputs that one transfer has copied to where the graph reads them.

- On a GPU a replay is a CUDA graph. The batch is padded to the next captured number of rows, and the block table to the
  next captured width. Attention launches a program for each split of the keys that the table has room for, so a single
  width would make short requests pay for the longest.
- On a CPU a replay is a recording of the native calls, one for each number of rows up to `CPU_ROWS`. Beyond that the
  kernels take so long that replaying gains little. Attention there never reads unused columns, so one width is enough.
  A recording keeps all intermediate results, about 10 · d_model values per row and layer.

A graph is captured when its shape first occurs, and all are dropped when a weight of the model has been replaced: they
would go on reading the old one. On a GPU the memory of all graphs is measured before pages get the rest. Logits are not
part of the graphs: their kernels are launched while the replay runs, and each graph would have to keep a result as wide
as the vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from itertools import count, product, takewhile
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import grok_kernels
from grok_engine.batch import Batch, KVPages
from grok_engine.config import EngineConfig
from grok_engine.models.decoder import Decoder

from .flatten import flatten
from .plan import Entry

RUNG = 8  # above the first few, numbers of rows are multiples of this, the smallest tile of the GEMMs
NARROWEST = 1024  # keys that the narrowest block table has room for
CPU_ROWS = 16

Run = Callable[[], Tensor]


class Capture(Protocol):
    """How to capture a run: as a CUDA graph, or as a recording on a CPU."""

    def shapes(self, most: int, longest: int, page_size: int) -> tuple[Sequence[int], Sequence[int]]:
        """Numbers of rows to capture, up to `most` of a step, and widths of the block table, up to the longest request;
        both ascending."""

    def key(self) -> Hashable | None:
        """A capture may be replayed only while this stays the same; None: nothing can be captured now."""

    def __call__(self, run: Run) -> Run:
        """Capture `run`. The function returned repeats it on the same tensors, overwriting its last result."""


def rungs(most: int) -> tuple[int, ...]:
    """Numbers of rows to capture: 1, 2, 4, then multiples of 8, and `most` itself."""
    return (*(n for n in (1, 2, 4, *range(RUNG, most, RUNG)) if n < most), most)


def widths(longest: int, page_size: int) -> tuple[int, ...]:
    """Widths of the block table to capture: doubling, up to the pages of the longest request."""
    last, narrowest = -(-longest // page_size), max(NARROWEST // page_size, 1)
    return (*takewhile(lambda width: width < last, (narrowest << i for i in count())), last)


class Weights:
    """What a model computes with, to notice that a parameter, a buffer, a `Weight` or a module was replaced, or that a
    tensor was given other memory (`.data =`)."""

    def __init__(self, model: nn.Module) -> None:
        places: list[tuple[dict[str, Any], str]] = []
        for module in model.modules():
            own = [(vars(module), name) for name, v in vars(module).items() if isinstance(v, grok_kernels.Weight)]
            # a module with a `Weight` computes with that alone; its parameters are the planes
            places += own or [(module._parameters, name) for name in module._parameters]
            places += [(held, name) for held in (module._buffers, module._modules) for name in held]
        self._held, self._names = [held for held, _ in places], [name for _, name in places]
        self._values = [held[name] for held, name in places]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def same(self) -> bool:
        """Whether all is as it was. In C-level loops, since every step asks, of thousands of entries."""
        return all(map(is_, map(dict.get, self._held, self._names), self._values)) and (
            [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )


class DecodeGraphs:
    """The captured decode steps of one model over one set of pages."""

    def __init__(self, model: Decoder, cache: Sequence[KVPages], config: EngineConfig, capture: Capture) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._page_size, self._device = config.page_size, model.cos_sin.device
        self._rungs, self._widths = capture.shapes(config.max_num_seqs, config.max_len, config.page_size)
        self._expert_load = config.expert_load
        # by shape: the inputs, the replay, and the tensors that it writes the routers' choices into
        self._runs: dict[tuple[int, int, Hashable], tuple[Tensor, Run, list[Tensor] | None]] = {}
        self._weights = Weights(model)

    def run(self, entries: Sequence[Entry], routed: list[Tensor] | None = None) -> Tensor | None:
        """x_TD, and `routed`, as `Runner.run` gives them; None for a step that is not captured: a prompt, or one that
        is too large."""
        key = self._capture.key()
        if key is None or len(entries) > self._rungs[-1] or any(len(e.token_ids) != 1 for e in entries):
            return None
        widest = max([len(e.pages) for e in entries])
        if widest > self._widths[-1]:
            return None
        rows = self._rungs[bisect_left(self._rungs, len(entries))]
        width = self._widths[bisect_left(self._widths, widest)]
        x_TD, chosen = self._replay(entries, rows, width, key)
        if routed is not None:
            assert chosen is not None, "captured without expert_load"
            routed += [experts_TA[: len(entries)] for experts_TA in chosen]
        return x_TD[: len(entries)]

    def clear(self) -> None:
        """Drop all captured steps, after a step that failed: an interrupt may have left one half made, or in use."""
        self._runs.clear()

    @torch.inference_mode()
    def bytes_needed(self, free: Callable[[], int]) -> int:
        """Bytes that the graphs of all shapes will take, measured by capturing the two largest. free: bytes available.

        The first takes the memory that all graphs share, the second what each further one takes. Page 0 is written.
        """
        shapes = sorted(product(self._rungs, self._widths), reverse=True)
        key, taken = self._capture.key(), []
        if key is None:
            return 0
        before = free()
        for rows, width in shapes[:2]:
            self._replay([Entry([0], 0, [0])], rows, width, key)
            after = free()
            taken.append(max(before - after, 0))
            before = after
        return taken[0] + sum(taken[1:]) * (len(shapes) - 1)

    def _replay(
        self, entries: Sequence[Entry], rows: int, width: int, key: Hashable
    ) -> tuple[Tensor, list[Tensor] | None]:
        numbers, sizes = flatten(entries, self._page_size, rows, width)
        if not (self._runs and self._weights.same()):
            self._runs.clear()
            self._weights = Weights(self._model)
        if (rows, width, key) not in self._runs:
            inputs = numbers.to(self._device, copy=True)
            batch = Batch.of(inputs, sizes, 1)
            chosen: list[Tensor] | None = [] if self._expert_load else None

            def run() -> Tensor:
                if chosen is not None:
                    chosen.clear()  # a capture may run it more than once: the last run's tensors are those that replay
                x_TD: Tensor = self._model(batch, self._cache, chosen)
                return x_TD

            replay = self._capture(run)
            self._runs[rows, width, key] = inputs, replay, chosen
        else:
            inputs, replay, chosen = self._runs[rows, width, key]
            # non_blocking is safe: from memory that is not pinned, the bytes are read before the call returns
            inputs.copy_(numbers, non_blocking=True)
        return replay(), chosen


class CpuCapture:
    """Captures recordings of native calls, each with tensors of its own."""

    def shapes(self, most: int, longest: int, page_size: int) -> tuple[Sequence[int], Sequence[int]]:
        return range(1, min(most, CPU_ROWS) + 1), widths(longest, page_size)[-1:]

    def key(self) -> Hashable | None:
        return grok_kernels.cpu.recordable()

    def __call__(self, run: Run) -> Run:
        return grok_kernels.cpu.record(run)


class CudaCapture:
    """Captures CUDA graphs that share one memory pool: one runs at a time, and its result is used before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def shapes(self, most: int, longest: int, page_size: int) -> tuple[Sequence[int], Sequence[int]]:
        return rungs(most), widths(longest, page_size)

    def key(self) -> Hashable | None:
        return grok_kernels.capturable(self._device.type)

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self._device):
            # run once uncaptured: this compiles kernels, and errors of the step itself surface as usual
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads of the process may go on using the GPU
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = run()
            except Exception as error:
                raise RuntimeError(
                    f"a decode step cannot be captured in a CUDA graph ({error}): enforce_eager=True runs without"
                ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
