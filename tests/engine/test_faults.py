"""A request's own failure ends that request alone; a failing step ends the requests in it, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import LLM, EngineClosedError, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams
from grok_engine.runtime.plan import StepPlan
from grok_engine.sampling.sampler import sample
from tests.engine.invariants import check_allocator, check_scheduler

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g1-b-q48-k128"
VOCAB, LONGEST = 2048, 32


def make(**options: Any) -> LLMEngine:
    return LLMEngine(FOLDER, dtype="float32", max_model_len=LONGEST, **options)


def drain(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def poison(engine: LLMEngine, is_poisoned: Callable[[str, int], bool]) -> None:
    """Make the hidden states NaN of every request for which is_poisoned(request_id, tokens generated so far)."""
    plain = engine.runner.forward

    def forward(plan: StepPlan, *routed: Any) -> torch.Tensor:
        x_RD = plain(plan, *routed).clone()
        row = 0
        for entry in plan.entries:
            request, answer = engine._by_seq_id[entry.seq_id]
            if is_poisoned(request.request_id, len(answer.state.output_ids)):
                x_RD[row : row + entry.num_logits] = float("nan")
            row += entry.num_logits
        return x_RD

    engine.runner.forward = forward  # type: ignore[method-assign]


class Boom(Exception):
    pass


def raises_after(count: int) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
    def processor(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        if len(output) >= count:
            raise Boom(f"after {count}")
        return logits_V

    return processor


@dataclass
class Kind:
    """A prompt and its parameters, with the outcome of a run alone."""

    prompt: list[int]
    options: dict[str, Any]
    clean: list[tuple[list[int], list[dict[int, float]] | None]]


def make_kinds(rng: random.Random, count: int) -> list[Kind]:
    engine, kinds = make(), []
    shared = rng.choices(range(3, VOCAB), k=20)
    for i in range(count):
        length = LONGEST - 1 if i % 20 == 0 else rng.choice([1, 1, 2, 3, 4, 5, 8, 9])
        prompt = rng.choices(range(3, VOCAB), k=length)
        if i % 4 == 1:
            prompt = shared[: rng.randint(1, 20)] + prompt[:3]
        options: dict[str, Any] = {
            "max_tokens": rng.randint(1, 5),
            "temperature": rng.choice([0, 1.0, 3.0]),
            "seed": i,
            "n": rng.choice([1, 1, 1, 2, 3]),
            "ignore_eos": True,
            "logprobs": rng.choice([None, 1]),
        }
        engine.add_request("x", prompt, SamplingParams(**options))
        outputs = drain(engine)
        kinds.append(Kind(prompt, options, [(a.token_ids, a.logprobs) for a in outputs[-1].outputs]))
    return kinds


def test_soak() -> None:
    """Thousands of requests, many of them invalid, failing or aborted: the others get the tokens they get alone."""
    rng = random.Random(1)
    kinds = make_kinds(rng, 60)
    engine = make(page_size=4, num_pages=36, max_num_seqs=24, max_num_batched_tokens=40)
    poison(engine, lambda request_id, done: request_id.startswith("nan") and done >= int(request_id[3]))
    wrong: list[Any] = [[], "text", [VOCAB], [5, -1], [5] * LONGEST, [5] * (LONGEST + 1), [2.5], 7, None]
    pending: dict[str, Kind] = {}
    seen: Counter[str] = Counter()
    total, serial = 2500, 0
    while serial < total or pending:
        for _ in range(rng.choice([0, 1, 4, 12]) if serial < total and len(pending) < 80 else 0):
            serial += 1
            kind, fate = rng.choice(kinds), rng.random()
            options = dict(kind.options)
            if fate < 0.05:
                with pytest.raises(ValueError):
                    engine.add_request(f"bad{serial}", rng.choice(wrong), SamplingParams(**options))
                seen["refused"] += 1
                continue
            if fate < 0.10:
                request_id = f"nan{rng.randint(0, 2)}-{serial}"
            elif fate < 0.15:
                after = rng.randint(0, 2)
                request_id, options["logits_processors"] = f"raise{after}-{serial}", [raises_after(after)]
            else:
                request_id = f"good-{serial}"
            if rng.random() < 0.3:
                options["output_kind"] = rng.choice(list(RequestOutputKind)[::2])
            engine.add_request(request_id, kind.prompt, SamplingParams(**options), rng.choice([0, 0, 0, -1, 1]))
            pending[request_id] = kind
        if pending and rng.random() < 0.3:
            gone = rng.choice(list(pending))
            if rng.random() < 0.5:
                engine.discard_request(gone)
                del pending[gone]
                seen["discarded"] += 1
            else:
                engine.abort_request(gone)
        for output in engine.step():
            if not output.finished:
                continue
            kind = pending.pop(output.request_id)
            for a, (tokens, logprobs) in zip(output.outputs, kind.clean, strict=False):
                seen[str(a.finish_reason)] += 1
                assert a.token_ids == tokens[: len(a.token_ids)], output.request_id
                assert logprobs is None or a.logprobs == logprobs[: len(a.token_ids)]
                if a.finish_reason == "error":
                    after = int(output.request_id.split("-")[0][-1])
                    assert len(a.token_ids) == after
                    expected = "logits have NaN" if output.request_id.startswith("nan") else f"Boom: after {after}"
                    assert expected in str(a.error)
                elif a.finish_reason == "length":
                    assert a.token_ids == tokens
                    assert a.error is None
                else:
                    assert a.finish_reason == "abort"
            if not any(a.finish_reason == "abort" for a in output.outputs):
                assert len(output.outputs) == len(kind.clean)
        if rng.random() < 0.05:
            check_scheduler(engine.scheduler)
    assert not engine.has_unfinished_requests()
    assert not engine._by_seq_id
    assert engine.allocator.available == engine.allocator.num_pages
    check_scheduler(engine.scheduler)
    check_allocator(engine.allocator, [])
    stats = engine.stats()
    assert (stats.requests, stats.scheduler.running, stats.scheduler.waiting) == (0, 0, 0)
    assert min(stats.scheduler.preemptions, stats.scheduler.hit_tokens, stats.scheduler.evictions) >= 100, stats
    assert min(seen[fate] for fate in ("refused", "discarded", "abort", "error")) >= 50, seen
    assert seen["length"] >= 1500, seen
    # nothing of all that affects a later request
    kind = kinds[2]
    engine.add_request("x", kind.prompt, SamplingParams(**kind.options))
    assert [(a.token_ids, a.logprobs) for a in drain(engine)[-1].outputs] == kind.clean


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("good", [0, 1])
def test_nan_in_rows_alike(temperature: float, good: int) -> None:
    """All greedy, all drawn, with and without a usable row: each is another path through the sampler."""
    engine = make()
    poison(engine, lambda request_id, done: request_id.startswith("nan") and done >= 1)
    params = SamplingParams(temperature=temperature, max_tokens=3, seed=1, ignore_eos=True)
    for request_id in ["nan1", "nan2", "good"][: 2 + good]:
        engine.add_request(request_id, [5, 6], params)
    last = {output.request_id: output.outputs[0] for output in drain(engine)}
    for request_id in ("nan1", "nan2"):
        assert (last[request_id].finish_reason, last[request_id].error) == ("error", "the model's logits have NaN")
        assert len(last[request_id].token_ids) == 1
    if good:
        assert (last["good"].finish_reason, len(last["good"].token_ids)) == ("length", 3)


def fail_once(engine: LLMEngine, where: str, error: BaseException) -> None:
    """Let the next call of a method of the runner raise; for "sample", once all answers but the last are sampled."""
    plain = getattr(engine.runner, where)

    def fail(*args: Any) -> Any:
        setattr(engine.runner, where, plain)
        raise error

    setattr(engine.runner, where, fail)


def tokens(output: RequestOutput) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


@pytest.mark.parametrize("where", ["forward", "run", "logits"])
@pytest.mark.parametrize("error", [Boom("no"), MemoryError("no"), KeyboardInterrupt("no"), GeneratorExit("no")])
def test_a_failed_step_costs_its_requests_alone(where: str, error: BaseException) -> None:
    """Pages and prefix cache stay right, what waited goes on, and the engine serves the same requests again."""
    engine = make(page_size=4, num_pages=16, max_num_seqs=2)
    shared = list(range(3, 15))
    requests = {
        "a": ([*shared, 20], SamplingParams(max_tokens=5, seed=1, ignore_eos=True, n=2)),
        "b": ([*shared, 21, 22], SamplingParams(max_tokens=5, seed=2, ignore_eos=True)),
        "c": ([5, 6], SamplingParams(max_tokens=3, seed=3, ignore_eos=True)),
    }
    alone = {}
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
        alone[name] = tokens(drain(engine)[-1])
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
        engine.step()  # "a" gets tokens for its two answers, and the others wait
    fail_once(engine, where, error)
    if isinstance(error, Exception):
        (ended,) = engine.step()
    else:
        with pytest.raises(type(error), match="no"):
            engine.step()
        ended, *_ = engine.step()
    assert ended.request_id == "a"
    assert ended.finished
    for answer, whole in zip(ended.outputs, alone["a"], strict=True):
        assert (answer.finish_reason, answer.cause) == ("error", error)
        assert answer.error == f"the step failed: {type(error).__name__}: no"
        assert answer.token_ids == whole[:3]
    assert not engine.closed
    check_scheduler(engine.scheduler)
    rest = {output.request_id: output for output in drain(engine) if output.finished}
    assert {name: tokens(output) for name, output in rest.items()} == {"b": alone["b"], "c": alone["c"]}
    engine.add_request("a", *requests["a"])
    again = drain(engine)[-1]
    assert tokens(again) == alone["a"]
    assert again.cached_tokens == 12  # the prefix cache has survived
    check_allocator(engine.allocator, [])
    assert engine.allocator.available == 16


def test_generate_raises_where_its_step_fails() -> None:
    llm = LLM(FOLDER, dtype="float32", max_model_len=LONGEST)
    expected = llm.generate([5, 6], SamplingParams(temperature=0))[0].outputs[0].token_ids
    for call in (lambda: llm.generate([[5, 6], [7]]), lambda: list(llm.stream([5, 6]))):
        fail_once(llm.engine, "run", Boom("the kernel failed"))
        with pytest.raises(RuntimeError, match="the step failed: Boom: the kernel failed") as caught:
            call()
        assert isinstance(caught.value.__cause__, Boom)
        assert not llm.engine.has_unfinished_requests()
        assert llm.generate([5, 6], SamplingParams(temperature=0))[0].outputs[0].token_ids == expected
    fail_once(llm.engine, "run", Boom())
    with pytest.raises(RuntimeError, match=r"the step failed: Boom$"):
        llm.generate([5, 6])


def test_only_a_lost_device_closes_the_engine() -> None:
    engine = make()
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=5))
    fail_once(engine, "run", Boom("an illegal memory access"))
    engine.runner.recover = lambda: False  # type: ignore[method-assign]
    calls: list[Callable[[], Any]] = [
        engine.step, engine.stats, lambda: engine.add_request("b", [5]), lambda: engine.logits([5]), engine.sleep,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(EngineClosedError, match="the device failed: an illegal memory access") as caught:
            call()
        assert isinstance(caught.value.__cause__, Boom)
    assert engine.closed
    assert not engine.has_unfinished_requests()
    engine.close()
    with pytest.raises(EngineClosedError, match="the device failed"):  # the first reason stays
        engine.step()


def test_many_answers_sample_from_one_row_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the first logits does not grow with n, and no answer depends on the parts."""
    rows = []

    def counted(samplers: Any, logits_BV: torch.Tensor) -> Any:
        rows.append(len(logits_BV))
        return sample(samplers, logits_BV)

    monkeypatch.setattr("grok_engine.engine.sample", counted)
    params = SamplingParams(max_tokens=3, seed=1, n=50, ignore_eos=True)
    found = []
    for seqs in (4, 64):
        engine = make(max_num_seqs=seqs)
        engine.add_request("a", [5, 6, 7], params)
        found.append(tokens(drain(engine)[-1]))
        assert max(rows) <= max(seqs, 1) or seqs == 64
        rows.clear()
    assert found[0] == found[1]


