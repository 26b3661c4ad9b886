"""Decode steps as graphs: captured once for a number of rows and a width of the block table, then replayed.

A step of one token a request is hundreds of small kernels, which the host starts more slowly than a GPU ends them; and on
a CPU, Python has to come from memory again after the weights of each product. A replay makes all those calls at once,
on the inputs that one transfer has put where the graph reads them. For a GPU it is a CUDA graph. There a batch is padded
to the next number of rows on a ladder, and its block table to the next of a few widths: attention has a program for each
split of as many keys as the table has room for, so one width for all would make short requests pay for the longest. For a
CPU it is a recording of the native calls, for each number of rows up to `CPU_ROWS`, above which the kernels take so long
that little is gained; attention there never looks at columns that are not in use. A recording keeps what is computed in
between, some 10 · d_model values a row and layer.

A graph is captured when its shape is first met; on a GPU, what all of them will take is measured before pages get the rest
of the memory. Logits are not in the graphs: their kernels are started while the replay runs, and every graph would hold a
result as wide as the vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

import grok_kernels
from grok_engine.config import EngineConfig
from grok_engine.models.decoder import Decoder

from .batch import Batch, KVPages, Work, flatten

RUNG = 8  # rows from one to the next, above the first few: the least that a tile of the products has
NARROWEST = 1024  # keys that the narrowest table has room for
CPU_ROWS = 16

Run = Callable[[], Tensor]


class Capture(Protocol):
    """How a run is kept: as a CUDA graph, as a recording on a CPU, as the run itself in tests."""

    def rungs(self, most: int) -> Sequence[int]:
        """Numbers of rows to capture for, ascending; `most` is the most that a step has."""

    def widths(self, longest: int, page_size: int) -> Sequence[int]:
        """Columns of the block tables to capture for, ascending, with room for the keys of the longest request."""

    def key(self) -> Hashable | None:
        """What was captured serves only while this is the same; None: nothing can be captured now."""

    def __call__(self, run: Run) -> Run:
        """A run of the same on the same tensors, whose result is overwritten by the next."""


def rungs(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then multiples of 8, and the most itself."""
    return (*(n for n in (1, 2, 4, *range(RUNG, most, RUNG)) if n < most), most)


def widths(longest: int, page_size: int) -> tuple[int, ...]:
    """Columns of the block tables, each twice the one before, up to the pages of the longest request."""
    last, found = -(-longest // page_size), []
    width = max(NARROWEST // page_size, 1)
    while width < last:
        found.append(width)
        width *= 2
    return (*found, last)


class DecodeGraphs:
    """The graphs of one model over one set of pages."""

    def __init__(self, model: Decoder, cache: Sequence[KVPages], config: EngineConfig, capture: Capture) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._page_size, self._device = config.page_size, model.cos_sin.device
        self._rungs = capture.rungs(config.max_num_seqs)
        self._widths = capture.widths(config.max_len, config.page_size)
        self._runs: dict[tuple[int, int, Hashable], tuple[Tensor, Run]] = {}

    def run(self, work: Sequence[Work]) -> Tensor | None:
        """x_TD as `Runner.run`, overwritten by the next step; None for a step that no graph is for."""
        key = self._capture.key()
        if key is None or len(work) > self._rungs[-1] or any(len(w.token_ids) != 1 for w in work):
            return None
        widest = max([len(w.pages) for w in work])
        if widest > self._widths[-1]:
            return None
        rows = self._rungs[bisect_left(self._rungs, len(work))]
        width = self._widths[bisect_left(self._widths, widest)]
        return self._step(work, rows, width, key)[: len(work)]

    def bytes_needed(self, free: Callable[[], int]) -> int:
        """What the graphs of all shapes will take, from what `free` says before and after the two largest.

        The first takes the memory that all share, the second what each more takes. Page 0 is written.
        """
        shapes = sorted(product(self._rungs, self._widths), reverse=True)
        key, taken = self._capture.key(), []
        if key is None:
            return 0
        before = free()
        for rows, width in shapes[:2]:
            self._step([Work([0], 0, [0])], rows, width, key)
            after = free()
            taken.append(max(before - after, 0))
            before = after
        return taken[0] + sum(taken[1:]) * (len(shapes) - 1)

    def _step(self, work: Sequence[Work], rows: int, width: int, key: Hashable) -> Tensor:
        numbers, sizes = flatten(work, self._page_size, rows, width)
        if (rows, width, key) not in self._runs:
            held = numbers.to(self._device, copy=True)
            batch = Batch.of(held, sizes, 1)
            replay = self._capture(lambda: self._model(batch, self._cache))
            self._runs[rows, width, key] = held, replay
        else:
            held, replay = self._runs[rows, width, key]
            # not waited for: from memory that is not pinned, the bytes are read before the call returns
            held.copy_(numbers, non_blocking=True)
        return replay()


class CpuCapture:
    """Into recordings of native calls, each with tensors of its own."""

    @staticmethod
    def rungs(most: int) -> Sequence[int]:
        return range(1, min(most, CPU_ROWS) + 1)

    @staticmethod
    def widths(longest: int, page_size: int) -> Sequence[int]:
        return widths(longest, page_size)[-1:]

    def key(self) -> Hashable | None:
        return grok_kernels.cpu.recordable()

    def __call__(self, run: Run) -> Run:
        return grok_kernels.cpu.record(run)


class CudaCapture:
    """Into graphs that share one pool of memory: only one runs at a time, and its result is used before the next."""

    rungs, widths = staticmethod(rungs), staticmethod(widths)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def key(self) -> Hashable | None:
        return grok_kernels.capturable(self._device.type)

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self._device):
            # once for real: kernels are compiled, and what is wrong with the step itself is said as ever
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other threads of the process do with the GPU meanwhile is their affair
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
