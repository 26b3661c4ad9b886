"""From a conversation to token ids, by the chat template of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypedDict

from .base import ControlTokens, Tokenizer, check_text
from .chat_builtin import BUILT_IN
from .chat_marks import ControlSpellings, Marks
from .chat_messages import Message as Message  # for those who call `encode`
from .chat_messages import check_messages, plain
from .chat_template import render, string_constants

_LEAD = "\ue000"  # a character that no tokenizer merges with others: it is made of bytes
_MOST_TEMPLATES = 16  # that are kept compiled
_OURS = ("messages", "tools", "add_generation_prompt")


class ChatOptions(TypedDict, total=False):
    """chat_template: Jinja text in place of the model's, or the name of one that it has. add_generation_prompt: end
    where an answer begins. continue_final_message: end within the last message, which the model goes on with; needs
    add_generation_prompt=False. tools: OpenAI's descriptions of functions. chat_template_kwargs: further variables of
    the template."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


class _Turns(NamedTuple):
    """What marks the turns of one template: the control tokens, and, of other tokens, those spelled `<|…|>` that the
    template writes (`written`)."""

    tokens: ControlTokens
    written: ControlTokens
    spellings: ControlSpellings


@dataclass(frozen=True)
class ChatFormat:
    """How a model's turns are written.

    name: of the model, for messages, which clients of a server see: without its folder. templates: by name; the one
    named `default` is used unless another is asked for, `tool_use` where there are tools. special: what templates may
    know of the tokenizer, `bos_token` say.
    """

    name: str
    tokenizer: Tokenizer | None
    templates: Mapping[str, str]
    special: Mapping[str, Any]
    _known: dict[str, _Turns] = field(default_factory=dict, repr=False)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_bytes: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, with the options of `ChatOptions`.

        Control tokens are the template's alone: one that a message spells out is text. Of other conversations the ids
        are those of transformers' `apply_chat_template`. ValueError for messages and options that are wrong, for a
        model without a template or a tokenizer, for a template that fails, and for more than `max_bytes` of text.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False")
        values: dict[str, Any] = {"messages": check_messages(messages)}
        values["tools"] = plain(tools, "tools") if tools else None
        values["documents"] = None
        if chat_template_kwargs is not None:
            more = plain(chat_template_kwargs, "chat_template_kwargs")
            if not isinstance(more, dict) or (wrong := [key for key in _OURS if key in more]):
                found = f"has the keys {wrong}" if isinstance(more, dict) else f"is {more!r:.80}"
                raise ValueError(f"chat_template_kwargs {found}: expected a dict of other variables of the template")
            values |= more
        template = self.template(chat_template, with_tools=bool(tools))
        if template == BUILT_IN["mistral-v3"]:
            _parse_tool_results(values["messages"])
        turns = self._turns(template)
        marks = Marks(turns.spellings, json.dumps([values, template], ensure_ascii=False))
        given = {**self.special, **marks.put(values), "add_generation_prompt": add_generation_prompt}
        if continue_final_message:
            last = given["messages"][-1]
            last["content"] = last.get("content", "") + f"{marks.end} "
        text = render(template, given, self.name)
        if continue_final_message:
            text = _until(text, marks.end)
        if max_bytes is not None and (size := len(text.encode(errors="replace"))) > max_bytes:
            raise ValueError(f"the conversation has {size} bytes, more than fit into the model's context ({max_bytes})")
        return self._encode(text, turns, marks, apart=template in BUILT_IN.values())

    def template(self, wanted: str | None = None, *, with_tools: bool = False) -> str:
        """The text of the template that serves. ValueError where there is none, and without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer, so it cannot be talked to: give token ids to `generate`")
        if wanted is None:
            name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
            if name in self.templates:
                return self.templates[name]
            others = f": its templates are named {', '.join(self.templates)}" if self.templates else ""
            raise ValueError(
                f"{self.name} has no chat template{others}; it is a base model, which continues text, unless you give "
                "chat_template="
            )
        if not isinstance(wanted, str):
            raise ValueError(f"chat_template={wanted!r:.80} is not text")
        if wanted in self.templates:
            return self.templates[wanted]
        if not re.search(r"\{[{%]", wanted):
            names = ", ".join(self.templates) or "none"
            raise ValueError(f"chat_template={wanted!r:.80} is neither Jinja nor the name of a template ({names})")
        return wanted

    def _turns(self, template: str) -> _Turns:
        if (found := self._known.get(template)) is None:
            assert self.tokenizer is not None
            control, written = self.tokenizer.control, self.tokenizer.user_defined
            spelled = {t: i for t, i in written.items() if re.fullmatch(r"<\|.+\|>", t) and t in template}
            tokens = ControlTokens({**control.ids, **spelled}, control.eats)
            spellings = ControlSpellings(tokens.ids, string_constants(template, self.name))
            if len(self._known) >= _MOST_TEMPLATES:
                self._known.clear()
            found = self._known[template] = _Turns(tokens, ControlTokens(spelled), spellings)
        return found

    def _encode(self, text: str, turns: _Turns, marks: Marks, apart: bool) -> list[int]:
        """Ids of a rendered text. apart: each text between two control tokens begins like a prompt of its own."""
        assert self.tokenizer is not None
        check_text(text)
        ids: list[int] = []
        for index, part in enumerate(turns.tokens.split(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            begins = not index or apart or self.tokenizer.spaces_parts
            # A token that any text becomes is none when it is cut.
            for number, piece in enumerate(turns.written.cut(marks.take_away(part))):
                ids += self.tokenizer.encode(piece) if begins and not number else self._go_on(piece)
        return ids

    def _go_on(self, text: str) -> list[int]:
        """Ids of a text that is not the first: without the space that SentencePiece puts before a text."""
        assert self.tokenizer is not None
        if self._spaces:
            ids, lead = self.tokenizer.encode(_LEAD + text), self.tokenizer.encode(_LEAD)
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.tokenizer.encode(text)

    @cached_property
    def _spaces(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        assert self.tokenizer is not None
        return self.tokenizer.encode(f"{_LEAD}a") != self.tokenizer.encode(_LEAD) + self.tokenizer.encode("a")


def _parse_tool_results(messages: list[dict[str, Any]]) -> None:
    """Mistral's third version writes the result of a tool as JSON where it is JSON."""
    for message in messages:
        if message["role"] == "tool":
            try:
                message["parsed"] = plain(json.loads(message["content"]), "content")
            except (ValueError, RecursionError):
                message["parsed"] = message["content"]


def _until(text: str, end: str) -> str:
    """The text before `end` and its space; without trailing spaces, if the template has trimmed that."""
    at = text.rfind(end)
    if at < 0:
        raise ValueError("continue_final_message=True: the chat template does not write the last message")
    return text[:at] if text.startswith(f"{end} ", at) else text[:at].rstrip()
