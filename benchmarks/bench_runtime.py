"""The runtime's overhead: the time of a decode step by part, without the forward pass.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_runtime [--steps 200]

The engine runs the small model that ships, with a runner that prepares a step's tensors and then returns zeros as
hidden states and the same random logits. The tensor operations of sampling have a column of their own, and are not
counted as runtime; the vocabulary of 1536 keeps them small.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import grok_kernels
from grok_engine import LLMEngine, RequestOutputKind, SamplingParams
from grok_engine.runtime.plan import Entry
from grok_engine.runtime.runner import Runner
from grok_engine.sampling import sampler

RUNNING = (1, 8, 64, 256)
QUEUED = 10_000
PROMPT, NEW = 24, 400
STEP_AIM, REQUEST_AIM, QUEUE_AIM = 200.0, 20.0, 1000.0  # µs: a step, plus each request, plus QUEUED waiting
PARTS = ("schedule", "prepare", "sample", "output")
GREEDY: dict[str, Any] = {"temperature": 0.0, "output_kind": RequestOutputKind.DELTA}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": {**GREEDY, "temperature": 1.0, "seed": 1},
    "logprobs": {**GREEDY, "logprobs": 1},
    "cumulative": {**GREEDY, "output_kind": RequestOutputKind.CUMULATIVE},
}


class StubRunner(Runner):
    """Prepares a step's tensors and runs no model."""

    def __init__(self, other: Runner, rows: int) -> None:
        self.__dict__ |= other.__dict__
        c = self.config
        generator = torch.Generator().manual_seed(1)
        self._logits_BV = torch.randn(rows, c.model.vocab_size, generator=generator)
        self._x_TD = torch.zeros(max(c.max_num_batched_tokens, c.max_num_seqs), c.model.d_model)

    def run(self, entries: Sequence[Entry]) -> Tensor:
        batch = self._batch(entries)
        return self._x_TD[: batch.tokens_T.shape[0]]

    def logits(self, x_TD: Tensor) -> Tensor:
        return self._logits_BV[: x_TD.shape[0]]


@dataclass
class Steps:
    """Medians over steps, in µs: each part of the runtime, the tensor operations of sampling, and the whole."""

    running: int
    parts: dict[str, float]
    maths: float
    total: float

    @property
    def aim(self) -> float:
        return STEP_AIM + REQUEST_AIM * self.running

    @property
    def runtime(self) -> float:
        return sum(self.parts.values())


def make_engine(running: int) -> LLMEngine:
    engine = LLMEngine(
        "tiny", max_num_seqs=running, max_num_batched_tokens=4096, max_waiting=2 * QUEUED,
        num_pages=running * -(-(PROMPT + NEW + 16) // 16),
    )  # fmt: skip
    engine.runner = StubRunner(engine.runner, running)
    return engine


def add(engine: LLMEngine, count: int, name: str, options: dict[str, Any]) -> None:
    rng = random.Random(1)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **options)
    for i in range(count):
        engine.add_request(f"{name}{i}", rng.choices(range(3, 1500), k=PROMPT), params)


@contextmanager
def timing(spent: list[float]) -> Iterator[None]:
    """Add to spent[0] the seconds in sampling's tensor operations: the kernel that draws, and what reads whole rows."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **options)
            spent[0] += time.perf_counter() - began
            return result

        return call

    reads = ("amax", "argmax", "topk", "gather", "sum", "nonzero", "__gt__", "__ge__", "__and__")
    functions = [(grok_kernels, "sample_top_p"), (torch, "log_softmax"), (sampler, "_largest")]
    with ExitStack() as patches:
        for owner, name in (*functions, *((Tensor, name) for name in reads)):
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


def measure(engine: LLMEngine, steps: int) -> Steps:
    """Time steps that only decode: every prompt must have been computed."""
    taken: list[dict[str, float]] = []
    spent = [0.0]
    running = engine.stats().scheduler.running
    with timing(spent):
        for _ in range(steps):
            spent[0], before = 0.0, engine.stats().seconds
            began = time.perf_counter()
            outputs = engine.step()
            total = time.perf_counter() - began
            assert len(outputs) == running
            seconds = {part: after - before[part] for part, after in engine.stats().seconds.items()}
            seconds["prepare"] = seconds.pop("forward")
            seconds["sample"] -= spent[0]
            taken.append({**seconds, "maths": spent[0], "total": total})
    found = {name: median(t[name] for t in taken) * 1e6 for name in taken[0]}
    return Steps(running, {part: found[part] for part in PARTS}, found["maths"], found["total"])


def decoding(running: int, kind: str) -> LLMEngine:
    """An engine whose requests have finished their prompts and generated a few tokens."""
    engine = make_engine(running)
    add(engine, running, "r", KINDS[kind])
    for _ in range(8):
        engine.step()
    return engine


def queued(running: int, steps: int) -> tuple[float, float, float]:
    """µs of a step without and with QUEUED waiting requests, and µs to add one of them."""
    engine = decoding(running, "greedy")
    without = measure(engine, steps)
    began = time.perf_counter()
    add(engine, QUEUED, "waiting", KINDS["greedy"])
    each = (time.perf_counter() - began) / QUEUED * 1e6
    assert engine.stats().scheduler.waiting == QUEUED
    return without.runtime, measure(engine, steps).runtime, each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps per row, of which medians are printed")
    steps = parser.parse_args().steps
    table = Table(title=f"µs of a decoding step, vocabulary 1536, {torch.get_num_threads()} thread(s)")
    for name in ("requests", "running", *PARTS, "runtime", "a request", "aim", "of it", "(logits maths)"):
        table.add_column(name, justify="left" if name == "requests" else "right")
    for kind in KINDS:
        for running in RUNNING:
            s = measure(decoding(running, kind), steps)
            numbers = (*s.parts.values(), s.runtime, s.runtime / running, s.aim)
            table.add_row(
                kind, str(running), *(f"{us:.0f}" for us in numbers), f"{s.runtime / s.aim:.0%}", f"{s.maths:.0f}"
            )
        table.add_section()
    without, with_queue, each = queued(64, steps)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(
        f"64 running: {without:.0f} µs, with {QUEUED:,} waiting {with_queue:.0f} µs: {with_queue - without:+.0f} µs "
        f"(aim: +{QUEUE_AIM:.0f} at most); to add one: {each:.0f} µs"
    )


if __name__ == "__main__":
    main()
