"""Tool calls in a model's text, as it comes."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

from .json_extent import JsonExtent
from .tool_styles import ToolStyle

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.S)
_FIRST_KEY = re.compile(r'\{\s*"(?:name|type|id|function|arguments|parameters)"')
_BEFORE_KEY = re.compile(r'\{\s*(?:"\w*)?')
_NAMED = r"\s*([\w.-]+)(?:{id_mark}(\w+))?(?:{arguments_mark})?\s*(?=\{{)"
_SPACE = " \t\r\n"
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call has begun: the `index`-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments. Its pieces make a JSON text, which is cut short where the answer is."""

    index: int
    text: str


Event = Content | CallStart | Arguments
_State = Callable[[bool], bool]


class CallParser:
    """Finds the tool calls of one answer, given in pieces. However it is cut, the events add up to the same.

    A call begins once its name is known and its arguments begin with `{`, and its arguments come as they are written.
    What looks like a call but is none is content, whole. If the arguments of a call that has begun stop being JSON,
    they end there, and the rest is content. Whitespace between content and a call is dropped, as are a call's marks.

    Texts must show control tokens (skip_special_tokens=False) if `style.marks` is not empty.
    """

    def __init__(self, style: ToolStyle) -> None:
        self.calls = 0  # that have begun
        self._style = style
        marks = {name: re.escape(getattr(style, name)) for name in ("id_mark", "arguments_mark")}
        self._head = _HEAD if style.arguments else re.compile(_NAMED.format(**marks))
        self._state: _State = self._bare if style.bare else self._text
        self._events: list[Event] = []
        self._rest = ""  # what no event and no state accounts for yet
        self._opened = ""  # what opened the call that is being read: content if it is none
        self._in_list = False
        self._said = False  # whether content has come since the last call
        self._extent, self._scanned = JsonExtent(), 0

    def feed(self, text: str) -> list[Event]:
        """What becomes known with the next piece of the text."""
        self._rest += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """What was held back, when no more will come."""
        events = self._run(final=True)
        if self._state == self._call:  # nothing came behind what opens a call
            self._no_call()
        return events + self._run(final=True)

    def _run(self, *, final: bool) -> list[Event]:
        while self._rest and self._state(final):
            pass
        events, self._events = self._events, []
        return events

    # Each state takes what it can of `_rest`, and returns whether there may be more to do at once. With `final` it
    # leaves nothing.

    def _text(self, final: bool) -> bool:
        begin, rest = self._style.begin, self._rest
        at = rest.find(begin) if begin else -1
        if at >= 0:
            kept = len(rest[:at].rstrip(_SPACE))
            self._say(rest[:kept])
            self._open(rest[kept : at + len(begin)], rest[at + len(begin) :])
            return True
        held = 0 if final else _begun(rest, begin)
        end = len(rest) - held
        if not final or (self.calls and not self._said):
            end = len(rest[:end].rstrip(_SPACE))
        self._say(rest[:end])
        self._rest = "" if final else rest[end:]
        return False

    def _bare(self, final: bool) -> bool:
        """At the start of an answer that may begin with a call."""
        text = self._rest.lstrip(_SPACE)
        if _FIRST_KEY.match(text):
            self._open(self._rest[: -len(text)], text)
            return True
        if not final and (not text or _BEFORE_KEY.fullmatch(text)):
            return False
        self._state = self._text
        return True

    def _open(self, opened: str, rest: str) -> None:
        self._opened, self._rest, self._state = opened, rest, self._call
        self._extent, self._scanned = JsonExtent(), 0

    def _call(self, final: bool) -> bool:
        """From what opens a call to its arguments."""
        rest, in_json = self._rest, bool(self._style.arguments)
        if in_json and self._opened.strip() and not self._in_list and (match := re.match(r"\s*\[", rest)):
            self._open(self._opened + match[0], rest[match.end() :])
            self._in_list = True
            return True
        if match := self._head.match(rest):
            name, own_id = (_loads(match[1]), None) if in_json else match.groups()
            if name is None:
                return self._no_call()
            self._start(name, own_id)
            self._rest, self._state, self._extent = rest[match.end() :], self._arguments, JsonExtent()
            return True
        if not in_json:
            return self._no_call() if final or not re.fullmatch(r"[\w.\s\[\]-]*", rest) else False
        # an object with its keys in another order is read whole
        if (text := rest.lstrip(_SPACE)) and text[0] != "{":
            return self._no_call()
        self._scanned = self._extent.scan(rest, self._scanned)
        if not self._extent.closed:
            return self._no_call() if final or self._extent.broken else False
        if (call := _read_call(rest[: self._scanned], needs_arguments=not self._opened.strip())) is None:
            return self._no_call()
        self._start(call[0], None)
        self._events.append(Arguments(self.calls - 1, call[1]))
        self._rest, self._state = rest[self._scanned :], self._after
        return True

    def _arguments(self, final: bool) -> bool:
        if end := self._extent.scan(self._rest):
            self._events.append(Arguments(self.calls - 1, self._rest[:end]))
            self._rest = self._rest[end:]
        if self._extent.closed:
            self._state = self._rest_of_call if self._style.arguments else self._after
            self._extent, self._scanned = JsonExtent(within=True), 0
        elif self._extent.broken:
            self._state, self._in_list = self._text, False
        return True

    def _rest_of_call(self, final: bool) -> bool:
        """What stands behind the arguments in a call's object, an id say, counts for nothing."""
        self._scanned = self._extent.scan(self._rest, self._scanned)
        if self._extent.broken:
            self._state, self._in_list = self._text, False
        elif self._extent.closed or final:
            self._rest, self._state = self._rest[self._scanned :], self._after
        return self._extent.broken or self._extent.closed

    def _after(self, final: bool) -> bool:
        """Behind a call: another one of its list, or its end."""
        text, end = self._rest.lstrip(_SPACE), self._style.end
        if not text or (not self._in_list and len(text) < len(end) and end.startswith(text)):
            self._rest = "" if final else self._rest
            return False
        if text[0] == ("," if self._in_list else ";" if self._style.bare else ""):
            self._open(text[0], text[1:])
        elif self._in_list:
            self._in_list, self._rest = False, text.removeprefix("]")
        else:
            self._state, self._rest = self._text, text.removeprefix(end)
        return True

    def _start(self, name: str, own_id: str | None) -> None:
        size = self._style.id_size
        if own_id is None or len(own_id) != size:
            own_id = "".join(map(secrets.choice, [_ID_CHARACTERS] * size)) if size else f"call_{secrets.token_hex(12)}"
        self._events.append(CallStart(self.calls, own_id, name))
        self.calls += 1
        self._said = False

    def _no_call(self) -> bool:
        """What opened it is content, and what follows is read as text."""
        self._say(self._opened)
        self._in_list, self._state = False, self._text
        return True

    def _say(self, text: str) -> None:
        if self.calls and not self._said:
            text = text.lstrip(_SPACE)
        if text:
            self._events.append(Content(text))
            self._said = True


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    if not mark or mark[0] not in text:
        return 0
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


def _loads(text: str) -> Any:
    """The value of a JSON text, None if it is none. Line breaks may stand in strings."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _read_call(text: str, *, needs_arguments: bool) -> tuple[str, str] | None:
    """The name and the arguments of a call in JSON, None if it is none. Arguments may be JSON in a string."""
    call = _loads(text)
    if isinstance(call, dict) and isinstance(call.get("function"), dict):  # as OpenAI writes calls
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        return None
    key = next((key for key in ("arguments", "parameters") if key in call), None)
    if key is None and needs_arguments:
        return None
    found = call.get(key) if key else {}
    if isinstance(found, str):
        found = _loads(found)
    return (name, json.dumps(found or {}, ensure_ascii=False)) if isinstance(found, (dict, NoneType)) else None
