"""A request's tokens and log-probabilities are bit for bit the same, alone or among any others. No tolerance here."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grok_kernels
from grok_engine import LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from tests.engine.invariants import check_allocator, check_scheduler

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
SMALL, GROUPED, DEEP = "g8-a-emb128-k16", "g1-b-q48-k128", "g8-e-12layers"
MODELS = (SMALL, GROUPED, DEEP)
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "fp8_e4m3"), ("float32", "fp8_e4m3"))
BACKENDS = (None, "reference")  # None selects by device, as a user has it
DEVICE = os.environ.get("GROK_TEST_DEVICE", "cpu")


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    arrives: int = 0  # before this step
    leaves: int | None = None  # aborted before this step


@contextmanager
def on(backend: str | None) -> Iterator[None]:
    with grok_kernels.use_backend(backend) if backend else nullcontext():
        yield


def make_engine(model: str, dtype: str, kv_dtype: str, **options: Any) -> LLMEngine:
    return LLMEngine(GOLDENS / model, dtype=dtype, kv_dtype=kv_dtype, **{"device": DEVICE, **options})


@cache
def plain_engine(model: str, dtype: str, kv_dtype: str) -> LLMEngine:
    return make_engine(model, dtype, kv_dtype, enable_prefix_caching=False, enforce_eager=True)


def facts(output: RequestOutput) -> Any:
    """All that must not depend on other requests: floats unrounded, dictionaries in their order."""

    def listed(logprobs: Any) -> Any:
        return None if logprobs is None else [None if d is None else list(d.items()) for d in logprobs]

    answers = [
        (a.index, a.token_ids, a.finish_reason, a.stop_reason, listed(a.logprobs), a.cumulative_logprob)
        for a in output.outputs
    ]
    return answers, listed(output.prompt_logprobs)


def run(engine: LLMEngine, traffic: list[Request]) -> dict[int, RequestOutput]:
    """Final outputs of the requests that were not aborted; each arrives and leaves at its own step."""
    finished: dict[int, RequestOutput] = {}
    step = 0
    while step <= max(r.arrives for r in traffic) or engine.has_unfinished_requests():
        for i, r in enumerate(traffic):
            if r.arrives == step:
                engine.add_request(str(i), r.prompt, r.params, r.priority)
            if r.leaves == step:
                engine.discard_request(str(i))
        for output in engine.step():
            assert output.finished
            finished[int(output.request_id)] = output
        check_scheduler(engine.scheduler)
        step += 1
    assert engine.allocator.available == engine.allocator.num_pages
    check_allocator(engine.allocator, [])
    return finished


@cache
def alone(model: str, dtype: str, kv_dtype: str, backend: str | None, prompt: tuple[int, ...], key: str) -> Any:
    """A request's output in an engine without other requests, whose prompt is computed in one piece."""
    params = _params[key]
    with on(backend):
        (output,) = run(plain_engine(model, dtype, kv_dtype), [Request(prompt, params)]).values()
    return facts(output)


_params: dict[str, SamplingParams] = {}  # by repr, the key of cached results


def assert_as_alone(engine: LLMEngine, traffic: list[Request], backend: str | None = None) -> dict[int, RequestOutput]:
    c = engine.config
    with on(backend):
        finished = run(engine, traffic)
    assert len(finished) >= sum(r.leaves is None for r in traffic)
    for i, output in finished.items():
        key = repr(traffic[i].params)
        _params[key] = traffic[i].params
        expected = alone(c.model.name, c.dtype, str(c.kv_dtype), backend, traffic[i].prompt, key)
        assert facts(output) == expected, f"request {i} of {len(traffic)}: {traffic[i]}"
    return finished


