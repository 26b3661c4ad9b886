"""Conversations in OpenAI's form, checked, as the plain data that templates are given."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_MAX_DEPTH = 64

Message = Mapping[str, Any]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """One conversation as dicts of plain data. ValueError names the index of a message that is wrong.

    A content is text, or a list of parts of type text, which become one text with a line each. It may be absent or None
    beside `tool_calls` alone. The arguments of tool calls become objects where they are JSON text. Keys whose value is
    None are left out, since templates test for keys.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ValueError(f"messages={messages!r:.80} is not a conversation: expected a list of messages")
    if not messages:
        raise ValueError("messages is empty: expected at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def is_conversation(messages: Any) -> bool:
    """Whether these are the messages of one conversation, not a list of conversations."""
    return not (isinstance(messages, Sequence) and messages and isinstance(messages[0], (list, tuple)))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}={message!r:.80} is not a message: expected a dict with role and content")
    found = {key: value for key, value in plain(message, where).items() if value is not None}
    role = found.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(f"{where} has role {role!r:.80}: expected a name such as system, user, assistant or tool")
    if "tool_calls" in found:
        found["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in _a_list(found, "tool_calls", where)]
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where} has content {content!r:.80}: expected text, or a list of parts of type text")
    elif content is None and not found.get("tool_calls"):
        raise ValueError(f"{where} ({role}) has no content: expected text")
    return found


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise ValueError(f"{where} is of type {kind!r:.80}: this model reads text alone")
    if not isinstance(text := part.get("text"), str):
        raise ValueError(f"{where} has text {text!r:.80}: expected text")
    return text


def _tool_call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}
    except (ValueError, RecursionError):
        raise ValueError(f"{where} has arguments {arguments!r:.80}, which are not JSON") from None


def _a_list(found: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(value := found[key], list):
        raise ValueError(f"{where} has {key}={value!r:.80}: expected a list")
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON's types alone: a template that got other objects could call their methods. ValueError for what
    JSON does not have."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        if wrong := next((key for key in value if not isinstance(key, str)), None):
            raise ValueError(f"{where} has the key {wrong!r:.80}: expected text")
        return {str.__str__(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [plain(item, where, depth + 1) for item in value]
    raise ValueError(f"{where} holds {value!r:.80}, a {type(value).__name__}: expected what JSON has")
