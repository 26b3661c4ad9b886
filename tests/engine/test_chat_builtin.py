"""Turns of models whose files have no template: Mistral's against its own library, Grok-2's against its description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from grok_engine.tokenizer.chat import ChatFormat
from grok_engine.tokenizer.chat_builtin import BUILT_IN, built_in
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.sentencepiece import SentencePieceTokenizer
from tests.engine.chat_models import TOOLS

DATA = Path(mistral_common.__file__).parent / "data"
VERSIONS = {
    "mistral-v1": "tokenizer.model.v1", "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALKS: list[list[dict[str, Any]]] = [
    [user("Hello")],
    [user("  What is\n\n1 < 2?  "), assistant("Yes, it is."), user("Käse 東京 😀")],
    [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    [user("one"), user("two"), assistant("three"), assistant("four"), user("five")],
    [user("[INST] </s> <s> [/INST] x"), assistant("[TOOL_CALLS]"), user("[SYSTEM_PROMPT]")],
]


@pytest.fixture(scope="module", params=VERSIONS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatFormat, Any]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "params.json").write_text("{}")
    path = DATA / VERSIONS[request.param]
    chat = load_chat(folder, SentencePieceTokenizer(path))
    assert chat.templates == {"default": BUILT_IN[request.param]}
    return request.param, chat, MistralTokenizer.from_file(str(path))


def judged(judge: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    request = ChatCompletionRequest(model="test", messages=messages, **options)
    return list(judge.encode_chat_completion(request).tokens)


@pytest.mark.parametrize("number", range(len(TALKS)))
def test_ids_of_mistral(both: tuple[str, ChatFormat, Any], number: int) -> None:
    _, chat, judge = both
    assert chat.encode(TALKS[number]) == judged(judge, TALKS[number])


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Łódź"}'}}


@pytest.mark.parametrize("result", ['{"t": 5}', "5", "five </s>"])
def test_tools_of_mistral(both: tuple[str, ChatFormat, Any], result: str) -> None:
    version, chat, judge = both
    talk = [
        user("The weather?"), {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": result}, assistant("Fine."), user("Thanks."),
    ]  # fmt: skip
    if version == "mistral-v1":
        with pytest.raises(ValueError, match="role tool is not one of system, user, assistant"):
            chat.encode(talk)
    else:
        assert chat.encode(talk, tools=TOOLS) == judged(judge, talk, tools=TOOLS)


@pytest.mark.parametrize("spaces", [True, False])
def test_a_space_behind_control_tokens(spaces: bool) -> None:
    """SentencePiece puts one before a text; whether every control token begins one is for the model's files to say."""
    tokenizer = SentencePieceTokenizer(DATA / VERSIONS["mistral-v3"], spaces_parts=spaces)
    chat = ChatFormat("model", tokenizer, {"default": "{{ 'Hello[INST]Hello[/INST] Hello' }}"}, {})
    hello, inner, inst = tokenizer.encode("Hello"), tokenizer.encode("\nHello")[2:], tokenizer.control.ids
    last = tokenizer.encode(" Hello") if spaces else hello
    wanted = [*hello, inst["[INST]"], *(hello if spaces else inner), inst["[/INST]"], *last]
    assert chat.encode([user("x")]) == wanted


GROK_2 = "System: Be brief.{0}Human: Hi{0}Assistant: Yes{0}Human: a{0}Assistant:".format("<|separator|>\n\n")


def test_grok_2(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from grok_engine.tokenizer.hf import HFTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tk = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.add_special_tokens(["<|pad|>", "<|separator|>", "<|eos|>"])
    tk.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(tmp_path / "tokenizer.json")
    chat = load_chat(tmp_path, tokenizer)
    talk = [{"role": "system", "content": "Be brief."}, user(" Hi "), assistant("Yes"), user("a")]
    assert chat.encode(talk) == tk_ids(tokenizer, GROK_2)
    with pytest.raises(ValueError, match="role tool is not one of system, user, assistant"):
        chat.encode([*talk, {"role": "tool", "content": "x"}])


def tk_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, special=True))


@pytest.mark.parametrize(
    ("control", "architecture", "name"),
    [
        (["<s>"], "MixtralForCausalLM", "mistral-v1"), (["<s>"], "MistralForCausalLM", "mistral-v1"),
        (["<s>"], "LlamaForCausalLM", None), ([], "", None), (["<|separator|>"], "Grok1ForCausalLM", None),
        (["[INST]", "[/INST]"], "", "mistral-v3"), (["[INST]", "[/INST]", "[SYSTEM_PROMPT]"], "", "mistral-v7"),
    ],
)  # fmt: skip
def test_which_models_have_one(control: list[str], architecture: str, name: str | None) -> None:
    assert built_in(control, architecture) == name


def test_the_architecture_is_that_of_the_files(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(DATA / VERSIONS["mistral-v1"])
    for architecture, found in (("MixtralForCausalLM", ["default"]), ("LlamaForCausalLM", [])):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert list(load_chat(tmp_path, tokenizer).templates) == found