def make_traffic(seed: int, vocab: int, requests: int = 20, longest: int = 60, last_arrival: int = 12) -> list[Request]:
    """Requests of every kind, a third of them with a shared prefix."""
    rng = random.Random(seed)
    tokens = range(3, vocab)
    shared = [tuple(rng.choices(tokens, k=longest // 2)) for _ in range(2)]
    traffic = []
    for i in range(requests):
        length = rng.choice([1, 2, 3, 7, 16, 17, rng.randint(1, longest), longest])
        prompt = tuple(rng.choices(tokens, k=length))
        if i % 3 == 0:
            prompt = (rng.choice(shared)[: rng.randint(1, longest // 2)] + prompt)[:longest]
        elif i % 5 == 0:
            prompt = shared[0]  # whole, and more than once
        drawn = rng.random() < 0.6
        params = SamplingParams(
            max_tokens=rng.randint(1, 12),
            ignore_eos=True,
            n=rng.choice([1, 1, 2, 3]),
            temperature=rng.choice([0.7, 1.0, 2.0]) if drawn else 0,
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 0, 40]),
            min_p=rng.choice([0.0, 0.0, 0.01]),
            seed=rng.randrange(2**63),
            logprobs=rng.choice([None, 0, 1, 5]),
            prompt_logprobs=rng.choice([None, None, 0, 3]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        arrives = rng.randrange(last_arrival)
        leaves = arrives + rng.randint(1, 8) if rng.random() < 0.2 else None
        traffic.append(Request(prompt, params, rng.choice([0, 0, 0, 1, -1]), arrives, leaves))
    return traffic


SHAPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "page of 1": {"page_size": 1, "max_num_seqs": 8, "max_num_batched_tokens": 9},
    "page of 3, chunks of 5 at most": {"page_size": 3, "max_num_seqs": 5, "max_num_batched_tokens": 5},
    "page of 64": {"page_size": 64, "max_num_seqs": 16, "max_num_batched_tokens": 33},
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 7},
    "few pages": {"page_size": 3, "num_pages": 40, "max_num_seqs": 12, "max_num_batched_tokens": 24},
    "few pages of 1": {"page_size": 1, "num_pages": 90, "max_num_seqs": 12, "max_num_batched_tokens": 16},
    "few pages of 16": {"page_size": 16, "num_pages": 9, "max_num_seqs": 12, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_batch(shape: str, caching: bool) -> None:
    engine = make_engine(SMALL, "float32", "float32", enable_prefix_caching=caching, **SHAPES[shape])
    finished = assert_as_alone(engine, make_traffic(1, 1024))
    stats = engine.stats().scheduler
    if "few" in shape:
        assert stats.preemptions >= 2, stats
    if caching and shape not in ("defaults", "page of 64", "few pages of 16"):
        assert stats.hit_tokens >= 20, stats
        assert any(output.cached_tokens for output in finished.values())
    if not caching:
        assert not any(output.cached_tokens for output in finished.values())


@pytest.mark.parametrize("backend", BACKENDS, ids=["by device", "reference"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=map("-".join, DTYPES))
def test_any_number_format(dtype: str, kv_dtype: str, backend: str | None) -> None:
    engine = make_engine(SMALL, dtype, kv_dtype, **SHAPES["few pages"])
    assert_as_alone(engine, make_traffic(2, 1024, requests=16), backend)
    assert engine.stats().scheduler.preemptions >= 3
    assert engine.stats().scheduler.hit_tokens >= 30


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES[::2], ids=map("-".join, DTYPES[::2]))
@pytest.mark.parametrize("model", [GROUPED, DEEP])
def test_any_model(model: str, dtype: str, kv_dtype: str) -> None:
    engine = make_engine(model, dtype, kv_dtype, **SHAPES["few pages"])
    assert_as_alone(engine, make_traffic(3, 512, requests=9, longest=40, last_arrival=5))
    assert engine.stats().scheduler.preemptions >= 1


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_through_random_engines(seed: int) -> None:
    rng = random.Random(seed)
    seqs = rng.choice([2, 6, 16])
    engine = make_engine(
        SMALL, "float32", "float32", page_size=rng.choice([1, 2, 5, 16]), enable_prefix_caching=rng.random() < 0.7,
        max_num_seqs=seqs, max_num_batched_tokens=seqs + rng.choice([0, 3, 50]),
        kv_memory=rng.randint(75, 200) * 2 * 2 * 8 * 16 * 4,  # so many tokens
    )  # fmt: skip
    assert_as_alone(engine, make_traffic(100 + seed, 1024, requests=14))


def test_a_prompt_found_in_the_cache_whole_and_in_part() -> None:
    """A cached prefix of any length leaves the bits as they are without one."""
    rng = random.Random(5)
    prompt = tuple(rng.choices(range(3, 1024), k=49))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    params = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
    engine = make_engine(SMALL, "bfloat16", "bfloat16", page_size=4)
    assert_as_alone(engine, [Request(prompt, params)])
    for length in range(1, 50, 3):
        traffic = [Request(prompt[:length], params), Request((*prompt[:length], 7), params)]
        finished = assert_as_alone(engine, traffic)
        assert finished[0].cached_tokens == (length - 1) // 4 * 4
        assert finished[1].cached_tokens == length // 4 * 4


def test_prompt_logprobs_survive_preemption() -> None:
    """The chunks of a second attempt need not be those of the first."""
    rng = random.Random(6)

    def request(length: int, tokens: int, arrives: int, prompt_logprobs: int | None) -> Request:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=prompt_logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        return Request(tuple(rng.choices(range(3, 1024), k=length)), params, 0, arrives)

    traffic = [request(4, 30, 0, None) for _ in range(4)] + [request(50, 4, 1, 2), request(30, 4, 2, 0)]
    engine = make_engine(
        SMALL, "float32", "float32", page_size=2, num_pages=58, max_num_seqs=6, max_num_batched_tokens=7
    )
    finished = assert_as_alone(engine, traffic)
    assert engine.stats().scheduler.preemptions >= 2
    for i in (4, 5):
        values = finished[i].prompt_logprobs
        assert values is not None
        assert values[0] is None
        assert all(value is not None for value in values[1:])


@pytest.mark.parametrize("backend", BACKENDS, ids=["by device", "reference"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES, ids=map("-".join, DTYPES))
@pytest.mark.parametrize("model", MODELS)
def test_chunks_of_a_prompt(model: str, dtype: str, kv_dtype: str, backend: str | None) -> None:
    engine = plain_engine(model, dtype, kv_dtype)
    rng = random.Random(7)
    prompt = rng.choices(range(3, engine.config.model.vocab_size), k=70)
    chunks = (1, 2, 3, 15, 16, 17, 33, 64, 69) if model == SMALL else (3, 16, 33)
    with on(backend):
        whole = engine.logits(prompt)
        for chunk in chunks:
            assert torch.equal(engine.logits(prompt, chunk=chunk), whole), chunk
        assert torch.equal(engine.logits(prompt[:41]), whole[:41])


def test_several_threads() -> None:
    """For any number of threads, also where work does not divide evenly."""
    engine, before = plain_engine(GROUPED, "float32", "float32"), torch.get_num_threads()
    prompt = random.Random(8).choices(range(3, 2048), k=100)
    try:
        torch.set_num_threads(1)
        expected = engine.logits(prompt)
        torch.set_num_threads(3)
        for chunk in (100, 1, 37):
            assert torch.equal(engine.logits(prompt, chunk=chunk), expected), chunk
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS)
def test_the_goldens_in_one_batch_among_noise(model: str) -> None:
    with np.load(GOLDENS / model / "golden.npz") as arrays:
        golden = {name: arrays[name].tolist() for name in arrays.files if name.endswith("_tokens")}
    count = sum(f"p{i}_tokens" in golden for i in range(100))
    engine = make_engine(model, "float32", "float32", max_num_seqs=16, max_num_batched_tokens=32)
    vocab = engine.config.model.vocab_size
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    noise = [replace(r, leaves=None) for r in make_traffic(9, vocab, requests=6, longest=30, last_arrival=3)]
    wanted = [Request(tuple(golden[f"p{i}_tokens"]), greedy, arrives=i) for i in range(count)] * 2
    finished = run(engine, noise + wanted)
    for i in range(2 * count):
        assert finished[len(noise) + i].outputs[0].token_ids == golden[f"p{i % count}_f32_greedy_tokens"]
