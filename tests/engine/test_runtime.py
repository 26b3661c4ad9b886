"""The engine's public API: requests, their parameters and their outputs."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine import (
    LLM,
    EngineClosedError,
    LLMEngine,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutput,
)
from grok_engine.sampling.params import uniform
from tests.engine.spelled import spell

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
OTHER = FOLDER.parent / "g1-b-q48-k128"
VOCAB = 1024
with np.load(FOLDER / "golden.npz") as _arrays:
    PROMPT: list[int] = _arrays["p1_tokens"].tolist()
    CONTINUATION: list[int] = _arrays["p1_f32_greedy_tokens"].tolist()
with np.load(OTHER / "golden.npz") as _arrays:
    OTHER_PROMPT: list[int] = _arrays["p1_tokens"].tolist()
    OTHER_CONTINUATION: list[int] = _arrays["p1_f32_greedy_tokens"].tolist()


def make(**options: Any) -> LLMEngine:
    return LLMEngine(FOLDER, **{"dtype": "float32", **options})


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})


def drawn(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 2.0, "max_tokens": 12, "ignore_eos": True, "seed": 5, **options})


@pytest.fixture(scope="module")
def engine() -> LLMEngine:
    return make()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    """The same model with a tokenizer trained here, with one piece for each token."""
    folder = tmp_path_factory.mktemp("texts") / "model"
    target = spell(FOLDER, folder, VOCAB, "abcdefghijklmnoprstuvwz", ['{"a": [1, 2.5, -3], "b": true}'])
    return LLMEngine(target, dtype="float32")


def drain(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert engine.allocator.available == engine.allocator.num_pages
    return outputs


def finish(engine: LLMEngine, prompt: Any, params: SamplingParams) -> RequestOutput:
    engine.add_request("it", prompt, params)
    *_, last = drain(engine)
    assert last.finished
    return last


def answer(engine: LLMEngine, prompt: Any, params: SamplingParams) -> Any:
    (only,) = finish(engine, prompt, params).outputs
    return only


# Life of a request


def test_add_and_step(engine: LLMEngine) -> None:
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    engine.add_request("a", PROMPT, greedy())
    assert engine.has_unfinished_requests()
    outputs = drain(engine)
    assert [o.outputs[0].token_ids for o in outputs] == [CONTINUATION[: i + 1] for i in range(12)]
    assert [o.finished for o in outputs] == [False] * 11 + [True]
    assert [o.outputs[0].finish_reason for o in outputs] == [None] * 11 + ["length"]
    assert {o.request_id for o in outputs} == {"a"}
    assert all(o.prompt_token_ids == PROMPT for o in outputs)
    assert engine.step() == []


def test_requests_join_a_running_batch(engine: LLMEngine) -> None:
    ids = ["a", "b", "c"]
    for request_id in ids:
        engine.add_request(request_id, PROMPT, greedy())
        engine.step()
    last = {o.request_id: o for o in drain(engine)}
    assert [last[i].outputs[0].token_ids for i in ids] == [CONTINUATION[:12]] * 3


def test_priority() -> None:
    engine = make(max_num_seqs=1)
    for request_id, priority in (("late", 1), ("middle", 0), ("first", -1)):
        engine.add_request(request_id, PROMPT, greedy(max_tokens=2), priority)
    assert [o.request_id for o in drain(engine) if o.finished] == ["first", "middle", "late"]


def test_abort(engine: LLMEngine) -> None:
    for request_id in "abc":
        engine.add_request(request_id, PROMPT, greedy(n=2))
    engine.step()
    engine.step()
    held = engine.stats().scheduler.pages_used
    engine.abort_request("a")
    assert engine.stats().scheduler.pages_used < held
    engine.abort_request(["c", "unknown", "a"])
    outputs = {o.request_id: o for o in engine.step()}
    for request_id in "ac":
        assert outputs[request_id].finished
        assert [(a.finish_reason, a.token_ids) for a in outputs[request_id].outputs] == [
            ("abort", CONTINUATION[:2])
        ] * 2
    assert not outputs["b"].finished
    assert [o.outputs[0].token_ids for o in drain(engine)][-1] == CONTINUATION[:12]


def test_abort_of_one_that_waits() -> None:
    engine = make(max_num_seqs=1)
    for request_id in "ab":
        engine.add_request(request_id, PROMPT, greedy())
    engine.step()
    engine.abort_request("b")
    outputs = drain(engine)
    assert next((o.request_id, o.outputs[0].token_ids) for o in outputs if o.finished) == ("b", [])
    engine.add_request("b", PROMPT, greedy())  # the name is free again
    assert drain(engine)[-1].outputs[0].token_ids == CONTINUATION[:12]
    engine.add_request("last", PROMPT, greedy())
    engine.abort_request("last")
    assert engine.has_unfinished_requests()  # to be told of
    assert [o.outputs[0].finish_reason for o in engine.step()] == ["abort"]
    assert not engine.has_unfinished_requests()
    engine.add_request("last", PROMPT, greedy())
    engine.discard_request("last")
    assert not engine.has_unfinished_requests()


def test_a_name_in_use(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPT, greedy())
    for wrong, why in (
        ("a", "in use: expected one that no unfinished request has"),
        (5, "not text"),
        (None, "not text"),
    ):
        with pytest.raises(ValueError, match=f"request_id={wrong!r} is {why}"):
            engine.add_request(wrong, PROMPT, greedy())  # type: ignore[arg-type]
    assert len({o.request_id for o in drain(engine)}) == 1
    with pytest.raises(ValueError, match="is not a SamplingParams"):
        engine.add_request("a", PROMPT, {"n": 1})  # type: ignore[arg-type]


def test_close() -> None:
    engine = make()
    engine.add_request("a", PROMPT, greedy())
    engine.step()
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    assert not engine.has_unfinished_requests()
    calls: Iterable[Any] = (
        engine.step, engine.stats, lambda: engine.add_request("b", PROMPT), lambda: engine.logits(PROMPT),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            call()
    engine.abort_request("a")
    engine.discard_request("a")


def test_two_engines_take_turns() -> None:
    a, b = make(page_size=3), LLMEngine(OTHER, dtype="float32")
    a.add_request("x", PROMPT, greedy(max_tokens=24))
    b.add_request("x", OTHER_PROMPT, greedy(max_tokens=24))
    last: dict[int, RequestOutput] = {}
    while a.has_unfinished_requests() or b.has_unfinished_requests():
        for i, engine in enumerate((a, b)):
            last.update((i, output) for output in engine.step())
    assert last[0].outputs[0].token_ids == CONTINUATION
    assert last[1].outputs[0].token_ids == OTHER_CONTINUATION
    a.close()
    b.add_request("y", OTHER_PROMPT, greedy())
    assert drain(b)[-1].outputs[0].token_ids == OTHER_CONTINUATION[:12]


def test_calls_of_an_llm_take_turns() -> None:
    """A call's steps also serve the other calls in progress; each gets its own outputs."""
    llm = LLM(FOLDER, dtype="float32")
    first, second = (llm.stream(PROMPT, greedy(max_tokens=n)) for n in (9, 24))
    found = [next(first).token_id, next(second).token_id, next(first).token_id]
    assert found == [CONTINUATION[0], CONTINUATION[0], CONTINUATION[1]]
    (result,) = llm.generate(PROMPT, greedy(max_tokens=15))
    assert result.outputs[0].token_ids == CONTINUATION[:15]
    assert [chunk.token_id for chunk in first] == CONTINUATION[2:9]
    second.close()
    assert not llm.engine.has_unfinished_requests()


