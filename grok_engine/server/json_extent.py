"""Where a JSON object ends in a text that comes in pieces."""

from __future__ import annotations

import re

_STRING = re.compile(r'(?:[^"\\]|\\.)*', re.S)
_BETWEEN = re.compile(r"[\s0-9+\-.,:eEtrufalsn]*")  # of numbers, true, false, null, and between values
_CLOSE = {"{": "}", "[": "]"}


class JsonExtent:
    """Follows brackets and strings, and refuses characters that JSON has nowhere else. Values are not checked.

    closed: the object has ended. broken: no JSON text goes on like this. within: begin inside of an object.
    """

    def __init__(self, *, within: bool = False) -> None:
        self.closed = self.broken = False
        self._ends = ["}"] if within else []  # of the open brackets, the innermost last
        self._in_string = self._escaped = False

    def scan(self, text: str, start: int = 0) -> int:
        """Go on with text[start:]. Returns the index behind what belongs to the object."""
        at = start
        while at < len(text) and not (self.closed or self.broken):
            if self._in_string:
                at = self._string(text, at)
                continue
            match = _BETWEEN.match(text, at)
            assert match is not None
            at = match.end()
            if at < len(text):
                self._bracket(text[at])
                at += not self.broken
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        match = _STRING.match(text, at)
        assert match is not None
        if (at := match.end()) < len(text):
            self._in_string = text[at] == "\\"  # the last character, whose other half is still to come
            self._escaped = self._in_string
            at += 1
        return at

    def _bracket(self, character: str) -> None:
        if character == '"':
            self._in_string = True
        elif character in _CLOSE:
            self._ends.append(_CLOSE[character])
        elif self._ends and character == self._ends[-1]:
            self._ends.pop()
            self.closed = not self._ends
        else:
            self.broken = True
