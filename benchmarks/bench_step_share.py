"""The share of a decode step that is not spent in kernels, at 1.30 B parameters with random int8 weights.

python -m benchmarks.bench_step_share [--requests 8] [--layers 8] [--eager]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import grok_kernels
from benchmarks.model_1b import configuration, write
from grok_engine import LLMEngine, RequestOutputKind, SamplingParams
from grok_kernels import registry
from grok_kernels.recording import Recorded


@contextmanager
def timed_kernels() -> Iterator[dict[str, float]]:
    """Seconds inside the kernels by op, summed over the calls from Python within the context.

    What is not counted: the dispatch of the ops, torch's own computations, and Python.
    """
    seconds: dict[str, float] = {}
    kept = dict(registry._kernels)

    def timed(kernel: registry.Kernel) -> registry.Kernel:
        def fn(*args: Any) -> Any:
            began = perf_counter()
            result = kernel.fn(*args)
            seconds[kernel.op] = seconds.get(kernel.op, 0.0) + perf_counter() - began
            return result

        return replace(kernel, fn=fn)

    registry._kernels.update({key: timed(kernel) for key, kernel in kept.items()})
    registry._known.clear()
    try:
        yield seconds
    finally:
        registry._kernels.update(kept)
        registry._known.clear()


def replayed_kernels(engine: LLMEngine) -> dict[str, float]:
    """Seconds inside the kernels of all decode steps replayed so far, by op."""
    graphs, seconds = engine.runner.graphs, Counter[str]()
    for _, run in graphs._runs.values() if graphs else ():
        seconds.update(run.seconds() if isinstance(run, Recorded) else {})
    return seconds


@dataclass
class Steps:
    """Medians over decode steps, in milliseconds: the whole, the time in kernels, and that by op."""

    whole: float
    kernels: float
    by_op: dict[str, float]

    @property
    def rest(self) -> float:
        return self.whole - self.kernels


def measure(folder: Path, requests: int, steps: int, eager: bool) -> Steps:
    """Time steps in which every request decodes, after the prompts and a warm-up."""
    engine = LLMEngine(folder, max_num_seqs=requests, num_pages=64 * requests, enforce_eager=eager)
    params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    for i in range(requests):
        engine.add_request(str(i), list(range(5 + i, 37 + i)), params)
    taken: list[tuple[float, dict[str, float]]] = []
    with timed_kernels() as seconds:
        for _ in range(3):  # prefill, then warm-up
            engine.step()
        for _ in range(steps):
            seconds.clear()
            before = replayed_kernels(engine)
            began = perf_counter()
            outputs = engine.step()
            whole = perf_counter() - began
            taken.append((whole, dict(Counter(replayed_kernels(engine)) - Counter(before) + Counter(seconds))))
            assert len(outputs) == requests
    engine.close()
    by_op = {op: median(ops.get(op, 0.0) for _, ops in taken) * 1e3 for op in taken[0][1]}
    rest = median(whole - sum(ops.values()) for whole, ops in taken) * 1e3
    whole = median(whole for whole, _ in taken) * 1e3
    return Steps(whole, whole - rest, by_op)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eager", action="store_true", help="call every kernel from Python, replay none")
    a = parser.parse_args()
    config = configuration(a.layers)
    title = f"{config.param_count() / 1e9:.2f} B parameters, a decode step, {torch.get_num_threads()} thread(s)"
    table = Table(title=title)
    for column in ("requests", "step ms", "kernels ms", "the rest ms", "a layer µs", "the rest's share"):
        table.add_column(column, justify="right")
    ops = Table(title="ms in the kernels of a step")
    ops.add_column("op")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), config)
        for requests in a.requests:
            s = found[requests] = measure(Path(folder), requests, a.steps, a.eager)
            table.add_row(
                str(requests), f"{s.whole:.2f}", f"{s.kernels:.2f}", f"{s.rest:.2f}", f"{s.rest / a.layers * 1e3:.0f}",
                f"{s.rest / s.whole:.1%}",
            )  # fmt: skip
            ops.add_column(f"{requests} request{'s' * (requests > 1)}", justify="right")
    served = grok_kernels.chosen()
    for op in next(iter(found.values())).by_op:
        ops.add_row(f"{op} ({', '.join(served.get(op, ['cpu']))})", *(f"{s.by_op[op]:.3f}" for s in found.values()))
    Console().print(table, ops)


if __name__ == "__main__":
    main()
