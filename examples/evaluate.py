"""Measure a model on the held-out part of the text it was trained on: the figures of its card.

    python examples/evaluate.py text1.txt text2.txt --model tiny --model runs/tiny/model-bf16

Bits per byte of each model in fp32 and bf16 arithmetic, bytes on disk, and how evenly the experts are used.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import sentencepiece as spm
import torch
from corpus import bits_per_byte, split
from torch import Tensor, nn

from grok_engine import LLM
from grok_engine.layers.moe import Router
from grok_engine.loading.resolve import resolve_model


def count_experts(llm: LLM) -> list[Counter[int]]:
    """For each layer a count that every later forward pass adds to."""
    counts: list[Counter[int]] = []

    def watch(router: Router) -> None:
        counter: Counter[int] = Counter()
        counts.append(counter)

        def hook(module: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            counter.update(output[1].flatten().tolist())

        router.register_forward_hook(hook)

    for module in llm.model.modules():
        if isinstance(module, Router):
            watch(module)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="the files of the training run, in any order")
    parser.add_argument("--model", action="append", help="`tiny` or a folder; may be given again")
    a = parser.parse_args()
    train, held_out = split(a.files)
    sizes = [sum(len(t.encode()) for t in texts) for texts in (train, held_out)]
    print(f"training text {sizes[0]:,} bytes, held out {sizes[1]:,} bytes in {len(held_out)} blocks\n")
    print("| model | weights | arithmetic | bytes on disk | held-out bits/byte |")
    print("|---|---|---|---|---|")
    usage: list[Counter[int]] = []
    for name in a.model or ["tiny"]:
        folder = resolve_model(name)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.suffix != ".md")
        tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for dtype in ("float32", "bfloat16"):
            llm = LLM(folder, dtype=dtype, enforce_eager=True)  # for the hooks
            counts = count_experts(llm)
            bpb = bits_per_byte(llm.model, tokenizer, held_out, llm.config.model.max_position)
            usage = usage or counts
            weights = str(next(m for m in llm.model.layers.modules() if hasattr(m, "parts")).weight.dtype).removeprefix(
                "torch."
            )
            print(f"| {name} | {weights} | {dtype} | {size:,} | {bpb:.4f} |", flush=True)
    print("\nShare of the routed rows by expert, first model, held-out text (even is 12.5%):\n")
    for layer, counter in enumerate(usage):
        total = sum(counter.values())
        print(f"layer {layer}: " + " ".join(f"{100 * counter[e] / total:.1f}%" for e in sorted(counter)))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
