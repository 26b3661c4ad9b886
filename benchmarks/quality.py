"""What each format costs in quality: the perplexity of one text at every format, as a table in Markdown.

    python -m benchmarks.quality MODEL --text FILE [--limit 4096]

Each row is a run of its own over the same tokens and windows. The first, the file's own weights in fp32 arithmetic, is
what the others are compared with: Δ is their mean difference in nats per token, with the standard error of the pairs.
"""

from __future__ import annotations

import argparse
import math

import torch

from grok_engine import LLM
from grok_engine.config import EngineOptions
from grok_engine.layers.weight import FusedWeight, holders
from grok_engine.tools.eval import Evaluation, evaluate, read_text

ROWS: list[tuple[str, EngineOptions]] = [
    ("as stored, fp32 arithmetic", {"dtype": "float32"}),
    ("as stored", {}),
    ("as stored, head int8", {"head": "int8"}),
    ("as stored, head fp8", {"head": "fp8"}),
    ("as stored, head int4", {"head": "int4"}),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--limit", type=int, default=4096, help="tokens of the text")
    a = parser.parse_args()
    text, base = read_text(a.text), None
    for name, options in ROWS:
        with LLM(a.model, max_model_len=a.context, max_num_seqs=1, **options) as llm:
            result = evaluate(llm, text, context=a.context, stride=a.stride, limit=a.limit)
            if base is None:
                base = result
                print("\n".join(f"{k}: {v}" for k, v in result.lines() if k in ("text", "tokens", "windows")) + "\n")
                print(
                    "| weights | bits a weight | perplexity | bits per byte | Δ nats per token |\n|---|---|---|---|---|"
                )
            print(row(name, bits_per_weight(llm), result, base), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
