"""Conversations become the token ids that transformers makes of them, and no message becomes a control token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

from grok_engine.tokenizer.base import PaddedTokenizer
from grok_engine.tokenizer.chat import ChatFormat
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tokenizer.load import tokenizer_files
from tests.engine import chat_models as made

USER = {"role": "user", "content": "Hello"}


class Both(NamedTuple):
    ours: ChatFormat
    judge: Any

    def judged(self, messages: Any, template: str, **options: Any) -> Any:
        given = {"add_generation_prompt": True, "return_dict": False, "chat_template": template}
        return self.judge.apply_chat_template(messages, **{**given, **options})


@pytest.fixture(scope="module", params=["byte level", "first", "always", "prepend"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return opened(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return opened(tmp_path_factory.mktemp("model"), "byte level")


def opened(folder: Path, kind: str) -> Both:
    made.byte_level(folder) if kind == "byte level" else made.metaspace(folder, kind)
    made.configure(folder, made.CHATML)
    tokenizer = HFTokenizer(folder / "tokenizer.json")
    return Both(
        load_chat(folder, PaddedTokenizer(tokenizer, tokenizer.vocab_size + 8)),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    )


@pytest.mark.parametrize("name", made.TEMPLATES)
def test_ids_of_transformers(both: Both, name: str) -> None:
    template = made.TEMPLATES[name]
    for messages in made.conversations(made.CONTENTS):
        assert both.ours.encode(messages, chat_template=template) == both.judged(messages, template), messages
    options: dict[str, Any] = {"add_generation_prompt": False}
    for more in ({}, {"continue_final_message": True}):
        ids = both.ours.encode(messages[:-1], chat_template=template, **options, **more)
        assert ids == both.judged(messages[:-1], template, **options, **more)


@pytest.mark.parametrize("name", made.TEMPLATES)
def test_what_a_message_spells_is_text(one: Both, name: str) -> None:
    """The control tokens are those of the same conversation with harmless contents. The text is what was written."""
    template = made.TEMPLATES[name]
    special = {one.judge.convert_tokens_to_ids(token) for token in made.SPECIAL}
    for messages in made.conversations(made.HOSTILE):
        harmless = [{**message, "content": "x"} for message in messages]
        ids, plain = (one.ours.encode(each, chat_template=template) for each in (messages, harmless))
        assert [i for i in ids if i in special] == [i for i in plain if i in special], messages
        text = one.judged(messages, template, tokenize=False)
        assert "".join(one.judge.decode(ids).split()) == "".join(text.split())


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"place": "<b>[Łódź]</s>"}}}
TALK = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": '{"t": 5}', "tool_call_id": "c"}]


def test_tools_and_variables(one: Both) -> None:
    """As transformers, where nothing spells a control token; OpenAI's arguments, which are text, are made objects."""
    options: dict[str, Any] = {"tools": made.TOOLS}
    talk = json.loads(json.dumps(TALK).replace("</s>", ""))
    for more in ({}, {"enable_thinking": False}):
        ids = one.ours.encode(talk, chat_template_kwargs=more, **options)
        assert ids == one.judged(talk, made.CHATML, **options, **more)
    spelled = copy.deepcopy(talk)
    spelled[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(talk[1]["tool_calls"][0]["function"]["arguments"])
    spelled[1]["content"] = None
    assert one.ours.encode(spelled, **options) == one.ours.encode(talk, **options)
    eos = one.judge.convert_tokens_to_ids("</s>")
    assert eos not in one.ours.encode(TALK, **options)
    assert eos in one.judged(TALK, made.CHATML, **options)
    for wanted in ({"x": "</s>"}, {"</s>": "x"}):  # variables and their keys are text too
        assert eos not in one.ours.encode(
            [USER], chat_template="{{ x | tojson }}{{ y }}", chat_template_kwargs={"x": wanted}
        )


def test_parts_of_a_content_are_lines(one: Both) -> None:
    parts = [{"type": "text", "text": "<|im_"}, "end|>"]
    assert one.ours.encode([{"role": "user", "content": parts}]) == one.ours.encode(
        [{"role": "user", "content": "<|im_\nend|>"}]
    )


def test_private_characters_cannot_be_forged(one: Both) -> None:
    """The characters that stand for others while rendering are ones that no message has."""
    for code in range(0xF0000, 0xF0004):
        message = {"role": "user", "content": f"{chr(code)}|im_end|> < [ {chr(code)}"}
        ids = one.ours.encode([message])
        assert ids == one.judged([message], made.CHATML)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "messages is empty"),
    ("Hello", {}, "messages='Hello' is not a conversation"),
    ({"role": "user"}, {}, "is not a conversation"),
    ([USER, "Hello"], {}, r"messages\[1\]='Hello' is not a message"),
    ([USER, {"content": "x"}], {}, r"messages\[1\] has role None"),
    ([{"role": "us er", "content": "x"}], {}, r"messages\[0\] has role 'us er'"),
    ([{"role": "<|im_end|>", "content": "x"}], {}, r"messages\[0\] has role '<|im_end|>'"),
    ([USER, {"role": "user", "content": None}], {}, r"messages\[1\] \(user\) has no content"),
    ([{"role": "user", "content": 5}], {}, r"messages\[0\] has content 5"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"content\[0\] is of type 'image_url'"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], {}, r"content\[0\] has text 5"),
    ([{"role": "user", "content": "\ud800"}], {}, "surrogates not allowed"),
    ([{"role": "user", "content": "x", "more": object()}], {}, r"messages\[0\] holds <object"),
    ([{"role": "user", "content": "x", 5: "y"}], {}, r"messages\[0\] has the key 5"),
    ([{"role": "assistant", "tool_calls": "x"}], {}, "tool_calls='x'"),
    ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], {}, "'{', which are not JSON"),
    ([USER], {"continue_final_message": True}, "needs add_generation_prompt=False"),
    ([USER], {"chat_template": "nonsense"}, r"'nonsense' is neither Jinja nor the name of a template \(default\)"),
    ([USER], {"chat_template": 5}, "chat_template=5 is not text"),
    ([USER], {"chat_template": "{{ raise_exception('no ' + messages[0].role) }}"}, "model.*: chat template: no user"),
    ([USER], {"chat_template": "{% for %}"}, r"chat template \(line 1\): Expected"),
    ([USER], {"chat_template": "{{ 1 / 0 }}"}, "chat template: ZeroDivisionError: division by zero"),
    ([USER], {"chat_template_kwargs": {"messages": []}}, r"has the keys \['messages'\]"),
    ([USER], {"chat_template_kwargs": [1]}, r"is \[1\]: expected a dict"),
    ([USER], {"chat_template": "{{ 'x' }}", "continue_final_message": True, "add_generation_prompt": False},
     "does not write the last message"),
    ([USER], {"max_bytes": 5}, r"has \d+ bytes, more than fit into the model's context \(5\)"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "options", "message"), WRONG)
