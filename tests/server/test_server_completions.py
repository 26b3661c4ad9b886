"""/v1/completions against the engine itself."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp

from grok_engine import AsyncLLM, RequestOutput, SamplingParams
from tests.server.calls import events, idle, post, refusal, run

PATH, PROMPT = "/v1/completions", "My dear Watson"
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


def expected(llm: AsyncLLM, prompt: Any, **params: Any) -> RequestOutput:
    async def last() -> RequestOutput:
        *_, found = [output async for output in llm.generate(prompt, SamplingParams(**{**GREEDY, **params}))]
        return found

    output: RequestOutput = run(last())
    return output


def test_a_text_and_its_token_ids_give_the_engines_text(app: ASGIApp, llm: AsyncLLM) -> None:
    ids = llm.encode(PROMPT, add_special_tokens=True)
    want = expected(llm, PROMPT).outputs[0].text
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        found = post(app, PATH, {"prompt": prompt, **GREEDY})
        (choice,) = found["choices"]
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (want, "length", None)
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert (found["usage"]["completion_tokens"], found["usage"]["total_tokens"]) == (6, len(ids) + 6)
        assert (found["object"], found["model"]) == ("text_completion", "tiny")


def test_prompts_times_answers_are_choices_in_order(app: ASGIApp, llm: AsyncLLM) -> None:
    body = {"prompt": [PROMPT, "The President"], "n": 2, "seed": 5, "max_tokens": 5, "temperature": 1}
    want = [answer.text for prompt in body["prompt"]  # type: ignore[attr-defined]
            for answer in expected(llm, prompt, n=2, seed=5, max_tokens=5, temperature=1).outputs]  # fmt: skip
    found = post(app, PATH, body)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found["choices"]] == want
    streamed = [""] * 4
    for event in events(app, PATH, body):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == want


def test_a_stream_is_the_whole_in_pieces(app: ASGIApp) -> None:
    body = {"prompt": PROMPT, **GREEDY, "logprobs": 2, "echo": True, "return_token_ids": True}
    whole = post(app, PATH, body)["choices"][0]
    pieces = [event["choices"][0] for event in events(app, PATH, body)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [t for piece in pieces for t in piece["token_ids"]] == whole["token_ids"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values
    assert pieces[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_usage_comes_once_or_with_every_chunk(app: ASGIApp) -> None:
    body = {"prompt": PROMPT, **GREEDY}
    assert all("usage" not in event for event in events(app, PATH, body))
    *others, last = events(app, PATH, {**body, "stream_options": {"include_usage": True, "include_obfuscation": True}})
    assert all(event["usage"] is None for event in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    counts = [event["usage"]["completion_tokens"]
              for event in events(app, PATH, {**body, "stream_options": {"continuous_usage_stats": True}})]  # fmt: skip
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_log_probabilities_are_the_engines(app: ASGIApp, llm: AsyncLLM) -> None:
    want = expected(llm, PROMPT, logprobs=3, prompt_logprobs=3)
    found = post(app, PATH, {"prompt": PROMPT, **GREEDY, "logprobs": 3})["choices"][0]["logprobs"]
    answer = want.outputs[0]
    assert answer.logprobs is not None
    chosen = [found[token] for token, found in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert found["tokens"] == [each.decoded_token for each in chosen]
    assert found["token_logprobs"] == [each.logprob for each in chosen]
    for top, each in zip(found["top_logprobs"], answer.logprobs, strict=True):
        assert top == {one.decoded_token: one.logprob for one in each.values()}
    named = post(app, PATH, {"prompt": PROMPT, **GREEDY, "logprobs": 0, "return_tokens_as_token_ids": True})
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in answer.token_ids]


def test_echo_puts_the_prompt_and_its_scores_first(app: ASGIApp, llm: AsyncLLM) -> None:
    want = expected(llm, PROMPT, logprobs=1, prompt_logprobs=1)
    for prompt in (PROMPT, llm.encode(PROMPT, add_special_tokens=True)):
        body = {"prompt": prompt, **GREEDY, "echo": True, "logprobs": 1}
        found = post(app, PATH, body)["choices"][0]
        assert found["text"] == PROMPT + want.outputs[0].text
        scores = found["logprobs"]
        assert want.prompt_logprobs is not None
        ids = want.prompt_token_ids
        found_in_prompt = zip(ids[1:], want.prompt_logprobs[1:], strict=True)
        known = [None, *(each[token].logprob for token, each in found_in_prompt if each)]
        assert scores["token_logprobs"][: len(ids)] == known
        assert scores["top_logprobs"][0] is None
        assert len(scores["tokens"]) == len(ids) + 6
        for token, offset in zip(scores["tokens"][1:], scores["text_offset"][1:], strict=True):
            assert found["text"][offset : offset + len(token)] == token
        alone = post(app, PATH, {**body, "max_tokens": 0})
        assert alone["choices"][0]["text"] == PROMPT
        assert alone["choices"][0]["logprobs"]["token_logprobs"] == known
        assert alone["usage"]["completion_tokens"] == 0


def test_prompt_log_probabilities_and_token_ids(app: ASGIApp, llm: AsyncLLM) -> None:
    want = expected(llm, PROMPT, prompt_logprobs=1)
    found = post(app, PATH, {"prompt": PROMPT, **GREEDY, "prompt_logprobs": 1, "return_token_ids": True})["choices"][0]
    assert found["token_ids"] == want.outputs[0].token_ids
    assert found["prompt_token_ids"] == want.prompt_token_ids
    first, *others = found["prompt_logprobs"]
    assert first is None
    assert want.prompt_logprobs is not None
    for got, each in zip(others, want.prompt_logprobs[1:], strict=True):
        assert each is not None
        assert {int(token): value["logprob"] for token, value in got.items()} == {t: v.logprob for t, v in each.items()}


@pytest.mark.parametrize(
    "extra",
    [
        {"top_k": 3, "seed": 1, "temperature": 1.5}, {"min_p": 0.2, "seed": 1, "temperature": 1.5},
        {"repetition_penalty": 1.8}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}, {"logit_bias": {"291": 20}},
        {"allowed_token_ids": [291, 332]}, {"bad_words": ["and"]}, {"stop": ["a"]}, {"stop": "a", "min_tokens": 3},
        {"stop_token_ids": [13], "include_stop_str_in_output": True}, {"ignore_eos": True}, {"top_p": 0.3, "seed": 2},
    ],
)  # fmt: skip
def test_parameters_reach_the_engine(app: ASGIApp, llm: AsyncLLM, extra: dict[str, Any]) -> None:
    own = {**extra, "logit_bias": {291: 20}} if "logit_bias" in extra else extra
    want = expected(llm, PROMPT, **own).outputs[0]
    (found,) = post(app, PATH, {"prompt": PROMPT, **GREEDY, **extra})["choices"]
    assert (found["text"], found["finish_reason"], found["stop_reason"]) == (
        want.text, want.finish_reason, want.stop_reason,
    )  # fmt: skip


def test_special_tokens_only_if_wanted(app: ASGIApp, llm: AsyncLLM) -> None:
    for add in (True, False):
        found = post(app, PATH, {"prompt": PROMPT, **GREEDY, "add_special_tokens": add, "return_token_ids": True})
        assert found["choices"][0]["prompt_token_ids"] == llm.encode(PROMPT, add_special_tokens=add)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"best_of": 3}, "best_of", "best_of=3 is not supported: expected null or 1"),
        ({"suffix": "end"}, "suffix", "suffix='end' is not supported"),
        ({"use_beam_search": True}, "use_beam_search", "use_beam_search=True"),
        ({"max_token": 3}, "max_token", "unknown field 'max_token', did you mean 'max_tokens'?"),
        ({"messages": []}, "messages", "unknown field 'messages'"),
        ({"max_tokens": "9"}, "max_tokens", "max_tokens='9': expected int"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is not"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"n": 1000}, "n", "n=1000 is more than max_n"),
        ({"logprobs": 1000}, "logprobs", "logprobs=1000"),
        ({"stop": ["a", 3]}, "stop", "stop[1]=3: expected str, got int"),
        ({"logit_bias": {"x": 3}}, "logit_bias", "logit_bias={'x': 3}"),
        ({"prompt": []}, "prompt", "prompt=[]"),
        ({"prompt": ["a", 3]}, "prompt", "expected texts, token ids, or lists"),
        ({"prompt": ["a", ""]}, "prompt", "prompt[1]: "),
        ({"prompt": [5000]}, "prompt", "prompt has token id 5000"),
        ({"prompt": {"a": 1}}, "prompt", "prompt={'a': 1}: expected"),
        ({"prompt": ["a"] * 513}, "prompt", "513 prompts, times n=1: expected at most 512 answers"),
        ({"prompt": ["a"] * 5, "n": 103}, "prompt", "5 prompts, times n=103: expected at most 512 answers"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
         "response_format", "response_format={'type': 5}: "),
        ({"guided_json": "x"}, "guided_json", "guided_json='x' is not JSON"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "structured_outputs='(': at"),
        ({"prompt": ""}, "prompt", "prompt '' is empty"),
        ({"prompt": [5] * 600}, "prompt", "600 tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "unknown field"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "needs stream=false"),
        ({"stream": True, "temperature": -1}, "temperature", "temperature=-1"),
        ({"stream": True, "prompt": [5000]}, "prompt", "token id 5000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name_and_value(
    app: ASGIApp, extra: dict[str, Any], param: str | None, words: str
) -> None:
    error = refusal(app, PATH, {"prompt": PROMPT, **GREEDY, **extra})
    assert words in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_what_clients_send_to_no_effect_is_ignored(app: ASGIApp) -> None:
    plain = post(app, PATH, {"prompt": PROMPT, **GREEDY})["choices"]
    more = {
        "user": "x", "metadata": {"a": "b"}, "store": False, "best_of": 1, "suffix": None, "stop": None, "seed": None,
        "logit_bias": None, "stream": None, "n": None, "skip_special_tokens": True, "service_tier": "auto",
    }  # fmt: skip
    assert post(app, PATH, {"prompt": PROMPT, **GREEDY, **more})["choices"] == plain


def test_a_request_among_others_that_cannot_be_queued_queues_none(app: ASGIApp, llm: AsyncLLM) -> None:
    refusal(app, PATH, {"prompt": [PROMPT, PROMPT, [5000]], **GREEDY})
    refusal(app, PATH, {"prompt": [[5], [5, 5000]], **GREEDY, "stream": True})

    run(idle(llm))
    assert llm.stats().scheduler.pages_used == 0
