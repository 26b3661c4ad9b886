"""/v1/chat/completions against the engine itself."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp

from grok_engine import AsyncLLM, RequestOutput, SamplingParams
from tests.server.calls import TEMPLATE, events, post, refusal, run

PATH = "/v1/chat/completions"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Who is Watson?"}]
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


def expected(llm: AsyncLLM, messages: Any = MESSAGES, template: dict[str, Any] | None = None, **params: Any) -> Any:
    async def last() -> RequestOutput:
        sampling = SamplingParams(**{**GREEDY, **params})
        stream = llm.chat(messages, sampling, chat_template=TEMPLATE, **(template or {}))
        *_, found = [output async for output in stream]
        return found

    return run(last())


def test_an_answer_is_the_engines(app: ASGIApp, llm: AsyncLLM) -> None:
    want = expected(llm)
    found = post(app, PATH, {"messages": MESSAGES, **GREEDY})
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.outputs[0].text}
    assert (choice["index"], choice["finish_reason"], found["object"]) == (0, "length", "chat.completion")
    assert found["usage"]["prompt_tokens"] == len(want.prompt_token_ids)
    # parts of text, as clients may send content
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who is Watson?"}]}]
    assert post(app, PATH, {"messages": parts, **GREEDY})["choices"] == found["choices"]


def test_a_stream_is_the_answer_in_pieces(app: ASGIApp) -> None:
    body = {"messages": MESSAGES, **GREEDY, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    whole = post(app, PATH, {k: v for k, v in body.items() if k != "stream_options"})
    *chunks, last = events(app, PATH, body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for index, want in enumerate(whole["choices"]):
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [piece["delta"].get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert "".join(piece["delta"]["content"] for piece in pieces) == want["message"]["content"]
        assert [p for piece in pieces for p in piece["logprobs"]["content"]] == want["logprobs"]["content"]
        assert [t for piece in pieces for t in piece["token_ids"]] == want["token_ids"]
        assert [piece["finish_reason"] for piece in pieces][-1] == "length"
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_log_probabilities_have_bytes_and_the_most_probable(app: ASGIApp, llm: AsyncLLM) -> None:
    want = expected(llm, logprobs=3).outputs[0]
    found = post(app, PATH, {"messages": MESSAGES, **GREEDY, "logprobs": True, "top_logprobs": 3})
    entries = found["choices"][0]["logprobs"]["content"]
    for token, known, entry in zip(want.token_ids, want.logprobs, entries, strict=True):
        assert (entry["token"], entry["logprob"]) == (known[token].decoded_token, known[token].logprob)
        assert [top["logprob"] for top in entry["top_logprobs"]] == sorted(
            (each.logprob for each in known.values() if each.rank <= 3), reverse=True
        )
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == want.text
    plain = post(app, PATH, {"messages": MESSAGES, **GREEDY, "logprobs": True})["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_max_completion_tokens_and_no_limit(app: ASGIApp, llm: AsyncLLM) -> None:
    found = post(app, PATH, {"messages": MESSAGES, "temperature": 0, "max_tokens": 30, "max_completion_tokens": 3})
    assert found["usage"]["completion_tokens"] == 3
    endless = post(app, PATH, {"messages": MESSAGES, "temperature": 0, "ignore_eos": True})
    assert endless["usage"]["total_tokens"] == llm.engine.config.max_len


def test_the_templates_options(app: ASGIApp, llm: AsyncLLM) -> None:
    more = [*MESSAGES, {"role": "assistant", "content": "He is"}]
    want = expected(llm, more, {"add_generation_prompt": False, "continue_final_message": True})
    body = {"messages": more, **GREEDY, "continue_final_message": True}
    assert post(app, PATH, body)["choices"][0]["message"]["content"] == want.outputs[0].text
    want = expected(llm, template={"chat_template_kwargs": {"closing": " Well,"}}).outputs[0].text
    body = {"messages": MESSAGES, **GREEDY, "chat_template_kwargs": {"closing": " Well,"}}
    assert post(app, PATH, body)["choices"][0]["message"]["content"] == want
    want = expected(llm, template={"add_generation_prompt": False}).outputs[0].text
    body = {"messages": MESSAGES, **GREEDY, "add_generation_prompt": False}
    assert post(app, PATH, body)["choices"][0]["message"]["content"] == want


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0] (user) has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "type 'image_url'"),
        ({"messages": "hello"}, "messages", "messages='hello': expected array, got str"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs=2 needs logprobs=true"),
        ({"logprobs": 3}, "logprobs", "logprobs=3: expected bool"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21 asks for 21 tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens=0"),
        ({"functions": [{"name": "f"}]}, "functions", "functions=[{'name': 'f'}] is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "modalities=['text', 'audio']"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "chat_template='{{ 1 }}' is not supported"),
        ({"echo": True}, "echo", "unknown field 'echo'"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "['messages']"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name_and_value(
    app: ASGIApp, extra: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        error = refusal(app, PATH, {"messages": MESSAGES, **GREEDY, **extra, "stream": stream})
        assert words in error["message"]
        assert error["param"] == param
