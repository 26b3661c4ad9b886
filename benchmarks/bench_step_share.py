"""The runtime's share of a decode step at 1.35 B parameters of Grok's architecture, random int8 weights.

python -m benchmarks.bench_step_share [--requests 8] [--layers 8]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from grok_engine import LLMEngine, ModelConfig, SamplingParams
from grok_engine.checkpoint.layout import layout
from grok_engine.checkpoint.xai import write_xai


def configuration(layers: int) -> ModelConfig:
    """D 1536, 12 query and 2 key heads of 128, F 4096, 8 experts, V 32000: 1.35 B parameters in 8 layers."""
    return replace(
        ModelConfig.preset("grok-1"),
        name="grok-1.35b",
        vocab_size=32000,
        d_model=1536,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=2,
        d_ff=4096,
        max_position=2048,
    )


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every tensor of `config` in the release's layout."""
    rng = np.random.default_rng(0)
    for spec in layout(config):
        if spec.quantizable:
            weight = rng.integers(-127, 128, spec.shape, np.int8)
            scales = np.full(spec.scales_shape(1), 0.02 / 127, ml_dtypes.bfloat16)
            yield spec.name, (weight, scales)
        else:
            ones = len(spec.shape) == 1
            values = np.ones(spec.shape) if ones else rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5
            yield spec.name, (values.astype(np.float32), None)


def measure(layers: int, requests: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decode step by part, mean over `steps`, with every request decoding."""
    config = configuration(layers)
    with tempfile.TemporaryDirectory() as folder:
        write_xai(Path(folder), config, random_tensors(config))
        engine = LLMEngine(folder, max_num_seqs=requests, num_pages=64 * requests)
    params = SamplingParams(max_tokens=steps + 4, temperature=0, ignore_eos=True)
    for i in range(requests):
        engine.add_request(str(i), list(range(5 + i, 37 + i)), params)
    for _ in range(2):
        engine.step()
    before = engine.stats()
    for _ in range(steps):
        engine.step()
    after = engine.stats()
    done = after.steps - before.steps
    return {part: (after.seconds[part] - before.seconds[part]) / done * 1e3 for part in after.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=5)
    a = parser.parse_args()
    table = Table(title=f"{configuration(a.layers).param_count() / 1e9:.2f} B parameters, ms a decode step")
    for column in ("requests", "schedule", "forward", "sample", "output", "runtime's share"):
        table.add_column(column, justify="right")
    for requests in a.requests:
        ms = measure(a.layers, requests, a.steps)
        share = (ms["schedule"] + ms["output"]) / sum(ms.values())
        table.add_row(str(requests), *(f"{ms[part]:.3f}" for part in ms), f"{100 * share:.3f}%")
    Console().print(table)


if __name__ == "__main__":
    main()
