"""Which control tokens of a rendered conversation are the template's, and which somebody only wrote.

A template puts contents and control tokens into one text. To tell them apart afterwards, the characters that control
tokens are recognised by (the `<` of `<|im_end|>`) are replaced in the contents by private-use characters before
rendering, and put back after the text has been cut at its control tokens. A template that trims, splits or joins
contents carries the private-use characters with it, so nothing that it does to contents can make a control token.

A template may also look for something in a content, such as `</think>`. Its own strings are therefore left as they are
in contents, unless a control token could begin inside of one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

_PRIVATE = range(0xF0000, 0xFFFFE)


class ControlSpellings:
    """What control tokens are recognised by. control: how they are spelled. constants: the template's strings."""

    def __init__(self, control: Collection[str], constants: Iterable[str]) -> None:
        tails: dict[str, list[str]] = {}
        for token in filter(None, control):
            tail = token[_key(token) :]
            tails.setdefault(tail[0], []).append(tail)
        self.keys = sorted(tails)
        kept = [c for c in constants if not tails.keys().isdisjoint(c) and not _may_begin(c, tails)]
        kept.sort(key=len, reverse=True)
        found = [*map(re.escape, kept), f"[{re.escape(''.join(self.keys))}]"] if self.keys else ["(?!)"]
        self.pattern = re.compile("|".join(found))


class Marks:
    """The replacements in one conversation. taken: text whose characters must not serve as replacements."""

    def __init__(self, spellings: ControlSpellings, taken: str) -> None:
        keys, used = spellings.keys, set(taken)
        free = [chr(code) for code in islice((c for c in _PRIVATE if chr(c) not in used), len(keys) + 1)]
        if len(free) <= len(keys):
            raise ValueError("the messages use all private-use characters of Unicode: expected fewer")
        self.end = free.pop()  # a character that nothing else has
        self._pattern = spellings.pattern
        self._marks = dict(zip(keys, free, strict=True))
        self._keys = str.maketrans({mark: key for key, mark in self._marks.items()})

    def put(self, value: Any) -> Any:
        """Plain data with its strings marked, keys of dicts too."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._marks.get(match[0], match[0]), value)
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list) else value

    def take_away(self, text: str) -> str:
        """The text as it was before marking."""
        return text.translate(self._keys)


def _key(token: str) -> int:
    """The first character that is no letter, digit or space: those change their case or are trimmed, and are common."""
    return next((i for i, c in enumerate(token) if not c.isalnum() and not c.isspace()), 0)


def _may_begin(text: str, tails: Mapping[str, Collection[str]]) -> bool:
    return any(
        text.startswith(tail, at) or tail.startswith(text[at:])
        for at, character in enumerate(text)
        for tail in tails.get(character, ())
    )
