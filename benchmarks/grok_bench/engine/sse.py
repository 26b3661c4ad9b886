"""Server-sent events, out of the bytes of a response."""

from __future__ import annotations

import re

# A \r at the end of what has come may be half of \r\n: it waits for the next byte.
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[\s\S])")


class EventStream:
    """Takes bytes as they come and gives the data of every event that they complete.

    Comments and fields other than `data` are left out. Lines end as the standard says, with \\n, \\r\\n or \\r: not at
    U+2028 and the other characters at which str.splitlines cuts, which JSON may hold as they are.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that end in `piece`. UnicodeDecodeError where it is not UTF-8."""
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].decode().removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events
