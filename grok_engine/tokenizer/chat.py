"""From a conversation to token ids, by the chat template of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

from .base import ControlTokens, Tokenizer, check_text
from .chat_builtin import BUILT_IN
from .chat_marks import Marks
from .chat_messages import Message, check_messages, plain
from .chat_template import render, string_constants

_LEAD = "\ue000"  # a character that no tokenizer merges with others: it is made of bytes
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


@dataclass(frozen=True)
class ChatFormat:
    """How a model's turns are written.

    name: of the model, for messages. templates: by name; the one named `default` is used unless another is asked for,
    `tool_use` where there are tools. special: what templates may know of the tokenizer, `bos_token` say.
    """

    name: str
    tokenizer: Tokenizer | None
    templates: Mapping[str, str]
    special: Mapping[str, Any]

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
        tokens = self._control(template)
        marks = Marks(tokens, string_constants(template, self.name), json.dumps([values, template], ensure_ascii=False))
        given = {**self.special, **marks.put(values), "add_generation_prompt": add_generation_prompt}
        if continue_final_message:
            last = given["messages"][-1]
            last["content"] = last.get("content", "") + f"{marks.end} "
        text = render(template, given, self.name)
        if continue_final_message:
            text = _until(text, marks.end)
        if max_bytes is not None and (size := len(text.encode(errors="replace"))) > max_bytes:
            raise ValueError(f"the conversation has {size} bytes, more than fit into the model's context ({max_bytes})")
        return self._encode(text, tokens, marks, apart=template in BUILT_IN.values())

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

    def _control(self, template: str) -> Mapping[str, int]:
        """The tokens that mark turns: the control tokens, and others spelled `<|…|>` that the template writes."""
        assert self.tokenizer is not None
        turns = {
            token: token_id
            for token, token_id in self.tokenizer.user_defined.items()
            if re.fullmatch(r"<\|.+\|>", token) and token in template
        }
        return {**self.tokenizer.control.ids, **turns}

    def _encode(self, text: str, tokens: Mapping[str, int], marks: Marks, apart: bool) -> list[int]:
        """Ids of a rendered text. apart: each text between two control tokens begins like a prompt of its own."""
        assert self.tokenizer is not None
        check_text(text)
        eats = self.tokenizer.control.eats
        written = ControlTokens({t: i for t, i in tokens.items() if t in self.tokenizer.user_defined})
        ids: list[int] = []
        for index, part in enumerate(ControlTokens(tokens, eats).split(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            first = not index or apart or self.tokenizer.spaces_parts
            # A message spells a token that is one in any text: cut behind its first character, it is none.
            pieces = written.cut(marks.take_away(part))
            for number, piece in enumerate(pieces):
                ids += self.tokenizer.encode(piece) if first and not number else self._go_on(piece)
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
