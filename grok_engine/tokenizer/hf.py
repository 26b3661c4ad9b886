"""Hugging Face tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import SPACE, ControlTokens, IncrementalDetokenizer, Surface, check_ids, check_text, read_file

CONFIG = "tokenizer_config.json"


class HFTokenizer:
    """A `tokenizer.json` with a decoder of one of two kinds: byte-level, or SentencePiece's pieces with byte fallback.

    `decode` differs from the tokenizers library's in one case: there, one wrong byte in a run of fallback bytes makes
    U+FFFD of the whole run, good characters too; here only of what cannot be decoded, as SentencePiece has it.
    What goes around a prompt is its post-processor's, as in transformers 5, which ignores `add_bos_token`. Which tokens
    are BOS and EOS is read from `tokenizer_config.json` beside it, where there is one.
    content, config: of the two where they are no files; `path` is then for messages.
    """

    def __init__(self, path: str | Path, content: bytes | None = None, config: bytes | None = None) -> None:
        import tokenizers  # lazily, as this import is slow

        path = Path(path)
        values = read_config(path, config) if content is None or config is not None else {}
        content = read_file(path) if content is None else content
        try:
            self._tk = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self._tk.no_truncation()  # which a file may ask for, and which is for training
        self._tk.no_padding()
        spelled = json.loads(self._tk.to_str())
        decoder, self.spaces_parts = spelled["decoder"], _spaces_parts(spelled)
        self._byte_level, self._strip = _decoder_kind(decoder, path)
        self.replace_each_byte = not self._byte_level
        added = self._tk.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        eats = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.lstrip or token.rstrip}
        self.control = ControlTokens({added[i].content: i for i in self._special}, eats)
        self.user_defined = {token.content: i for i, token in added.items() if not token.special}
        self._tk.encode_special_tokens = True  # as text, that is
        self.vocab_size: int = 1 + max(self._tk.get_vocab(with_added_tokens=True).values(), default=-1)
        bos, eos = (_token(path, values, key) for key in ("bos_token", "eos_token"))
        self.bos_token_id: int | None = None if bos is None else self._id_of(bos, path)
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (self._id_of(eos, path),)
        self.prefix, self.suffix = self._around(path)

    def _around(self, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text, found out on texts of one character."""
        if self._tk.post_processor is None:
            return (), ()
        pairs = ((self._tk.encode(text, add_special_tokens=False).ids, self._tk.encode(text)) for text in "a b.0\n")
        for plain, whole in pairs:
            before = next((i for i, added in enumerate(whole.special_tokens_mask) if not added), 0)
            if plain and whole.ids[before : before + len(plain)] == plain:
                return tuple(whole.ids[:before]), tuple(whole.ids[before + len(plain) :])
        raise ValueError(f"{path}: the post-processor does more than to put tokens before and after a text")

    def _id_of(self, token: str, path: Path) -> int:
        token_id: int | None = self._tk.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{path.with_name(CONFIG)} names {token!r}, which {path.name} lacks")
        return token_id

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        check_text(text)
        return self.control.encode(text, self._plain) if special else self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return list(self._tk.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        stream = IncrementalDetokenizer(self)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def surface(self, token_id: int, at_start: bool) -> Surface:
        check_ids((token_id,), self.vocab_size)
        token = None if token_id in self._special else self._tk.id_to_token(int(token_id))
        if token is None:  # special tokens and unused ids add no text
            return Surface("", b"", breaks=False, at_start=at_start)
        if self._byte_level:
            try:
                data = bytes([_BYTE_OF_CHARACTER[c] for c in token])
            except KeyError:  # added tokens are stored as plain text
                data = token.encode()
            return Surface("", data, breaks=False, at_start=False)
        data = _fallback_byte(token)
        strip = at_start and self._strip
        if data:
            kept = b"" if strip and data == b" " else data
            return Surface("", kept, breaks=False, at_start=False)
        text = token.replace(SPACE, " ")
        return Surface(text[1:] if strip and text.startswith(" ") else text, b"", True, at_start and not text)


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


def _spaces_parts(values: Mapping[str, Any]) -> bool:
    """Whether the space that goes before a text goes behind every control token too."""
    normalizer, pre_tokenizer = (values[key] or {} for key in ("normalizer", "pre_tokenizer"))
    steps = [*normalizer.get("normalizers", [normalizer]), *pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in steps)


def read_config(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """The values of the `tokenizer_config.json` beside a tokenizer's file, none where there is none. content: of one
    that is no file.

    The strict reader of JSON does not do: `model_max_length` is 10^30 in many of these files.
    """
    beside = path.with_name(CONFIG)
    if content is None and not (beside.is_symlink() or beside.exists()):
        return {}
    try:
        values = json.loads(read_file(beside) if content is None else content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside} is not a configuration: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{beside} is not a configuration: it holds a {type(values).__name__}")
    return values


def _token(path: Path, values: Mapping[str, Any], key: str) -> str | None:
    found = values.get(key)
    token = found.get("content") if isinstance(found, dict) else found
    if found is None or isinstance(token, str):
        return token
    raise ValueError(f"{path.with_name(CONFIG)}: {key}={found!r:.80} is not a token")


# Byte-level BPE spells printable bytes as their Latin-1 characters, and the others from U+0100 on, in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
_CHARACTER_OF_BYTE = {b: character for character, b in _BYTE_OF_CHARACTER.items()}  # as str.translate takes them


def spelled(token: bytes) -> str:
    """Bytes as a byte-level `tokenizer.json` writes them."""
    return token.decode("latin-1").translate(_CHARACTER_OF_BYTE)


def _fallback_byte(token: str) -> bytes:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else b""
