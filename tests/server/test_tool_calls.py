"""Tool calls in texts: what templates, mistral_common and grammars write is read back, however it is cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from grok_engine.server.tool_parser import Arguments, CallParser, CallStart, Content
from grok_engine.server.tool_styles import PLAIN, STYLES, ToolStyle, style_of
from grok_engine.tokenizer.base import IncrementalDetokenizer, Tokenizer
from grok_engine.tokenizer.chat_builtin import BUILT_IN
from grok_engine.tokenizer.load import load_tokenizer
from tests.engine.chat_models import CHATML, LLAMA2, LLAMA3
from tests.server.tool_templates import HERMES, TEMPLATES, XML

DATA = Path(mistral_common.__file__).parent / "data"
Found = list[tuple[str, ...]]  # ("text", content) and ("call", name, arguments)


def read(style: ToolStyle, *parts: str) -> tuple[Found, list[str]]:
    """What a parser makes of a text in parts, its events joined, and the ids of the calls."""
    parser, found, ids = CallParser(style), [], []
    events = [event for part in parts for event in parser.feed(part)]
    for event in [*events, *parser.finish()]:
        match event:
            case Content(text) if found and found[-1][0] == "text":
                found[-1] = ("text", found[-1][1] + text)
            case Content(text):
                found.append(("text", text))
            case CallStart(index, own_id, name):
                assert index == len(ids)
                ids.append(own_id)
                found.append(("call", name, ""))
            case Arguments(index, text):
                assert index == len(ids) - 1
                found[-1] = ("call", found[-1][1], found[-1][2] + text)
    assert parser.calls == len(ids) == len(set(ids))
    return found, ids


F, G = ("call", "f", '{"a": 1}'), ("call", "g", "{}")
CASES: list[tuple[str, str, Found]] = [
    ("hermes", 'a\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("text", "a"), F]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n<tool_call> {"arguments": {}, "name": "g"} '
               "</tool_call> bye ", [F, G, ("text", "bye ")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "}]\\"</tool_call>"}}</tool_call>',
     [("call", "f", '{"s": "}]\\"</tool_call>"}')]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</tool_call>', [F, G]),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}</tool_call>',
     [F]),
    ("hermes", "<tool_call> no </tool_call>", [("text", "<tool_call> no </tool_call>")]),
    ("hermes", '<tool_call>{"name": 5}</tool_call> <tool_call>{"name": "g", "arguments": null}</tool_call>',
     [("text", '<tool_call>{"name": 5}</tool_call>'), G]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a" = 1}}</tool_call>',
     [("call", "f", '{"a" '), ("text", "= 1}}</tool_call>")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}', [("call", "f", '{"a": [1'), ("text", "}}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', [("call", "f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "argu', [("text", '<tool_call>{"name": "f", "argu')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}, oops}', [F, ("text", ", oops}")]),
    ("hermes", '<tool_call>{"name": "\\q"}', [("text", '<tool_call>{"name": "\\q"}')]),
    ("hermes", '<tool_call>{"name": "\\q", "arguments": {', [("text", '<tool_call>{"name": "\\q", "arguments": {')]),
    ("hermes", "a <tool_call>", [("text", "a <tool_call>")]),
    ("hermes", " \n a <tool_c", [("text", " \n a <tool_c")]),
    ("mistral", ' Hi [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g"}]\n',
     [("text", " Hi"), F, G]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, then', [F, ("text", ", then")]),
    ("mistral_v11", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}', [F, G]),
    ("mistral_v11", '[TOOL_CALLS]f{"a": 1}', [F]),
    ("mistral_v11", "[TOOL_CALLS]what is it? {}", [("text", "[TOOL_CALLS]what is it? {}")]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', [F]),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', [F, G]),
    ("llama3_json", '\n{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
    ("llama3_json", '{"name": "Bob", "age": 5} is', [("text", '{"name": "Bob", "age": 5} is')]),
    ("llama3_json", ' {"x": 1}', [("text", ' {"x": 1}')]),
    ("llama3_json", 'So {"name": "f", "parameters": {}}', [("text", 'So {"name": "f", "parameters": {}}')]),
    ("plain", '{"name": "f", "arguments": {"a": 1}}', [F]),
]  # fmt: skip
ALL = {**STYLES, "plain": PLAIN}


@pytest.mark.parametrize(("name", "text", "wanted"), CASES)
def test_a_text_is_read_alike_however_it_is_cut(name: str, text: str, wanted: Found) -> None:
    style = ALL[name]
    assert read(style, text)[0] == wanted
    assert read(style, *text)[0] == wanted
    for i in range(len(text)):
        for j in range(i, len(text), 11):
            assert read(style, text[:i], text[i:j], text[j:])[0] == wanted


PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", '{"name": "f", ', '"name"',
    '"arguments": ', '"parameters": ', "{", "}", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "1", "null", "x", "é",
    '{"name": "f", "arguments": {"a": "b"}}', '{"name": "g", "parameters": {}}', "<tool", "f",
]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_any_text_is_read_and_one_without_calls_is_content(name: str) -> None:
    style = ALL[name]

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.data())
    def check(text: str, data: st.DataObject) -> None:
        found, _ = read(style, text)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        assert read(style, *(text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)))[0] == found
        if all(kind == "text" for kind, *_ in found):
            assert "".join(text for _, text in found) == text

    check()


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser(STYLES["hermes"])
    pieces = ("Hm", "m <tool_", 'call>{"name": "f', '", "arguments": {"a', '": "bc', 'd"', "}", "}</tool_call>")
    events = [parser.feed(piece) for piece in pieces]
    shown = [[event.name if isinstance(event, CallStart) else event.text for event in found] for found in events]
    assert shown == [["Hm"], ["m"], [], ["f", '{"a'], ['": "bc'], ['d"'], ["}"], []]
    assert parser.finish() == []


def test_ids() -> None:
    for name, pattern in (("hermes", "call_[0-9a-f]{24}"), ("mistral", "[A-Za-z0-9]{9}")):
        begin = STYLES[name].begin
        _, ids = read(STYLES[name], f'{begin}[{{"name": "f", "arguments": {{}}}}, {{"name": "f", "arguments": {{}}}}]')
        assert len(ids) == 2
        assert all(re.fullmatch(pattern, each) for each in ids)
    _, ids = read(STYLES["mistral_v11"], "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}[TOOL_CALLS]f[CALL_ID]12[ARGS]{}")
    assert ids[0] == "123456789"
    assert len(ids[1]) == 9


@pytest.mark.parametrize(
    ("template", "name"),
    [
        *((template, name) for name, (template, _) in TEMPLATES.items()), (HERMES, "hermes"), (CHATML, None),
        (CHATML.replace("(call.function", "'<tool_call>' + (call.function"), "hermes"), (XML, None), (LLAMA2, None),
        (LLAMA3, None), (BUILT_IN["mistral-v3"], "mistral"), (BUILT_IN["mistral-v7"], "mistral"),
        (BUILT_IN["mistral-v1"], None), (BUILT_IN["grok-2"], None),
    ],
)  # fmt: skip
def test_the_style_of_a_template(template: str, name: str | None) -> None:
    if template == CHATML:
        name = "hermes"  # it writes calls between these marks
    style = style_of(template, {"[TOOL_CALLS]": 5, "</s>": 2, "<s>": 1})
    assert (style.name if style else None) == name
    if style and "mistral" in style.name:
        assert (style.marks, style.others) == ({"[TOOL_CALLS]": 5}, (1, 2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"}\\é ", max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text('ab"}\\é ', max_size=4), VALUES, max_size=3)
USER = {"role": "user", "content": "Do it."}


def rendered(template: str, talk: list[dict[str, Any]], *, prompt: bool) -> str:
    (text,), _ = render_jinja_template(
        [talk], tools=[{"type": "function"}], chat_template=template, add_generation_prompt=prompt, bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    return str(text)


def written(template: str, end: str, message: dict[str, Any]) -> str:
    """What the model wrote for this message, as transformers renders it."""
    talk = rendered(template, [USER, message], prompt=False)
    prompt = rendered(template, [USER], prompt=True)
    assert talk.startswith(prompt)
    assert talk.endswith(end)
    return talk[len(prompt) : -len(end)]


@pytest.mark.parametrize(("name", "template", "end"), [*((n, *t) for n, t in TEMPLATES.items()),
                                                       ("hermes", HERMES, "<|im_end|>\n")])  # fmt: skip
def test_a_call_that_a_template_renders_is_read_back(name: str, template: str, end: str) -> None:
    style = STYLES[name]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.sampled_from(["f", "get_it", "a-b"]), OBJECTS), min_size=1, max_size=3),
           st.sampled_from([None, "Well.", "One <\n\ntwo"]))  # fmt: skip
    def check(calls: list[tuple[str, dict[str, Any]]], content: str | None) -> None:
        if style.bare:
            calls, content = calls[:1], None
        message = _message(content, calls, [f"call0000{i}" for i in range(len(calls))])
        text = written(template, end, message)
        found, ids = read(style, *text)
        assert [each[1] for each in found if each[0] == "text"] == ([content] if content else [])
        got = [(each[1], json.loads(each[2])) for each in found if each[0] == "call"]
        assert got == calls
        if style.id_size:
            ids = [call["id"] for call in message["tool_calls"]]
        assert written(template, end, _message(content, got, ids)) == text

    check()


def _message(content: str | None, calls: list[tuple[str, dict[str, Any]]], ids: list[str]) -> dict[str, Any]:
    made = [
        {"id": own_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for own_id, (name, arguments) in zip(ids, calls, strict=True)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens as a request with skip_special_tokens=False gets it."""
    stream = IncrementalDetokenizer(tokenizer, {token: text for text, token in tokenizer.control.ids.items()})
    return "".join(map(stream.push, ids)) + stream.finish()


