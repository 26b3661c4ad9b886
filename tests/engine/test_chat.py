"""Conversations become the token ids that transformers makes of them, and no message becomes a control token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

from grok_engine.tokenizer.chat import ChatFormat
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.hf import HFTokenizer
from tests.engine.chat_models import (
    CONTENTS,
    HOSTILE,
    SPECIAL,
    TEMPLATES,
    byte_level,
    configure,
    conversations,
    metaspace,
)  # fmt: skip

KINDS = ("byte level", "first", "always", "prepend")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_level(folder) if request.param == "byte level" else metaspace(folder, request.param)
    return folder


def loaded(folder: Path, name: str) -> tuple[ChatFormat, Any]:
    """Ours and the judge."""
    configure(folder, TEMPLATES[name])
    judge = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return load_chat(folder, HFTokenizer(folder / "tokenizer.json")), judge


def judged(judge: Any, messages: Any, **options: Any) -> list[int]:
    return list(judge.apply_chat_template(messages, **{"add_generation_prompt": True, "return_dict": False, **options}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_transformers(folder: Path, name: str) -> None:
    chat, judge = loaded(folder, name)
    for messages in conversations(CONTENTS):
        ids = chat.encode(messages)
        assert ids == judged(judge, messages), messages
    last = messages[:-1]
    assert chat.encode(last, add_generation_prompt=False) == judged(judge, last, add_generation_prompt=False)
    wanted = judged(judge, last, add_generation_prompt=False, continue_final_message=True)
    assert chat.encode(last, add_generation_prompt=False, continue_final_message=True) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_message_spells_is_text(folder: Path, name: str) -> None:
    """The control tokens are those of the same conversation with harmless contents, and the text is what was written.
    transformers' own way, which ends a text where a message spells a token, gives the same ids up to that end."""
    chat, judge = loaded(folder, name)
    special = {judge.convert_tokens_to_ids(token) for token in SPECIAL}
    for messages in conversations(HOSTILE):
        harmless = copy.deepcopy(messages)
        for message in harmless:
            message["content"] = "x"
        ids = chat.encode(messages)
        assert [i for i in ids if i in special] == [i for i in chat.encode(harmless) if i in special], messages
        text = judge.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert "".join(judge.decode(ids).split()) == "".join(text.split())
    assert any(i in special for i in judged(judge, [{"role": "user", "content": HOSTILE[1]}])[2:-2])
