"""What a structured output may contain, checked in linear time before the grammar library sees it.

The library recurses once a rule or reference, reads JSON numbers as fp64 by an inexact algorithm, and lets the last of
equal keys win. So size, nesting, rules, numbers and keys are checked here, without recursion.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from grok_engine.config import shown

from .params import StructuredOutput

_EXACT = 2**53
# as the library tells Lark from GBNF, but in linear time
_LARK = re.compile(r"(?m)^[^\S\n]*(%llguidance\b|start\s*:)")
# Each takes linear time, because a string or class that is not closed is one token, too.
_TOKENS = {
    "regex": re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|(?P<open>\()|(?P<close>\))", re.S),
    "gbnf": re.compile(
        r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*|(?P<open>\()|(?P<close>\))|(?P<rule>::=)', re.S
    ),
    "lark": re.compile(
        r'"(?:\\.|[^"\\\n])*"?|/(?:\\.|[^/\\\n])+/?|(?:#|//)[^\n]*|(?P<json>%(?:json|llguidance|regex)\s*)'
        r"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<rule>:+)"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Of one structured output: bytes of its text in UTF-8, how deep brackets are nested, how many rules or JSON
    references it has, and the seconds that compiling it may take."""

    max_bytes: int
    max_depth: int
    max_rules: int
    seconds: float


class Source(NamedTuple):
    """A checked structured output. kind: "regex", "json_schema", "gbnf" or "lark"."""

    kind: str
    text: str


def check_grammar(structured: StructuredOutput, limits: GrammarLimits) -> Source:
    """The text to compile, a schema as JSON of its own spelling. ValueError with the value and the limit it exceeds."""
    name, given = named(structured), structured.json_schema
    text = structured.regex if structured.regex is not None else structured.grammar
    kind = "regex" if structured.regex is not None else "lark" if text is not None and _LARK.search(text) else "gbnf"
    counts = _Counts()
    try:
        if given is not None:
            kind, text = "json_schema", given if isinstance(given, str) else _spelled(given)
        assert text is not None
        size = len(text.encode())
        if size > limits.max_bytes:
            raise _Refused(f"has {size} bytes, more than max_grammar_bytes={limits.max_bytes}")
        if kind == "json_schema":
            value = counts.read(text)
            if not isinstance(value, (dict, bool)):
                raise _Refused("is not a schema: expected an object, true or false")
            text = json.dumps(_with_whitespace(value, structured.whitespace))
        else:
            counts.scan(text, kind)
        if counts.depth > limits.max_depth:
            raise _Refused(f"is nested {counts.depth} deep, more than max_grammar_depth={limits.max_depth}")
        if counts.rules > limits.max_rules:
            raise _Refused(f"has {counts.rules} rules or references, more than max_grammar_rules={limits.max_rules}")
    except _Refused as refused:
        raise ValueError(f"{name} {refused}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    return Source(kind, text)


def named(structured: StructuredOutput) -> str:
    """The field that is given and its value, shortened, for messages."""
    name = next(n for n in ("regex", "json_schema", "grammar") if getattr(structured, n) is not None)
    value = getattr(structured, name)
    return f"structured.{name}={shown(value[:300] if isinstance(value, str) else value)}"


class _Refused(ValueError):
    """A limit or rule of this module; the message follows the name of the field."""


class _Counts:
    """The deepest nesting of brackets, and the number of rules and JSON references."""

    def __init__(self) -> None:
        self.depth = self.rules = 0
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=_number, parse_float=_number, parse_constant=_constant
        )

    def scan(self, text: str, kind: str) -> None:
        """Count in a regex or grammar. Strings, character classes and comments hold no brackets."""
        depth, at, pattern = 0, 0, _TOKENS[kind]
        while token := pattern.search(text, at):
            at = token.end()
            if token.lastgroup == "open":
                depth += 1
                self.depth = max(self.depth, depth)
            elif token.lastgroup == "close":
                depth -= 1
            elif token.lastgroup == "rule":
                self.rules += 1
            elif token.lastgroup == "json":
                try:
                    at = self._decoder.raw_decode(text, at)[1]
                except _Refused:
                    raise
                except (ValueError, RecursionError) as error:
                    raise _Refused(f"{token[0].strip()} {error}") from None

    def read(self, text: str) -> Any:
        """The value of a JSON text, counted."""
        value = self._decoder.decode(text)
        todo = [(value, 1)]
        while todo:
            item, depth = todo.pop()
            if isinstance(item, (dict, list)):
                self.depth = max(self.depth, depth)
                todo.extend((child, depth + 1) for child in (item.values() if isinstance(item, dict) else item))
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise _Refused(f"has the key {twice[:100]!r} twice in one object")
        self.rules += "$ref" in found
        return found


def _number(text: str) -> int | float:
    """A number that the library keeps exactly: at most 2**53, with a significand that fp64 holds and a power of ten of
    at most 22 digits, so that one rounding is all that reading it takes."""
    try:
        value = Decimal(text)
        _, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        if (
            len(digits) <= 16
            and int("".join(map(str, digits))) <= _EXACT
            and abs(exponent) <= 22
            and abs(value) <= _EXACT
            and Decimal(repr(float(text))) == value
        ):
            return int(text) if text.lstrip("-").isdigit() else float(text)
    except ArithmeticError:  # an exponent that even Decimal cannot hold
        pass
    start = text if len(text) <= 60 else f"{text[:60]}…"
    raise _Refused(f"has the number {start}, which fp64 does not keep exactly: expected at most 2**53 and 15 digits")


def _constant(text: str) -> float:
    raise _Refused(f"has the number {text}, which JSON does not have")


def _spelled(schema: Mapping[str, Any] | bool) -> str:
    return json.dumps(dict(schema) if isinstance(schema, Mapping) else schema, ensure_ascii=False)


def _with_whitespace(schema: dict[str, Any] | bool, whitespace: str) -> dict[str, Any] | bool:
    """The schema with the library's options; those that the caller gives himself win."""
    if schema is False:
        return False
    found = {} if schema is True else schema
    options: dict[str, Any] = {"whitespace_flexible": True}
    if whitespace == "compact":
        options = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
    own = found.get("x-guidance", {})
    return {**found, "x-guidance": {**options, **own} if isinstance(own, dict) else own}
