"""Hugging Face tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import SPACE, ControlTokens, IncrementalDetokenizer, Surface, check_ids, check_text, require_file


class HFTokenizer:
    """A `tokenizer.json` with a decoder of one of two kinds: byte-level, or SentencePiece's pieces with byte fallback.

    `decode` differs from the tokenizers library's in one case: there, one wrong byte in a run of fallback bytes makes
    U+FFFD of the whole run, good characters too; here only of what cannot be decoded, as SentencePiece has it.
    The file names no BOS and EOS: they are read from `tokenizer_config.json` beside it, where there is one.
    content, config: of the two where they are no files; `path` is then for messages.
    """

    def __init__(self, path: str | Path, content: bytes | None = None, config: bytes = b"{}") -> None:
        import tokenizers  # lazily, as this import is slow

        path = Path(path)
        if content is None:
            require_file(path)
            beside = path.with_name("tokenizer_config.json")
            content, config = path.read_bytes(), beside.read_bytes() if beside.is_file() else config
        try:
            self._tk = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        values = json.loads(self._tk.to_str())
        decoder, self.spaces_parts = values["decoder"], _spaces_parts(values)
        self._byte_level, self._strip = _decoder_kind(decoder, path)
        self.replace_each_byte = not self._byte_level
        added = self._tk.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        eats = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.lstrip or token.rstrip}
        self.control = ControlTokens({added[i].content: i for i in self._special}, eats)
        self.user_defined = {token.content: i for i, token in added.items() if not token.special}
        self._tk.encode_special_tokens = True  # as text, that is
        self.vocab_size: int = 1 + max(self._tk.get_vocab(with_added_tokens=True).values(), default=-1)
        bos, eos = _special_tokens(path, config)
        self.bos_token_id: int | None = None if bos is None else self._id_of(bos, path)
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (self._id_of(eos, path),)

    def _id_of(self, token: str, path: Path) -> int:
        token_id: int | None = self._tk.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{path.with_name('tokenizer_config.json')} names {token!r}, which {path.name} lacks")
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


def _special_tokens(path: Path, config: bytes) -> tuple[str | None, str | None]:
    try:
        values = json.loads(config)
        tokens = [values.get("bos_token"), values.get("eos_token")]
        bos, eos = (t["content"] if isinstance(t, dict) else t for t in tokens)
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path.with_name('tokenizer_config.json')} is not a configuration: {error}") from None
    return bos, eos


# Byte-level BPE spells printable bytes as their Latin-1 characters, and the others from U+0100 on, in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


def _fallback_byte(token: str) -> bytes:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else b""