def test_outputs_share_no_list_with_the_engine() -> None:
    """Whatever a caller does to an output, this request and the prefix cache go on with their own tokens."""
    engine = make(page_size=4)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1, n=2)
    prompt = list(range(3, 12))
    engine.add_request("a", prompt, params)
    clean = drain(engine)[-1]
    scored = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, prompt_logprobs=1)
    engine.add_request("a", prompt, scored)
    clean_scored = drain(engine)[-1]
    for p, expected in ((params, clean), (scored, clean_scored)):
        given = list(prompt)
        engine.add_request("b", given, p)
        given[0] = 99
        while engine.has_unfinished_requests():
            (output,) = engine.step()
            assert tokens(output) == [e[: len(t)] for e, t in zip(tokens(expected), tokens(output), strict=True)]
            if output.finished:
                assert [a.logprobs for a in output.outputs] == [a.logprobs for a in expected.outputs]
            for answer in output.outputs:
                for spoilt in (answer.token_ids, answer.logprobs or []):
                    spoilt[:] = [77, 77, 77]  # type: ignore[list-item]
            output.prompt_token_ids[:] = [88] * 9
            for logprobs in (output.prompt_logprobs or [])[1:]:
                assert logprobs is not None
                logprobs.clear()
        engine.add_request("c", prompt, p)
        assert tokens(drain(engine)[-1]) == tokens(expected)


