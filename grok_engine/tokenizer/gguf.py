"""The tokenizer that a GGUF file carries in its metadata, rebuilt as the files of the library that runs its kind."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Tokenizer
from .byte_level import byte_level_files
from .hf import HFTokenizer
from .sentencepiece import SentencePieceTokenizer

# Types of tokens, as SentencePiece numbers them.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
GROK2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By `tokenizer.ggml.pre`: how a text is cut before merging, as the models' own tokenizer.json have it. None is GPT-2's
# expression alone, "" the same after every digit is cut off.
_PRE: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": "", "starcoder": "", "refact": "", "command-r": "", "codeshell": "", "exaone": "", "minerva-7b": "",
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3,
    "tekken": _TEKKEN,
    "grok-2": GROK2,
}  # fmt: skip
# Of these, words that are tokens are not merged, and BOS goes before a prompt where `add_bos_token` does not say.
_LLAMA3_KIND = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def tokenizer_files(metadata: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """What a file's metadata is as the files that the libraries read: a `tokenizer.model` or a `tokenizer.json`, and
    its `tokenizer_config.json`; empty where there is none.

    path: for messages. ValueError for a kind or a pre-tokenizer that is not served, and for keys that do not fit.
    """
    kind = metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return {}
    if kind == "llama":
        keys = _Keys(metadata, path)
        # legacy: transformers' word for the space that llama.cpp puts behind control tokens too
        config = dict(zip(("add_bos_token", "add_eos_token"), _adds(keys, True), strict=True)) | {"legacy": True}
        return {"tokenizer.model": _sentencepiece_model(keys), "tokenizer_config.json": json.dumps(config).encode()}
    if kind == "gpt2":
        return _byte_level_files(_Keys(metadata, path))
    raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r:.80}, expected 'llama', 'gpt2' or 'no_vocab'")


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer in a file's metadata, or None where it has none. Raises as `tokenizer_files` does."""
    files = tokenizer_files(metadata, path)
    if model := files.get("tokenizer.model"):
        config = json.loads(files["tokenizer_config.json"])
        adds = {key: config[f"{key}_token"] for key in ("add_bos", "add_eos")}
        return SentencePieceTokenizer(path, model, spaces_parts=True, **adds)
    return HFTokenizer(path, files["tokenizer.json"], files["tokenizer_config.json"]) if files else None


class _Keys:
    """The keys of `tokenizer.ggml`, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata, self._path = metadata, path
        self.tokens = self.strings("tokens")
        if again := len(self.tokens) - len(set(self.tokens)):
            raise ValueError(f"{path}: tokenizer.ggml.tokens has {again} duplicates, expected none")
        self.types = self.numbers("token_type", int)

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def error(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self._path}: tokenizer.ggml.{key} is {self.get(key)!r:.80}, expected {expected}")

    def strings(self, key: str) -> tuple[str, ...]:
        found = self.get(key)
        if not isinstance(found, tuple) or not all(isinstance(value, str) for value in found):
            raise self.error(key, "a list of strings")
        return found

    def numbers(self, key: str, kind: type) -> tuple[Any, ...]:
        """One for each token."""
        found = self.get(key)
        if not isinstance(found, tuple) or len(found) != len(self.tokens) or any(type(n) is not kind for n in found):
            raise self.error(key, f"{len(self.tokens)} of {kind.__name__}, one for each token")
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = self.get(key)
        if found is not None and not isinstance(found, bool):
            raise self.error(key, "a boolean")
        return default if found is None else found

    def token(self, kind: str, default: int | None = None) -> str | None:
        """The token that a key names by its id."""
        found = self.get(key := f"{kind}_token_id")
        found = default if found is None else found
        if found is None:
            return None
        if type(found) is not int or not 0 <= found < len(self.tokens):
            raise self.error(key, f"0 to {len(self.tokens) - 1}")
        return self.tokens[found]


def _adds(keys: _Keys, bos: bool) -> tuple[bool, bool]:
    """Whether BOS goes before and EOS after a prompt; `bos` is llama.cpp's default."""
    return keys.flag("add_bos_token", bos), keys.flag("add_eos_token", False)


def _byte_level_files(keys: _Keys) -> dict[str, bytes]:
    """GPT-2's kind: bytes spelled as characters, and merges in the order of their ranks."""
    pre = keys.get("pre")
    if not isinstance(pre, str) or pre not in _PRE:
        raise keys.error("pre", f"one of {', '.join(_PRE)}")
    merges = [merge.split(" ") for merge in keys.strings("merges")]
    if bad := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"{keys.error('merges', 'pairs of tokens')}, found {' '.join(bad)!r:.80}")
    named = {kind: keys.token(kind) for kind in ("bos", "eos")}
    around = dict(zip(named, _adds(keys, pre in _LLAMA3_KIND), strict=True))
    for kind, token in named.items():
        if token is None and keys.get(f"add_{kind}_token"):
            raise keys.error(f"add_{kind}_token", f"false, since {kind}_token_id is missing")
    added = (
        (index, token, kind != _USER_DEFINED)
        for index, (token, kind) in enumerate(zip(keys.tokens, keys.types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    )
    before, after = (token if around[kind] else None for kind, token in named.items())
    return byte_level_files(
        {token: i for i, token in enumerate(keys.tokens)}, merges, added=added, expression=_PRE[pre],
        ignore_merges=pre in _LLAMA3_KIND, before=before, after=after,
        named={kind: token for kind, token in named.items() if token is not None},
    )  # fmt: skip


def _sentencepiece_model(keys: _Keys) -> bytes:
    """A `ModelProto` of sentencepiece_model.proto: pieces, trainer_spec and normalizer_spec."""
    pieces = zip(keys.tokens, keys.numbers("scores", float), keys.types, strict=True)
    trainer = [
        _field(3, 2),  # model_type BPE
        _field(35, _BYTE in keys.types),  # byte_fallback
        *(
            _field(number, piece)
            for number, kind, default in ((45, "unknown", 0), (46, "bos", 1), (47, "eos", 2), (48, "padding", None))
            if (piece := keys.token(kind, default)) is not None
        ),
    ]
    normalizer = [
        _field(1, "identity"),
        _field(3, keys.flag("add_space_prefix", True)),
        _field(4, keys.flag("remove_extra_whitespaces", False)),
    ]
    model = [_field(1, _field(1, piece) + _field(2, score) + _field(3, kind)) for piece, score, kind in pieces]
    return b"".join([*model, _field(2, b"".join(trainer)), _field(3, b"".join(normalizer))])


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
