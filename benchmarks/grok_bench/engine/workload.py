"""The workload: prompts of random tokens or of a trace, and when each request arrives."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS, TOKENS, ARRIVALS, WARMUP = range(4)  # random streams: none depends on what another draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: its arrival in seconds after the start, its prompt, and the number of tokens to generate."""

    prompt: list[int]
    output_len: int
    arrival: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLine:
    """One request of a trace; `arrival` and `output_len` None leave it to the options."""

    arrival: float | None
    prompt: list[int] | None
    input_len: int
    output_len: int | None


def random_jobs(
    count: int,
    *,
    input_len: int,
    output_len: int,
    vocab_size: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Job]:
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
    """Arrival times of `count` requests in seconds, the first at 0.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1 / request_rate: 1 is a Poisson process, less is
    burstier. An infinite rate sends all at once.
    """
    if math.isinf(request_rate):
        return [0.0] * count
    gaps = _generator(seed, ARRIVALS).gamma(burstiness, 1 / (request_rate * burstiness), size=count)
    gaps[:1] = 0.0
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def at(jobs: Sequence[Job], times: Sequence[float]) -> list[Job]:
    """The jobs with these arrivals."""
    return [replace(job, arrival=time) for job, time in zip(jobs, times, strict=True)]


def read_trace(path: str | Path) -> list[TraceLine]:
    """A JSONL file: {"arrival": s, "input_len": n, "output_len": m}, or "prompt_token_ids" in the place of "input_len".

    Either all lines have an arrival or none has. ValueError names the file, the line and the value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append(_trace_line(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no request: expected lines of JSON")
    timed = [line.arrival is not None for line in lines]
    if any(timed) and not all(timed):
        raise ValueError(
            f"{path}: {sum(timed)} of {len(timed)} requests have an arrival: expected all of them, or none"
        )
    return sorted(lines, key=lambda line: line.arrival or 0.0)


def trace_jobs(trace: Sequence[TraceLine], *, output_len: int, vocab_size: int, seed: int = 0) -> list[Job]:
    """The requests of a trace, the first of them at 0.

    Lines without tokens get random ones of their length; lines without an output length get `output_len`.
    """
    first = trace[0].arrival or 0.0
    tokens = _generator(seed, TOKENS)
    return [
        Job(
            prompt=tokens.integers(vocab_size, size=line.input_len).tolist() if line.prompt is None else line.prompt,
            output_len=output_len if line.output_len is None else line.output_len,
            arrival=0.0 if line.arrival is None else line.arrival - first,
        )
        for line in trace
    ]


def check_jobs(jobs: Sequence[Job], *, vocab_size: int, max_model_len: int) -> None:
    """ValueError for the first that the engine would refuse."""
    for i, job in enumerate(jobs):
        need = len(job.prompt) + job.output_len
        if need > max_model_len:
            raise ValueError(
                f"request {i} has {len(job.prompt)} prompt tokens and {job.output_len} to come, {need} in all, "
                f"more than max_model_len={max_model_len}"
            )
        for token in job.prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"request {i}: token id {token} is not in the vocabulary, 0..{vocab_size - 1}")


def _trace_line(text: str) -> TraceLine:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{text.strip()[:40]!r} is not an object")
    known = ("arrival", "prompt_token_ids", "input_len", "output_len")
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {name!r}: expected {', '.join(known)}")
    found: list[Any] = [values.get(name) for name in known]
    arrival, prompt, input_len, output_len = found
    if arrival is not None and not (type(arrival) in (int, float) and math.isfinite(arrival) and arrival >= 0):
        raise ValueError(f"arrival={arrival!r} is not a number of seconds, 0 or more")
    if (prompt is None) == (input_len is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"{given} of input_len and prompt_token_ids: expected one of them")
    for name, value in (("input_len", input_len), ("output_len", output_len)):
        if value is not None and not (_is_count(value) and value >= 1):
            raise ValueError(f"{name}={value!r} is not a positive integer")
    if prompt is not None and not (isinstance(prompt, list) and prompt and all(map(_is_count, prompt))):
        raise ValueError(f"prompt_token_ids={str(prompt)[:40]} is not a list of token ids")
    return TraceLine(
        arrival=None if arrival is None else float(arrival),
        prompt=prompt,
        input_len=input_len if prompt is None else len(prompt),
        output_len=output_len,
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream))


def _lengths(generator: np.random.Generator, length: int, range_ratio: float, count: int) -> list[int]:
    low, high = max(math.floor(length * (1 - range_ratio)), 1), math.ceil(length * (1 + range_ratio))
    lengths: list[int] = generator.integers(low, high + 1, size=count).tolist()
    return lengths
