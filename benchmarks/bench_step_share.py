"""A decode step by part, and the share of it that is not spent in kernels, at 1.30 B random parameters in int8.

python -m benchmarks.bench_step_share [--requests 1 8] [--layers 8] [--steps 40] [--eager]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from benchmarks.model_1b import configuration, write
from grok_bench.report.table import grid
from grok_engine import LLMEngine, SamplingParams
from grok_kernels import registry
from grok_kernels.recording import Recorded

Seconds = Counter[str]


@contextmanager
def timed_kernels() -> Iterator[Seconds]:
    """Seconds inside the kernels by op, summed over the calls from Python within the context.

    What is not counted: the dispatch of the ops, torch's own computations, and Python.
    """
    seconds, kept = Seconds(), dict(registry._kernels)

    def timed(kernel: registry.Kernel) -> registry.Kernel:
        def fn(*args: Any) -> Any:
            began = perf_counter()
            result = kernel.fn(*args)
            seconds[kernel.op] += perf_counter() - began  # type: ignore[assignment]
            return result

        return replace(kernel, fn=fn)

    registry._kernels.update({key: timed(kernel) for key, kernel in kept.items()})
    registry._known.clear()
    try:
        yield seconds
    finally:
        registry._kernels.update(kept)
        registry._known.clear()


def replayed_kernels(engine: LLMEngine) -> Seconds:
    """Seconds inside the kernels of all decode steps replayed so far, by op."""
    graphs, seconds = engine.runner.graphs, Seconds()
    for _, run, _ in graphs._runs.values() if graphs else ():
        seconds.update(run.seconds() if isinstance(run, Recorded) else {})
    return seconds


def measure(model: Path, requests: int, steps: int, eager: bool = False) -> dict[str, float]:
    """Milliseconds of steps in which every request decodes, after the prompts and a warm-up: medians.

    "the whole step", "in no kernel", the parts of a step (the forward pass without its kernels), each op's kernels.
    """
    pages = requests * ((40 + steps) // 16 + 2)
    engine = LLMEngine(model, max_num_seqs=requests, num_pages=pages, enforce_eager=eager)
    params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
    rng, taken = random.Random(1), list[dict[str, float]]()
    for i in range(requests):
        engine.add_request(str(i), rng.choices(range(3, 500), k=32), params)
    with timed_kernels() as seconds:
        while engine.stats().generated_tokens < 3 * requests:  # prefill, then warm-up
            engine.step()
        for _ in range(steps):
            seconds.clear()
            replayed, parts = replayed_kernels(engine), engine.stats().seconds
            began = perf_counter()
            outputs = engine.step()
            whole = perf_counter() - began
            assert len(outputs) == requests
            ops = replayed_kernels(engine) - replayed + seconds
            spent = {f"  {part}": after - parts[part] for part, after in engine.stats().seconds.items()}
            spent["  forward"] -= ops.total()
            taken.append({"the whole step": whole, "in no kernel": whole - ops.total(), **spent, **ops})
    engine.close()
    return {name: median(t.get(name, 0.0) for t in taken) * 1e3 for name in taken[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eager", action="store_true", help="call every kernel from Python, replay none")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), configuration(a.layers))
        found = {f"{n} requests": measure(Path(folder), n, a.steps, a.eager) for n in a.requests}
    names = dict.fromkeys(name for spent in found.values() for name in spent)
    rows = ([name, *(f"{spent.get(name, 0.0):.3f}" for spent in found.values())] for name in names)
    grid((f"ms, {torch.get_num_threads()} threads", *found), rows, Console())


if __name__ == "__main__":
    main()
