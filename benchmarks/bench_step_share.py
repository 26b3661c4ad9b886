"""A decode step by part, and the share of it that is not spent in kernels: at 1.30 B random parameters in int8, or with
--model of another, such as tiny, which ships: there the runtime outweighs the kernels.

python -m benchmarks.bench_step_share [--requests 8] [--layers 8] [--eager] [--model DIR] [--waiting 10000]
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

import grok_kernels
from benchmarks.model_1b import configuration, write
from grok_bench.report.table import grid, terminal
from grok_engine import LLMEngine, RequestOutputKind, SamplingParams
from grok_engine.loading.resolve import find_model
from grok_engine.tools.plan_cpu import measure as measure_rates
from grok_engine.tools.plan_cpu import plan_cpu
from grok_kernels import registry
from grok_kernels.recording import Recorded

PARTS = ("schedule", "forward", "sample", "output")  # of a step, without the kernels
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


def measure(model: str | Path, requests: int, steps: int, eager: bool, waiting: int = 0) -> dict[str, float]:
    """Milliseconds of steps in which every request decodes, after the prompts and a warm-up: medians.

    "whole", "rest" (what is in no kernel), each of PARTS without its kernels, and each op's kernels.
    """
    pages = requests * ((40 + steps) // 16 + 2)
    engine = LLMEngine(
        model, max_num_seqs=requests, num_pages=pages, max_waiting=waiting + requests, enforce_eager=eager
    )
    params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    rng, taken = random.Random(1), list[dict[str, float]]()
    for i in range(requests + waiting):
        engine.add_request(str(i), rng.choices(range(3, engine.config.model.vocab_size), k=32), params)
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
            ops = Counter(replayed_kernels(engine)) - replayed + Counter(seconds)
            found = {part: after - parts[part] for part, after in engine.stats().seconds.items()}
            found["sample"] -= (drawn := ops.get("sample_top_p", 0.0))
            found["forward"] -= sum(ops.values()) - drawn
            taken.append({**found, **ops, "whole": whole, "rest": whole - sum(ops.values())})
    engine.close()
    return {name: median(t.get(name, 0.0) for t in taken) * 1e3 for name in taken[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait meanwhile")
    parser.add_argument("--model", help="another model; --layers says nothing then")
    parser.add_argument("--eager", action="store_true", help="call every kernel from Python, replay none")
    a = parser.parse_args()
    config = find_model(a.model)[1] if a.model else configuration(a.layers)
    rates = measure_rates()
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            write(Path(folder), config)
        model = a.model or Path(folder)
        found = {n: measure(model, n, a.steps, a.eager, a.waiting) for n in a.requests}
    size = a.model or f"{config.param_count() / 1e9:.2f} B parameters"
    title = f"ms of a decode step, {size}, {torch.get_num_threads()} thread(s), requests:"
    planned = [1e3 * plan_cpu(config, rates, context=40, batch=n).step_s for n in a.requests]
    served, first = grok_kernels.chosen(), found[a.requests[0]]
    rows = [
        ["the whole step", *(f"{s['whole']:.2f}" for s in found.values())],
        ["planned, int8, bf16 head", *(f"{ms:.2f}" for ms in planned)],
        ["in no kernel", *(f"{s['rest']:.3f} ({s['rest'] / s['whole']:.1%})" for s in found.values())],
    ]
    for name in (*PARTS, *(name for name in first if name not in (*PARTS, "whole", "rest"))):
        label = f"  {name}" if name in PARTS else f"{name} ({', '.join(served.get(name, ['cpu']))})"
        rows.append([label, *(f"{s.get(name, 0.0):.3f}" for s in found.values())])
    grid((title, *map(str, a.requests)), rows, terminal())


if __name__ == "__main__":
    main()