# What an output holds


@pytest.mark.parametrize("n", [1, 3])
def test_output_kinds(texts: LLMEngine, n: int) -> None:
    params = drawn(n=n, logprobs=1, stop_token_ids=(CONTINUATION[4],), stop=["e"], min_tokens=3)
    outputs = {}
    for kind in RequestOutputKind:
        texts.add_request("x", "zwo wort", replace(params, output_kind=kind))
        outputs[kind] = drain(texts)
    whole = outputs[RequestOutputKind.FINAL_ONLY]
    assert len(whole) == 1
    for i, final in enumerate(whole[0].outputs):
        cumulative = [o.outputs[i] for o in outputs[RequestOutputKind.CUMULATIVE]]
        assert cumulative[-1] == final
        for a, b in pairwise(cumulative):
            assert b.text.startswith(a.text)
            assert b.token_ids[: len(a.token_ids)] == a.token_ids
            assert b.logprobs is not None
            assert len(b.logprobs) == len(b.token_ids)
        deltas = [a for o in outputs[RequestOutputKind.DELTA] for a in o.outputs if a.index == i]
        assert all(d.token_ids or d.finish_reason for d in deltas)  # an answer in which nothing is new is not shown
        assert "".join(d.text for d in deltas) == final.text
        assert [t for d in deltas for t in d.token_ids] == final.token_ids
        assert [t for d in deltas for t in d.logprobs or ()] == final.logprobs
        assert deltas[-1].finish_reason == final.finish_reason
        assert deltas[-1].cumulative_logprob == final.cumulative_logprob


