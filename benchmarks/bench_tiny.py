"""A decode step and a prompt of the small model that ships with the package."""

from __future__ import annotations

from typing import Any

from grok_engine import LLM, SamplingParams


def bench_decode(benchmark: Any) -> None:
    llm = LLM("tiny")
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    benchmark(llm.generate, [5, 6, 7], params)
    benchmark.extra_info["tokens/s"] = round(32 / benchmark.stats.stats.median, 1)


def bench_prompt(benchmark: Any) -> None:
    llm = LLM("tiny")
    tokens = list(range(4, 4 + 256))
    benchmark(llm.logits, tokens)
    benchmark.extra_info["tokens/s"] = round(len(tokens) / benchmark.stats.stats.median, 1)