@pytest.mark.parametrize("version", ["v3", "v7", "v13"])
def test_calls_as_mistral_encodes_them(version: str, tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    values = json.loads((DATA / "tekken_240911.json").read_text())
    spelled = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    spelled += "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    spelled += "[/SYSTEM_PROMPT] [TOOL_CONTENT] [CALL_ID] [ARGS]"
    values["config"] |= {"version": version, "default_num_special_tokens": 100, "default_vocab_size": 1000}
    values["vocab"] = values["vocab"][:900]
    values["special_tokens"] = [
        {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(spelled.split())
    ]
    path.write_text(json.dumps(values))
    (tmp_path / "params.json").write_text("{}")
    calls = [("weather", {"place": "Łódź", "days": [1, 2]}), ("a-b", {})]
    message = _message(None, calls, ["call00001", "call00002"])
    for call in message["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    judge = MistralTokenizer.from_file(str(path))
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in message["tool_calls"]]
    request = ChatCompletionRequest(model="test", messages=[USER, {**message, "content": ""}, *results])
    ids = list(judge.encode_chat_completion(request).tokens)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = ids[ids.index(tokenizer.control.ids["[TOOL_CALLS]"]) : ids.index(tokenizer.eos_token_ids[0])]
    style = STYLES["mistral_v11" if version == "v13" else "mistral"]
    found, _ = read(style, shown(tokenizer, ids))
    assert [(name, json.loads(arguments)) for _, name, arguments in found] == calls
