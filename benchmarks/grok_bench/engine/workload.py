"""The workload: prompts of random tokens, and when each request arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTHS, TOKENS, ARRIVALS, WARMUP = range(4)  # random streams: none depends on what another draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: its prompt and the number of tokens to generate."""

    prompt: list[int]
    output_len: int


def random_jobs(
    count: int, *, input_len: int, output_len: int, vocab_size: int, range_ratio: float = 0.0, prefix_len: int = 0,
    seed: int = 0,
) -> list[Job]:  # fmt: skip
    """`count` requests with a shared prefix of `prefix_len` tokens before `input_len` of their own.

    Both lengths are uniform in length·(1 ± range_ratio), as in vLLM's random data set.
    """
    lengths, tokens = _generator(seed, LENGTHS), _generator(seed, TOKENS)
    prefix = tokens.integers(vocab_size, size=prefix_len).tolist()
    inputs = _lengths(lengths, input_len, range_ratio, count)
    outputs = _lengths(lengths, output_len, range_ratio, count)
    return [
        Job(prompt=prefix + tokens.integers(vocab_size, size=n).tolist(), output_len=m)
        for n, m in zip(inputs, outputs, strict=True)
    ]


def warmup_jobs(jobs: Sequence[Job], count: int, *, vocab_size: int, seed: int = 0) -> list[Job]:
    """`count` requests with the lengths of the first of `jobs`, and other tokens."""
    tokens = _generator(seed, WARMUP)
    return [
        Job(prompt=tokens.integers(vocab_size, size=len(job.prompt)).tolist(), output_len=job.output_len)
        for job in (jobs[i % len(jobs)] for i in range(count))
    ]


def arrivals(count: int, request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Arrival times of `count` requests in seconds, in order, the first at 0.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1 / request_rate: 1 is a Poisson process, less is
    burstier. An infinite rate sends all at once.
    """
    if math.isinf(request_rate):
        return [0.0] * count
    gaps = _generator(seed, ARRIVALS).gamma(burstiness, 1 / (request_rate * burstiness), size=count)
    gaps[:1] = 0.0
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream))


def _lengths(generator: np.random.Generator, length: int, range_ratio: float, count: int) -> list[int]:
    low, high = max(math.floor(length * (1 - range_ratio)), 1), math.ceil(length * (1 + range_ratio))
    lengths: list[int] = generator.integers(low, high + 1, size=count).tolist()
    return lengths
