"""Tool calls and formats of answers over HTTP: the small model writes what the grammars leave it no choice about."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from starlette.types import ASGIApp

from grok_engine import AsyncLLM, LLMEngine
from grok_engine.server import create_app
from tests.server.calls import TEMPLATE, events, post, refusal, run

PATH = "/v1/chat/completions"
HERMES = (
    '{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% if tools %}Write <tool_call>{"name": ..., '
    '"arguments": ...}</tool_call>\n{% endif %}' + TEMPLATE
)
MESSAGES = [{"role": "user", "content": "Weather?"}]
ASK: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("weather", city={"enum": ["Baker Street"]}), tool("stop")]


@pytest.fixture(scope="module")
def hermes(llm: AsyncLLM) -> ASGIApp:
    return create_app(llm, chat_template=HERMES)


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    assert message["content"] is None
    for call in message["tool_calls"]:
        assert (call["type"], set(call)) == ("function", {"id", "type", "function"})
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def streamed(found: list[dict[str, Any]]) -> tuple[list[tuple[str, Any]], str]:
    """The calls that a client adds up, and the last finish_reason."""
    calls: dict[int, dict[str, Any]] = {}
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    for chunk in found:
        delta = chunk["choices"][0]["delta"]
        assert not delta.get("content")
        for piece in delta.get("tool_calls", ()):
            if piece["index"] not in calls:
                assert piece["id"]
                assert piece["type"] == "function"
                calls[piece["index"]] = {"name": piece["function"]["name"], "arguments": ""}
            else:
                assert set(piece) == {"index", "function"}
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    assert sorted(calls) == list(range(len(calls)))
    made = [(call["name"], json.loads(call["arguments"])) for _, call in sorted(calls.items())]
    return made, found[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_whole_and_streamed(hermes: ASGIApp, choice: Any) -> None:
    body = {**ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    (found,) = post(hermes, PATH, body)["choices"]
    assert found["finish_reason"] == "tool_calls"
    (call,) = calls = called(found["message"])
    assert call == ("weather", {"city": "Baker Street"}) or (call == ("stop", {}) and choice == "required")
    assert streamed(events(hermes, PATH, body)) == (calls, "tool_calls")


def test_a_template_without_calls_gets_plain_json_or_is_refused(app: ASGIApp) -> None:
    (choice,) = post(app, PATH, {**ASK, "tools": TOOLS[:1], "tool_choice": "required"})["choices"]
    assert called(choice["message"]) == [("weather", {"city": "Baker Street"})]
    error = refusal(app, PATH, {**ASK, "tools": TOOLS, "stream": True})
    assert "need a chat template whose spelling of calls is known" in error["message"]


def test_tools_are_the_models_choice(hermes: ASGIApp) -> None:
    """A model that opens no call writes content, with tools in its prompt; so it does with "none"."""
    for choice in ("auto", "none", None):
        body = {**ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 6}
        whole = post(hermes, PATH, body)
        message = whole["choices"][0]["message"]
        assert message["content"]
        assert "tool_calls" not in message
        assert whole["usage"]["prompt_tokens"] > post(hermes, PATH, {**ASK, "max_tokens": 1})["usage"]["prompt_tokens"]
        pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in events(hermes, PATH, body)]
        assert "".join(pieces) == message["content"]


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    {"guided_json": SCHEMA}, {"guided_regex": "\\{\"a\": ?[12]\\}"}, {"guided_choice": ['{"a": 1}', '{"a": 2}']},
    {"guided_grammar": 'start: "{\\"a\\": 1}"'}, {"structured_outputs": {"json": SCHEMA}},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_formats_of_answers(app: ASGIApp, form: dict[str, Any]) -> None:
    (choice,) = post(app, PATH, {**ASK, **form})["choices"]
    assert json.loads(choice["message"]["content"]) in ({"a": 1}, {"a": 2})
    assert choice["finish_reason"] == "stop"
    body = {"prompt": "a", "temperature": 0, "max_tokens": 40, **form}
    (choice,) = post(app, "/v1/completions", body)["choices"]
    assert json.loads(choice["text"]) in ({"a": 1}, {"a": 2})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(app, "/v1/completions", body)) == choice["text"]


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "{'type': 'xml'}"),
        ({"response_format": FORMATS[0]["response_format"], "guided_regex": "a"}, "response_format", "guided_regex"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex='(': at"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "Invalid type: nonsense"),
        ({"guided_choice": []}, "guided_choice", "guided_choice=[]"),
        ({"guided_json": SCHEMA, "ignore_eos": True}, "ignore_eos", "ignore_eos=True with structured"),
        ({"tools": 3, "tool_choice": "none"}, "tools", "tools=3"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS}, "tools", "need a chat template"),
        ({"tools": [*TOOLS, tool("go", to={"type": "'x"})], "tool_choice": "required"}, "tools",
         "tools[2].function.parameters: failed to compile JSON schema: Invalid type: 'x"),
        ({"tools": [tool("go", to={"type": 5})], "tool_choice": "required"}, "tools", "tools[0].function.parameters: "),
        ({"tools": [tool("go", to={"enum": ["a" * 66000]})], "tool_choice": "required"}, "tools", "tools: has 6"),
        ({"tools": [TOOLS[0], TOOLS[0]], "tool_choice": "required"}, "tools", "tools[1].function.name='weather'"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "guided_regex and tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_a_stream_begins(
    app: ASGIApp, extra: dict[str, Any], param: str | None, words: str
) -> None:
    for stream in (False, True):
        error = refusal(app, PATH, {**ASK, **extra, "stream": stream})
        assert words in error["message"]
        assert error["param"] == param


def test_without_the_grammar_library_formats_are_501(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(LLMEngine("tiny", num_pages=16))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = refusal(create_app(llm), "/v1/completions", {"prompt": "a", "guided_regex": "a"}, 501)
    assert "pip install '.[structured]'" in error["message"]
    run(llm.close())