def test_n(engine: LLMEngine) -> None:
    result = finish(engine, PROMPT, drawn(n=5))
    assert [a.index for a in result.outputs] == list(range(5))
    assert all(a.finish_reason == "length" and len(a.token_ids) == 12 for a in result.outputs)
    assert len({tuple(a.token_ids) for a in result.outputs}) == 5
    assert finish(engine, PROMPT, drawn(n=5)).outputs == result.outputs
    assert finish(engine, PROMPT, drawn()).outputs[0] == result.outputs[0]
    assert finish(engine, PROMPT, drawn(n=3)).outputs == result.outputs[:3]
    assert [a.token_ids for a in finish(engine, PROMPT, greedy(n=4)).outputs] == [CONTINUATION[:12]] * 4


def test_n_beyond_what_runs_at_once() -> None:
    engine, wide = make(max_num_seqs=2), make()
    assert finish(engine, PROMPT, drawn(n=5)).outputs == finish(wide, PROMPT, drawn(n=5)).outputs


def test_metrics(engine: LLMEngine) -> None:
    engine.add_request("x", PROMPT, greedy())
    outputs = drain(engine)
    arrival, first = outputs[0].metrics.arrival, outputs[0].metrics.first_token
    assert all((o.metrics.arrival, o.metrics.first_token) == (arrival, first) for o in outputs)
    assert [o.metrics.finished for o in outputs[:-1]] == [None] * 11
    assert first is not None
    finished = outputs[-1].metrics.finished
    assert finished is not None
    assert arrival < first < finished


def test_cached_tokens() -> None:
    engine = make(page_size=4)
    assert finish(engine, PROMPT, greedy()).cached_tokens == 0
    assert finish(engine, PROMPT, greedy()).cached_tokens == 16  # of 17: the last one is always computed
    assert finish(engine, PROMPT[:16], greedy()).cached_tokens == 12
    assert finish(engine, [7, *PROMPT], greedy()).cached_tokens == 0
    assert finish(engine, PROMPT + CONTINUATION[:8], greedy()).cached_tokens == 24
    assert finish(engine, PROMPT, greedy(prompt_logprobs=0)).cached_tokens == 0  # all of them have to be computed
    assert finish(make(page_size=4, enable_prefix_caching=False), PROMPT, greedy()).cached_tokens == 0


def test_stats() -> None:
    engine = make(page_size=4, num_pages=50)
    before = engine.stats()
    assert (before.requests, before.steps, before.prompt_tokens, before.generated_tokens) == (0, 0, 0, 0)
    engine.add_request("a", PROMPT, greedy())
    engine.add_request("b", [5], greedy(max_tokens=3))
    assert engine.stats().scheduler.waiting == engine.stats().requests == 2
    engine.step()
    now = engine.stats()
    assert (now.scheduler.running, now.scheduler.waiting, now.scheduler.pages_used) == (2, 0, 5 + 1)
    drain(engine)
    after = engine.stats()
    assert (after.requests, after.steps, after.generated_tokens) == (0, 12, 15)
    assert after.prompt_tokens == len(PROMPT) + 1
    assert after.kv_bytes == engine.runner.num_pages * engine.runner.page_bytes
    assert set(after.seconds) == {"schedule", "forward", "sample", "output"}
    assert all(s > 0 for s in after.seconds.values())


# What ends a request, and what it may say


def test_stop_strings(texts: LLMEngine) -> None:
    text = answer(texts, PROMPT, greedy()).text
    stop = text[5:8]
    cut = answer(texts, PROMPT, greedy(stop=stop))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[: text.index(stop)], "stop", stop)
    kept = answer(texts, PROMPT, greedy(stop=["#never#", stop], include_stop_str_in_output=True))
    assert (kept.text, kept.stop_reason) == (text[: text.index(stop) + len(stop)], stop)
    assert answer(texts, PROMPT, greedy(stop=["#never#"])).text == text


