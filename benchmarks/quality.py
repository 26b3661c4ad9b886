"""What each format costs in quality: the perplexity of one text at every format, as a table in Markdown.

    python -m benchmarks.quality MODEL --text FILE [--limit 4096] [--json FILE]

Each row is a run of its own over the same tokens and windows. The first, the file's own weights in fp32 arithmetic, is
what the others are compared with: Δ is their mean difference in nats per token, with the standard error of the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from grok_engine import LLM
from grok_engine.config import EngineOptions
from grok_engine.layers.weight import FusedWeight, holders
from grok_engine.tools.eval import Evaluation, evaluate, read_text

ROWS: list[tuple[str, EngineOptions]] = [
    ("as stored, fp32 arithmetic", {"dtype": "float32"}),
    ("as stored", {}),
    ("bf16", {"weights": "bf16"}),
    ("bf16, KV fp8", {"weights": "bf16", "kv_dtype": "fp8_e4m3"}),
    ("int8, a scale per channel", {"weights": "int8"}),
    ("int8 per channel, activations int8", {"weights": "int8", "activations": "int8"}),
    ("int8, groups of 128", {"weights": "int8_g128"}),
    ("int8 groups of 128, activations int8", {"weights": "int8_g128", "activations": "int8"}),
    ("int4, groups of 32", {"weights": "int4"}),
    ("int4, groups of 128", {"weights": "int4_g128"}),
    ("int4 groups of 32, activations int8", {"weights": "int4", "activations": "int8"}),
    ("fp8, a scale per channel", {"weights": "fp8"}),
    ("fp8 per channel, activations fp8", {"weights": "fp8", "activations": "fp8"}),
    ("int8 groups of 128, activations int8, KV fp8", {
        "weights": "int8_g128", "activations": "int8", "kv_dtype": "fp8_e4m3",
    }),
]  # fmt: skip


def bits_per_weight(llm: LLM) -> float:
    """Of the layers' matrices, scales included."""
    weights = [module.weight for _, module in holders(llm.model.layers) if isinstance(module, FusedWeight)]
    return 8 * sum(w.nbytes for w in weights) / sum(math.prod(w.shape) for w in weights)


def row(name: str, bits: float, result: Evaluation, base: Evaluation) -> str:
    difference, error = result.minus(base)
    change = "" if result is base else f"{difference:+.5f} ± {error:.5f}"
    return f"| {name} | {bits:.2f} | {result.perplexity:.4f} | {result.bits_per_byte:.5f} | {change} |"


def run(model: str, text: str, **windows: int) -> Iterator[tuple[str, float, Evaluation]]:
    for name, options in ROWS:
        with LLM(model, max_model_len=windows["context"], max_num_seqs=1, **options) as llm:
            yield name, bits_per_weight(llm), evaluate(llm, text, **windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--limit", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--json", type=Path, help="write every evaluation here too")
    a = parser.parse_args()
    results: list[tuple[str, float, Evaluation]] = []
    for name, bits, result in run(a.model, read_text(a.text), context=a.context, stride=a.stride, limit=a.limit):
        if not results:
            print("\n".join(f"{key}: {value}" for key, value in result.lines() if key in ("text", "tokens", "windows")))
            print(
                "\n| weights | bits a weight | perplexity | bits per byte | Δ nats per token |\n|---|---|---|---|---|"
            )
        results.append((name, bits, result))
        print(row(name, bits, result, results[0][2]), flush=True)
        if a.json:
            rows = [{"name": name, "bits_per_weight": bits, **result.to_dict()} for name, bits, result in results]
            a.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
