"""A model's tokenizer as the metadata of a GGUF file: what `gguf.py` reads, the other way round."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.gguf.files import gguf_file, read_headers

from .base import Tokenizer
from .chat_files import load_chat
from .gguf import _PRE
from .gguf import tokenizer_files as gguf_tokenizer_files
from .load import load_tokenizer, sentencepiece_file, tokenizer_files

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of tokens
_BPE = 2  # SentencePiece's number of the kind of model


def tokenizer_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """The keys that say the tokenizer of a folder or a GGUF file, with its chat templates. Tokens up to
    `vocab_size` that it has not are [PADn].

    ValueError for a kind that llama.cpp does not have, naming it.
    """
    if (gguf := gguf_file(path)) is not None:
        metadata = read_headers(gguf)[0].metadata
        found = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        return _padded(found or _none(), vocab_size)
    if (file := sentencepiece_file(path)) is not None:
        found = _sentencepiece(file)
    elif content := (files := tokenizer_files(path)).get("tokenizer.json"):
        found = _byte_level(path, json.loads(content), json.loads(files.get("tokenizer_config.json", b"{}")))
    else:
        return _none()
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None  # of one of these files
    found |= _around(path, tokenizer)
    for name, template in load_chat(path, tokenizer).templates.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return _padded(found, vocab_size)


def _around(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Any]]:
    """BOS and EOS, and whether they go around a prompt, which is said always: llama.cpp has defaults of its own."""
    eos = next(iter(tokenizer.eos_token_ids), None)
    for kind, own, around in (("bos", tokenizer.bos_token_id, tokenizer.prefix), ("eos", eos, tokenizer.suffix)):
        token = around[0] if own is None and around else own
        if around not in ((), (token,)):
            raise ValueError(
                f"{path} puts the tokens {around} around a prompt: a GGUF file can only say {kind}={token}"
            )
        if token is not None:
            yield f"tokenizer.ggml.{kind}_token_id", token
        yield f"tokenizer.ggml.add_{kind}_token", bool(around)


def _none() -> dict[str, Any]:
    return {"tokenizer.ggml.model": "no_vocab"}


def _padded(found: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    tokens = found.get("tokenizer.ggml.tokens", ())
    if len(tokens) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, expected at most the model's {vocab_size}")
    if missing := max(vocab_size - len(tokens), 0) if tokens else 0:
        padding = tuple(f"[PAD{i}]" for i in range(len(tokens), vocab_size))
        for key, more in (("tokens", padding), ("token_type", (_UNUSED,) * missing), ("scores", (-1e4,) * missing)):
            if (values := found.get(f"tokenizer.ggml.{key}")) is not None:
                found[f"tokenizer.ggml.{key}"] = (*values, *more)
    return found


def _config(path: Path) -> Mapping[str, Any]:
    file = path / "tokenizer_config.json"
    values = json.loads(file.read_bytes()) if file.is_file() else {}
    return values if isinstance(values, dict) else {}


def _sentencepiece(file: Path) -> dict[str, Any]:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(file.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            score = piece.get(2, b"\0\0\0\0")
            pieces.append((piece.get(1, b"").decode(), _float(score), piece.get(3, _NORMAL)))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    if (kind := trainer.get(3, 1)) != _BPE:
        raise ValueError(f"{file} is SentencePiece's model type {kind}, expected {_BPE} (BPE) for a GGUF file")
    if normalizer.get(2):
        raise ValueError(f"{file} maps characters before it splits: expected the normalizer 'identity' in a GGUF file")
    pieces += _added(file.with_name("tokenizer.json"), len(pieces))
    tokens, scores, types = zip(*pieces, strict=True)
    ids = {
        key: number
        for key, field, default in (("unknown", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("padding", 43, -1))
        if 0 <= (number := _signed(trainer.get(field, default))) < len(tokens)
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{key}_token_id": number for key, number in ids.items()},
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(4, 1)),
    }


def _added(file: Path, size: int) -> list[tuple[str, float, int]]:
    """Tokens that a `tokenizer.json` has from id `size` on, beyond those of the `tokenizer.model` beside it."""
    tokens = _added_tokens(json.loads(file.read_bytes()), file) if file.is_file() else ()
    found = {t["id"]: (t["content"], -1e4, _CONTROL if t["special"] else _USER_DEFINED) for t in tokens}
    last = max(found, default=-1)
    return [found.get(i, (f"[PAD{i}]", -1e4, _UNUSED)) for i in range(size, last + 1)]


def _added_tokens(values: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """Those of a `tokenizer.json`."""
    tokens = list(values.get("added_tokens", ()))
    for token in tokens:
        if found := [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]:
            raise ValueError(f"{file}: token {token['content']!r} has {', '.join(found)}, which a GGUF file cannot say")
    return tokens


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: integers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _float(data: bytes) -> float:
    return float(struct.unpack("<f", data)[0])


def _byte_level(path: Path, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """values: of a tokenizer.json. path: for messages."""
    model, decoder = values["model"], values.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or values.get("normalizer"):
        raise ValueError(
            f"the tokenizer of {path} is no byte-level BPE without a normalizer, expected one for a GGUF file"
        )
    pre = _pre_name(values.get("pre_tokenizer"), model.get("ignore_merges", False))
    if pre is None:
        cut = values.get("pre_tokenizer")
        raise ValueError(f"the tokenizer of {path} splits texts in a way for which llama.cpp has no name: {cut}")
    added = {token["id"]: token for token in _added_tokens(values, path)}
    by_id = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    size = 1 + max(by_id)
    types = [
        _UNUSED if i not in by_id else _NORMAL if i not in added else _CONTROL if added[i]["special"] else _USER_DEFINED
        for i in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {}
    for kind, name in (("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        if (number := next((i for i, text in by_id.items() if text == token), None)) is not None:
            special[name] = number
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tuple(by_id.get(i, f"[PAD{i}]") for i in range(size)),
        "tokenizer.ggml.token_type": tuple(types),
        "tokenizer.ggml.merges": tuple(merges),
        **{f"tokenizer.ggml.{kind}_token_id": number for kind, number in special.items()},
    }


def _pre_name(found: Any, ignore_merges: bool) -> str | None:
    """llama.cpp's name of a pre-tokenizer."""
    keys = {"model": "gpt2", "tokens": ("a",), "token_type": (_NORMAL,), "merges": ()}
    for name in _PRE:
        metadata = {f"tokenizer.ggml.{key}": value for key, value in (*keys.items(), ("pre", name))}
        values = json.loads(gguf_tokenizer_files(metadata, Path(name))["tokenizer.json"])
        if values["model"]["ignore_merges"] == ignore_merges and _plain(values["pre_tokenizer"]) == _plain(found):
            return name
    return None


def _plain(value: Any) -> Any:
    """A pre-tokenizer without what changes no token: a sequence of one, offsets."""
    if isinstance(value, dict):
        parts = value.get("pretokenizers")
        if value.get("type") == "Sequence" and isinstance(parts, list) and len(parts) == 1:
            return _plain(parts[0])
        plain = {key: _plain(v) for key, v in value.items() if key not in ("trim_offsets", "invert")}
        if plain.get("type") == "ByteLevel":
            plain.setdefault("use_regex", True)
            plain.setdefault("add_prefix_space", True)
        return plain
    return [_plain(v) for v in value] if isinstance(value, list) else value