def test_a_refused_request_leaves_nothing() -> None:
    engine = make(page_size=4, num_pages=4)
    before = engine.stats()
    for prompt, params in [
        ([], SamplingParams()),
        ([VOCAB], SamplingParams()),
        ([5] * LONGEST, SamplingParams()),
        ([5] * 10, SamplingParams(max_tokens=8)),
        ([5], SamplingParams(logit_bias={VOCAB: 1.0})),
        ([5], SamplingParams(stop="x")),
    ]:
        with pytest.raises(ValueError):
            engine.add_request("x", prompt, params)
        assert not engine.has_unfinished_requests()
        assert engine.stats() == before
    engine.add_request("x", [5] * 10, SamplingParams(max_tokens=7, ignore_eos=True))
    assert len(drain(engine)[-1].outputs[0].token_ids) == 7


def test_logits_leave_no_page_behind_where_they_fail() -> None:
    engine = make(page_size=4, num_pages=4)

    def fail(*args: Any) -> Any:
        raise Boom

    plain, engine.runner.run = engine.runner.run, fail  # type: ignore[method-assign]
    with pytest.raises(Boom):
        engine.logits([5, 6, 7])
    assert engine.allocator.available == 4
    engine.runner.run = plain  # type: ignore[method-assign]
    assert engine.logits([5, 6, 7]).shape == (3, VOCAB)
