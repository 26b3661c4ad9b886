"""Text to token ids and back: one protocol, SentencePiece and Hugging Face tokenizers behind it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    """Ids are 0..vocab_size − 1. `encode` adds no BOS and no EOS; `decode` leaves control tokens out.

    `surface` and `replace_each_byte` are what `IncrementalDetokenizer` needs: one token's part of the text, given
    whether anything stands before it; and whether every undecodable byte becomes U+FFFD of its own, or a truncated
    character as a whole becomes one.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    replace_each_byte: bool

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def surface(self, token_id: int, at_start: bool) -> Surface: ...


class IncrementalDetokenizer:
    """Text as tokens arrive. What the pushes and `finish` return concatenates to `tokenizer.decode` of all the ids.

    Holds back at most the 3 bytes of an unfinished character, and looks at no earlier token again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none. ValueError for an id out of range."""
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
                # A decoder that ran out of bytes, not one that met a wrong byte: more may complete it.
                if error.end == len(data) and error.reason == "unexpected end of data" and not final:
                    self._pending = data[error.start :]
                    break
                out.append(REPLACEMENT)
                data = data[error.start + 1 if self._tokenizer.replace_each_byte else error.end :]
        return "".join(out)


class SentencePieceTokenizer:
    """A `tokenizer.model`, as the sentencepiece library reads it.

    Control pieces spelled out in a text (`[EOS]`) are text, user-defined ones (`<|separator|>`) their token.
    """

    replace_each_byte = True

    def __init__(self, path: str | Path) -> None:
        import sentencepiece  # by those who have such a file: a model without one starts sooner

        _require_file(path)
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        sp = self._sp
        self.vocab_size: int = sp.GetPieceSize()
        self.bos_token_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_token_ids: tuple[int, ...] = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        # What becomes of a leading space is in the model's normalizer, which the library shows only by what it does.
        lone = sp.PieceToId(SPACE)
        spaced = (i for i in range(self.vocab_size) if sp.IdToPiece(i).startswith(SPACE))
        probe = lone if sp.IdToPiece(lone) == SPACE else next(spaced, None)
        self._drops_space = probe is not None and not sp.DecodeIds([probe]).startswith(" ")
        self._drops_spaces = probe is not None and sp.DecodeIds([probe, probe]) == ""

    def encode(self, text: str) -> list[int]:
        _check_text(text)
        return list(self._sp.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return str(self._sp.DecodeIds([int(i) for i in ids])) if len(ids) else ""

    def surface(self, token_id: int, at_start: bool) -> Surface:
        _check_ids((token_id,), self.vocab_size)
        sp, token_id = self._sp, int(token_id)
        piece: str = sp.IdToPiece(token_id)
        if sp.IsByte(token_id):
            return Surface("", bytes((int(piece[3:5], 16),)), breaks=False, at_start=False)
        if sp.IsControl(token_id) or sp.IsUnknown(token_id):
            text = str(sp.DecodeIds([token_id]))
            return Surface(text, b"", breaks=True, at_start=at_start and not text)
        dropped = at_start and self._drops_space and piece.startswith(SPACE)
        text = (piece[1:] if dropped else piece).replace(SPACE, " ")
        still_at_start = at_start and not text and (not dropped or self._drops_spaces)
        return Surface(text, b"", breaks=True, at_start=still_at_start)


class HFTokenizer:
    """A `tokenizer.json` with a decoder of one of two kinds: byte-level, or SentencePiece's pieces with byte fallback.

    `decode` differs from the tokenizers library's in one case: there, one wrong byte in a run of fallback bytes makes
    U+FFFD of the whole run, good characters too; here only of what cannot be decoded, as SentencePiece has it.
    The file names no BOS and EOS: they are read from `tokenizer_config.json` beside it, where there is one.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers  # as above

        path = Path(path)
        _require_file(path)
        try:
            self._tk = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        decoder = json.loads(self._tk.to_str())["decoder"]
        self._byte_level, self._strip = _decoder_kind(decoder, path)
        self.replace_each_byte = not self._byte_level
        added = self._tk.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self.vocab_size: int = 1 + max(self._tk.get_vocab(with_added_tokens=True).values(), default=-1)
        bos, eos = _special_tokens(path.with_name("tokenizer_config.json"))
        self.bos_token_id: int | None = None if bos is None else self._id_of(bos, path)
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (self._id_of(eos, path),)

    def _id_of(self, token: str, path: Path) -> int:
        token_id: int | None = self._tk.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{path.with_name('tokenizer_config.json')} names {token!r}, which {path.name} lacks")
        return token_id

    def encode(self, text: str) -> list[int]:
        _check_text(text)
        return list(self._tk.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        stream = IncrementalDetokenizer(self)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def surface(self, token_id: int, at_start: bool) -> Surface:
        _check_ids((token_id,), self.vocab_size)
        token = None if token_id in self._special else self._tk.id_to_token(int(token_id))
        if token is None:  # special, or a hole in the vocabulary: as if it were not there
            return Surface("", b"", breaks=False, at_start=at_start)
        if self._byte_level:
            try:
                data = bytes([_BYTE_OF_CHARACTER[c] for c in token])
            except KeyError:  # an added token is spelled plainly
                data = token.encode()
            return Surface("", data, breaks=False, at_start=False)
        data = _fallback_byte(token)
        strip = at_start and self._strip
        if data:
            kept = b"" if strip and data == b" " else data
            return Surface("", kept, breaks=False, at_start=False)
        text = token.replace(SPACE, " ")
        return Surface(text[1:] if strip and text.startswith(" ") else text, b"", True, at_start and not text)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder: its tokenizer.model, or else its tokenizer.json, or None."""
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return HFTokenizer(folder / "tokenizer.json")
    return None


def _decoder_kind(decoder: Any, path: Path) -> tuple[bool, bool]:
    """Whether it is byte-level, and whether it strips a leading space."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        spaces = steps[0]["pattern"] == {"String": SPACE} and steps[0]["content"] == " "
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if spaces and strip["content"] == " " and strip["start"] in (0, 1) and strip["stop"] == 0:
            return False, strip["start"] == 1
    raise ValueError(
        f"{path}: decoder {json.dumps(decoder, ensure_ascii=False)} is not read: expected ByteLevel, or "
        f"Replace({SPACE} by a space), ByteFallback, Fuse and perhaps Strip(one space at the start)"
    )


def _special_tokens(file: Path) -> tuple[str | None, str | None]:
    if not file.is_file():
        return None, None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        tokens = [values.get("bos_token"), values.get("eos_token")]
        bos, eos = (t["content"] if isinstance(t, dict) else t for t in tokens)
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is not a tokenizer configuration: {error}") from None
    return bos, eos


def _characters_of_bytes() -> Iterable[str]:
    # Byte-level BPE spells printable bytes as their Latin-1 characters, and the others from U+0100 on, in order.
    following = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
            yield chr(byte)
        else:
            yield chr(following)
            following += 1


_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_characters_of_bytes())}


def _fallback_byte(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return b""
    return b""


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: expected a tokenizer")


def _check_text(text: str) -> None:
    text.encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError, shows it and where


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is not in 0..{vocab_size - 1}")