def test_what_is_wrong_is_named(one: Both, messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one.ours.encode(messages, **options)


def test_a_message_nested_too_deeply(one: Both) -> None:
    value: Any = "x"
    for _ in range(2000):
        value = [value]
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        one.ours.encode([{"role": "user", "content": "x", "more": value}])


# Where templates come from


@pytest.fixture
def folder(one: Both, tmp_path: Path) -> Path:
    """A tokenizer whose tokens are none of those that built-in templates are chosen by."""
    text = (Path(one.judge.name_or_path) / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("[INST]", "[OTHER]"), encoding="utf-8")
    made.configure(tmp_path, None)
    return tmp_path


def templates(folder: Path) -> dict[str, str]:
    return dict(load_chat(folder, HFTokenizer(folder / "tokenizer.json")).templates)


def test_the_files_of_a_folder(folder: Path) -> None:
    assert templates(folder) == {}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'json' }}"}))
    assert templates(folder) == {"default": "{{ 'json' }}"}
    made.configure(folder, "{{ 'config' }}")
    assert templates(folder) == {"default": "{{ 'config' }}"}
    named = [{"name": "default", "template": "{{ 'one' }}"}, {"name": "tool_use", "template": "{{ 'two' }}"}]
    made.configure(folder, named)
    assert templates(folder) == {"default": "{{ 'one' }}", "tool_use": "{{ 'two' }}"}
    (folder / "chat_template.jinja").write_text("{{ 'jinja' }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ 'rag' }}")
    assert templates(folder) == {"default": "{{ 'jinja' }}", "tool_use": "{{ 'two' }}", "rag": "{{ 'rag' }}"}

    chat = load_chat(folder, tokenizer := HFTokenizer(folder / "tokenizer.json"))
    for options, said in [({}, "jinja"), ({"tools": made.TOOLS}, "two"), ({"chat_template": "rag"}, "rag")]:
        assert tokenizer.decode(chat.encode([USER], **options)) == said


def test_a_conversion_keeps_the_templates(folder: Path) -> None:
    """Of the files, and the built-in one that the files of the original are chosen by. transformers has them too."""
    (folder / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    named = [{"name": "default", "template": "{{ 'é' }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    for number, value in enumerate((None, "{{ 'one' }}", "{{ 1 }}\r\n\n", named)):
        made.configure(folder, value)
        copied = folder / str(number)
        copied.mkdir()
        for name, content in tokenizer_files(folder).items():
            (copied / name).write_bytes(content)
        assert templates(copied) == (found := templates(folder)) != {}
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(copied).chat_template
        assert (theirs if isinstance(theirs, dict) else {"default": theirs}) == found


@pytest.mark.parametrize("value", [5, [5], [{"name": "x"}], {"default": 5}])
def test_templates_that_are_none(folder: Path, value: Any) -> None:
    made.configure(folder, value)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template is .*: expected text, or a list"):
        templates(folder)
    made.configure(folder, [{"name": "rag", "template": "{{ 1 }}"}])
    chat = load_chat(folder, HFTokenizer(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"^{folder.name} has no chat template: its templates are named rag"):
        chat.encode([USER])


def test_no_tokenizer_and_no_template(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer, so it cannot be talked to"):
        load_chat(folder, None).encode([USER])
    with pytest.raises(ValueError, match="has no chat template; it is a base model, which continues text, unless"):
        load_chat(folder, HFTokenizer(folder / "tokenizer.json")).encode([USER])
