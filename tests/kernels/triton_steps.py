"""Which kernels Triton compiles at an engine's start-up and in its steps, found without a GPU: the engine's decoder
runs on `meta` tensors with one layer of Grok-1 or Grok-2, and Triton's cache key of each launch is recorded.

`python -m tests.kernels.triton_steps [--steps N]` prints one JSON object per model: the kernels compiled at start-up,
and those after it. It runs in a process of its own, since under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import grok_kernels
from grok_engine.batch import Batch, KVPages
from grok_engine.config import ActFormat, KVDType, ModelConfig, WeightFormat
from grok_engine.loading.random import random_checkpoint
from grok_engine.loading.slots import slots
from grok_engine.models.decoder import Decoder
from grok_engine.models.families import PRESETS
from grok_engine.runtime.flatten import flatten
from grok_engine.runtime.graphs import rungs, widths
from grok_engine.runtime.pages import allocate_pages
from grok_engine.runtime.plan import Entry
from grok_kernels.chips import CHIPS
from grok_kernels.dtypes import dtype_of
from grok_kernels.triton import OPS, cross_compile, table
from grok_kernels.triton.steps import startup
from tests.kernels import compiled

CHIP = CHIPS["h100"]
LONGEST = 8192  # tokens of a request
TOKENS, PAGE = 1024, 16  # tokens of a step, tokens of a page


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model and how it is run."""

    model: str
    weights: WeightFormat
    activations: ActFormat
    kv: KVDType
    requests: int = 64  # in a step, at most


SERVED = (
    Served(model="grok-1", weights="int8", activations="none", kv="bfloat16"),
    Served(model="grok-1", weights="int8", activations="int8", kv="fp8_e4m3"),
    Served(model="grok-1", weights="fp8", activations="fp8", kv="fp8_e4m3"),
    Served(model="grok-1", weights="bf16", activations="none", kv="bfloat16", requests=300),
    Served(model="grok-2", weights="fp8", activations="fp8", kv="bfloat16", requests=100),
)


@contextmanager
def triton_serves() -> Iterator[None]:
    """Inside the block, the engine's calls of ops run Triton's functions, whatever device their tensors are on."""

    def served(op: str) -> Callable[..., Any]:
        signature, function = inspect.signature(getattr(grok_kernels, op)), getattr(table, op)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*bound.arguments.values())

        return call

    with ExitStack() as stack:
        for op in OPS:
            if hasattr(grok_kernels, op):
                stack.enter_context(patch.object(grok_kernels, op, served(op)))
        stack.enter_context(patch.object(grok_kernels, "fuses", lambda *_: True))
        yield


class Engine:
    """The forward passes of an engine's steps."""

    def __init__(self, served: Served) -> None:
        self.most = served.requests
        config: ModelConfig = replace(PRESETS[served.model], num_layers=1)
        self.model = Decoder(config, torch.bfloat16, "meta", LONGEST, served.activations)
        for slot in slots(self.model, random_checkpoint(self.model, served.weights)):
            slot.allocate("meta", packed=False)
        self.cache: list[KVPages] = allocate_pages(config, 4096, PAGE, dtype_of(served.kv), "meta")
        self.rungs, self.widths = rungs(served.requests), widths(LONGEST, PAGE)

    def step(self, queries: tuple[int, ...], contexts: tuple[int, ...]) -> None:
        """One step. Each request has `queries` new tokens after `contexts` old ones; a decode step is padded."""
        work = [
            Entry([0] * count, before, range(-(-(before + count) // PAGE)))
            for count, before in zip(queries, contexts, strict=True)
        ]
        rows = width = 0
        if max(queries) == 1:
            rows = next(n for n in self.rungs if n >= len(work))
            width = next(n for n in self.widths if n >= max(len(w.pages) for w in work))
        numbers, sizes = flatten(work, PAGE, rows, width)
        x_TD = self.model(Batch.of(numbers.to("meta"), sizes, max(queries)), self.cache)
        logits_BV = self.model.logits(x_TD[: len(work)])
        self.sample(logits_BV, len(work))

    def sample(self, logits_BV: Tensor, rows: int) -> None:
        draw = torch.empty((3, rows), device="meta")
        grok_kernels.sample_top_p(logits_BV, *draw)

    def mixed(self, random: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Queries and contexts of a random step."""
        requests = random.choice((1, 2, random.randint(1, self.most), self.most))
        queries = [1] * requests
        if random.random() < 0.6:
            left = TOKENS - requests
            for i in range(min(requests, random.randint(1, 3))):
                more = random.choice((0, 1, 15, 16, random.randint(0, max(left, 0)), max(left, 0)))
                queries[i] += min(more, left)
                left -= min(more, left)
        longest = random.choice((0, 1, 100, 1000, LONGEST - TOKENS))
        return tuple(queries), tuple(random.randint(0, longest) for _ in queries)


def replay(served: Served, steps: int) -> dict[str, Any]:
    """The kernels compiled at start-up, and those compiled in `steps` mixed steps after it."""
    engine, chance = Engine(served), random.Random(0)

    def run(queries: tuple[int, ...], contexts: tuple[int, ...]) -> set[tuple[str, str]]:
        return compiled.compiles(cross_compile.launches(lambda: engine.step(queries, contexts), CHIP), CHIP)

    first: set[tuple[str, str]] = set()
    with triton_serves(), torch.inference_mode():
        for queries in startup(served.requests, TOKENS):
            first |= run(queries, (0,) * len(queries))
        after: set[tuple[str, str]] = set()
        for _ in range(steps):
            after |= run(*engine.mixed(chance)) - first
    return {
        "served": str(served),
        "at_startup": sorted(name for name, _ in first),
        "after": sorted(name for name, _ in after),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    steps = parser.parse_args().steps
    for served in SERVED:
        print(json.dumps(replay(served, steps)), flush=True)


if __name__ == "__main__":
    main()
