"""What a tokenizer is, and text from its tokens as they arrive."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

SPACE = "▁"  # how SentencePiece spells a space inside a piece
REPLACEMENT = "\ufffd"


class Surface(NamedTuple):
    """What one token adds to a text: characters, or bytes that join those of its neighbours into characters.

    `breaks` says that bytes before this token cannot join bytes after it. `at_start` is for the next token.
    """

    text: str
    data: bytes
    breaks: bool
    at_start: bool


class Tokenizer(Protocol):
    """Ids are 0..vocab_size − 1. `encode` adds no BOS and no EOS; `decode` leaves control tokens out. Control tokens
    spelled out in a text are text, or with `special` themselves: for templates of ours, never for what a user wrote.

    prefix, suffix: what the model's files put before and after a prompt of text, as a rule BOS and nothing. Whoever
    makes a prompt adds them (`RequestBuilder`).

    Three are for chat templates. `control`: the control tokens. `user_defined`: tokens that text is made into wherever
    it spells them. `spaces_parts`: whether the space that is put before a text is put behind a control token too.

    `IncrementalDetokenizer` needs two more. `surface`: what one token adds to the text, given whether it is the first.
    `replace_each_byte`: whether each undecodable byte becomes U+FFFD, rather than a truncated character as a whole.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    replace_each_byte: bool

    @property
    def spaces_parts(self) -> bool: ...

    @property
    def control(self) -> ControlTokens: ...

    @property
    def user_defined(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def surface(self, token_id: int, at_start: bool) -> Surface: ...


class PaddedTokenizer:
    """The tokenizer of a model that has more tokens: those from `tokenizer.vocab_size` on have no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self.bos_token_id, self.eos_token_ids = tokenizer.bos_token_id, tokenizer.eos_token_ids
        self.prefix, self.suffix = tokenizer.prefix, tokenizer.suffix
        self.replace_each_byte = tokenizer.replace_each_byte

    @property
    def spaces_parts(self) -> bool:
        return self._tokenizer.spaces_parts

    @property
    def control(self) -> ControlTokens:
        return self._tokenizer.control

    @property
    def user_defined(self) -> Mapping[str, int]:
        return self._tokenizer.user_defined

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, special=special)

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        return self._tokenizer.decode([token_id for token_id in ids if token_id < self._tokenizer.vocab_size])

    def surface(self, token_id: int, at_start: bool) -> Surface:
        if token_id < self._tokenizer.vocab_size:
            return self._tokenizer.surface(token_id, at_start)
        check_ids((token_id,), self.vocab_size)
        return Surface("", b"", breaks=False, at_start=at_start)


class IncrementalDetokenizer:
    """Text as tokens arrive. What the pushes and `finish` return concatenates to `tokenizer.decode` of all the ids.

    Holds back at most the 3 bytes of an unfinished character, and looks at no earlier token again.

    spelled: the text of control tokens, by id, which are left out otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, spelled: Mapping[int, str] | None = None) -> None:
        self._tokenizer, self._spelled = tokenizer, spelled or {}
        self._pending = b""
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none. ValueError for an id out of range."""
        if token_id in self._spelled:
            self._at_start = False
            return self.finish() + self._spelled[token_id]
        text, data, breaks, self._at_start = self._tokenizer.surface(token_id, self._at_start)
        if breaks:
            return self.finish() + text
        if not data:
            return text
        return self._take(self._pending + data, final=False)

    def finish(self) -> str:
        """The rest: bytes still waiting for their character become U+FFFD."""
        return self._take(self._pending, final=True)

    def _take(self, data: bytes, *, final: bool) -> str:
        out: list[str] = []
        self._pending = b""
        while data:
            try:
                out.append(data.decode())
                break
            except UnicodeDecodeError as error:
                out.append(data[: error.start].decode())
                # The character is incomplete, not invalid: later bytes may complete it.
                if error.end == len(data) and error.reason == "unexpected end of data" and not final:
                    self._pending = data[error.start :]
                    break
                out.append(REPLACEMENT)
                data = data[error.start + 1 if self._tokenizer.replace_each_byte else error.end :]
        return "".join(out)


class ControlTokens:
    """The control tokens of a tokenizer, to be found in a text. ids: by how they are spelled. eats: of those that take
    the spaces beside them along, whether the ones before and the ones after."""

    def __init__(self, ids: Mapping[str, int], eats: Mapping[str, tuple[bool, bool]] | None = None) -> None:
        self.ids, self.eats = ids, eats or {}
        longest_first = sorted(filter(None, ids), key=len, reverse=True)
        self._spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def split(self, text: str) -> list[str | int]:
        """The ids of the control tokens in a text, and the text before, between and after them."""
        parts = self._spelled.split(text) if self._spelled else [text]
        for index in range(1, len(parts), 2) if self.eats else ():
            before, after = self.eats.get(parts[index], (False, False))
            parts[index - 1] = parts[index - 1].rstrip() if before else parts[index - 1]
            parts[index + 1] = parts[index + 1].lstrip() if after else parts[index + 1]
        return [self.ids[part] if index % 2 else part for index, part in enumerate(parts) if part]

    def cut(self, text: str) -> list[str]:
        """A text in pieces that spell no control token: each is cut behind its first character."""
        at = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)] if self._spelled else [0]
        return [text[i:j] for i, j in zip(at, [*at[1:], len(text)], strict=True) if i < j]

    def encode(self, text: str, plain: Callable[[str], list[int]]) -> list[int]:
        """Their ids, and those that `plain` gives for the text before, between and after them."""
        found: list[int] = []
        for part in self.split(text):
            found += [part] if isinstance(part, int) else plain(part)
        return found


MAX_BYTES = 256 << 20  # of a tokenizer's file; the largest published ones have 40 MB


def read_file(path: Path) -> bytes:
    """The content of a tokenizer's file. ValueError for anything but a regular file of at most MAX_BYTES."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is not a file: expected a tokenizer")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: expected a tokenizer of at most {MAX_BYTES:,}")
    return path.read_bytes()


def check_text(text: str) -> None:
    text.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is not in 0..{vocab_size - 1}")