def test_stop_ids_and_min_tokens(engine: LLMEngine) -> None:
    end = CONTINUATION[3]
    at = CONTINUATION.index(end) + 1
    stopped = answer(engine, PROMPT, greedy(stop_token_ids=[end]))
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (CONTINUATION[:at], "stop", end)
    later = answer(engine, PROMPT, greedy(stop_token_ids=[end], min_tokens=8)).token_ids
    assert later[: at - 1] == CONTINUATION[: at - 1]
    assert len(later) >= 8
    assert end not in later[:8]


def test_max_tokens_none_fills_the_context() -> None:
    found = answer(make(max_model_len=len(PROMPT) + 9), {"prompt_token_ids": np.array(PROMPT)}, greedy(max_tokens=None))
    assert (found.token_ids, found.finish_reason) == (CONTINUATION[:9], "length")


def test_logit_bias_and_allowed_tokens(engine: LLMEngine) -> None:
    assert answer(engine, PROMPT, greedy(logit_bias={77: 1e4})).token_ids == [77] * 12
    assert answer(engine, PROMPT, greedy(logit_bias={CONTINUATION[0]: -1e4})).token_ids[0] != CONTINUATION[0]
    allowed = {5, 6, 700}
    assert set(answer(engine, PROMPT, drawn(allowed_token_ids=allowed, temperature=1e3)).token_ids) == allowed
    assert answer(engine, PROMPT, greedy(allowed_token_ids=[9])).token_ids == [9] * 12


def test_penalties(engine: LLMEngine) -> None:
    tokens = answer(engine, PROMPT, greedy(logit_bias={8: 50, 9: 49, 10: 48}, frequency_penalty=2)).token_ids
    assert len(set(tokens)) > 1
    assert answer(engine, PROMPT, greedy(logit_bias={8: 50, 9: 49, 10: 48})).token_ids == [8] * 12


def test_bad_words(texts: LLMEngine) -> None:
    tokenizer = texts.tokenizer
    assert tokenizer is not None
    spelled = {t: tokenizer.decode([t]).strip() for t in range(300, VOCAB)}
    piece, word = next((t, w) for t, w in spelled.items() if w.isalpha() and tokenizer.encode(w) == [t])
    assert answer(texts, PROMPT, greedy(logit_bias={piece: 1e4})).token_ids == [piece] * 12
    banned = answer(texts, PROMPT, greedy(logit_bias={piece: 1e4}, bad_words=[word]))
    assert piece not in banned.token_ids
    assert answer(texts, PROMPT, greedy(bad_words=[word])).token_ids == CONTINUATION[:12]


def test_logits_processors(engine: LLMEngine) -> None:
    seen: list[list[int]] = []

    def after_the_last(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        logits_V[:] = float("-inf")
        logits_V[(output[-1] if output else 40) + 1] = 0
        return logits_V

    assert answer(engine, PROMPT, greedy(logits_processors=[after_the_last])).token_ids == list(range(41, 53))
    assert seen == [list(range(41, 41 + i)) for i in range(12)]


def test_a_processor_that_raises_ends_its_own_request(engine: LLMEngine) -> None:
    def broken(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise KeyError("no such thing")
        return logits_V

    engine.add_request("bad", PROMPT, greedy(logits_processors=[broken]))
    engine.add_request("good", PROMPT, greedy())
    last = {o.request_id: o.outputs[0] for o in drain(engine)}
    assert last["bad"].finish_reason == "error"
    assert last["bad"].error == "logits processor: KeyError: 'no such thing'"
    assert last["bad"].token_ids == CONTINUATION[:3]
    assert last["good"].token_ids == CONTINUATION[:12]
    assert last["good"].error is None


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="the extra `structured` is not installed")
def test_structured(texts: LLMEngine) -> None:
    assert texts.tokenizer is not None
    decode = texts.tokenizer.decode
    for seed in range(4):
        params = drawn(
            structured=StructuredOutput(regex="[a-c]{3}-[0-9]+;"), seed=seed, max_tokens=60, ignore_eos=False
        )
        params = replace(params, logit_bias={t: 5.0 for t in range(VOCAB) if ";" in decode([t])})
        found = answer(texts, "wort", params)
        assert (found.finish_reason, found.error) == ("stop", None)
        assert re.fullmatch("[a-c]{3}-[0-9]+;", found.text), found.text
    with pytest.raises(ValueError):
        texts.add_request("x", "wort", SamplingParams(structured=StructuredOutput(regex="(")))
    assert not texts.has_unfinished_requests()


# Log-probabilities


@pytest.mark.parametrize("number", [0, 1, 5, -1])
def test_logprobs(number: int) -> None:
    llm = LLM(FOLDER, dtype="float32", max_logprobs=-1)
    params = drawn(logprobs=number, prompt_logprobs=number, frequency_penalty=1.0, top_k=20)
    (result,) = llm.generate(PROMPT, params)
    (found,) = result.outputs
    full = PROMPT + found.token_ids
    expected_TV = torch.log_softmax(llm.logits(full), -1)[:-1]
    assert found.logprobs is not None
    assert result.prompt_logprobs is not None
    assert len(found.logprobs) == 12
    assert len(result.prompt_logprobs) == len(PROMPT)
    assert result.prompt_logprobs[0] is None
    entries = [entry for entry in result.prompt_logprobs[1:] + found.logprobs if entry is not None]
    assert len(entries) == len(full) - 1
    scores = llm.score(full)
    for i, (entry, token) in enumerate(zip(entries, full[1:], strict=True)):
        top = torch.topk(expected_TV[i], VOCAB if number == -1 else number)
        assert set(entry) == {token, *top.indices.tolist()}
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(float(scores[i]), abs=1e-5)
        for t, (value, rank, text) in entry.items():
            assert value == pytest.approx(float(expected_TV[i, t]), abs=1e-5)
            assert rank == 1 + int((expected_TV[i] > expected_TV[i, t]).sum())
            assert text is None
    assert found.cumulative_logprob == pytest.approx(float(scores[len(PROMPT) - 1 :].sum()), abs=1e-4)


def test_no_logprobs(engine: LLMEngine) -> None:
    result = finish(engine, PROMPT, drawn())
    assert result.prompt_logprobs is None
    assert result.outputs[0].logprobs is None
    assert result.outputs[0].cumulative_logprob is None


def test_prompt_logprobs_of_one_token(engine: LLMEngine) -> None:
    assert finish(engine, [5], greedy(prompt_logprobs=2)).prompt_logprobs == [None]


# Seeds, number formats


def test_the_engine_s_seed_repeats_a_run() -> None:
    def run(seed: int | None) -> list[list[int]]:
        engine = make(seed=seed)
        for i in range(4):
            engine.add_request(str(i), PROMPT, drawn(seed=3 if i == 2 else None))
        return [o.outputs[0].token_ids for o in sorted(drain(engine), key=lambda o: o.request_id) if o.finished]

    first = run(11)
    assert len(set(map(tuple, first))) == 4
    assert run(11) == first
    assert [a == b for a, b in zip(run(12), first, strict=True)] == [False, False, True, False]
    assert run(None) != run(None)


def test_fp8_pages_are_close() -> None:
    """By the median over tokens of one layer: a router may turn a small difference into another expert."""
    prompt = random.Random(1).choices(range(3, VOCAB), k=90)
    exact_TV, bf16_TV, fp8_TV = (
        LLMEngine(OTHER, dtype="float32", kv_dtype=kv_dtype).logits(prompt)
        for kv_dtype in ("float32", "bfloat16", "fp8_e4m3")
    )
    bf16, fp8 = (float(((x - exact_TV).norm(dim=-1) / exact_TV.norm(dim=-1)).median()) for x in (bf16_TV, fp8_TV))
    assert 1e-4 < bf16 < 0.006, bf16
    assert 0.01 < fp8 < 0.08, fp8  # a rounding step is 16 times as large
    assert (fp8_TV.argmax(-1) == exact_TV.argmax(-1)).float().mean() > 0.85


def test_random_numbers_follow_from_seed_sequence_and_position() -> None:
    """With flat logits a token is its random number times V, also after preemptions."""

    def flat(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_V)

    for options in ({}, {"page_size": 1, "num_pages": 50, "max_num_seqs": 8, "max_num_batched_tokens": 20}):
        engine = make(**options)
        for seed in (0, 7):
            engine.add_request(str(seed), PROMPT, drawn(n=3, seed=seed, logits_processors=[flat]))
        last = {o.request_id: o for o in drain(engine)}
        for seed in (0, 7):
            for a in last[str(seed)].outputs:
                assert a.token_ids == [int(uniform(seed, a.index, i) * VOCAB) for i in range(12)]
    assert engine.stats().scheduler.preemptions > 0
