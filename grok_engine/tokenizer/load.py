"""Which tokenizer a checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grok_engine.checkpoint.gguf.files import gguf_file, read_headers

from .base import Tokenizer
from .chat_files import chat_files
from .gguf import read_tokenizer
from .gguf import tokenizer_files as gguf_tokenizer_files
from .hf import HFTokenizer
from .sentencepiece import SentencePieceTokenizer

# By file, the first that a folder has.
KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": lambda path: SentencePieceTokenizer(path, spaces_parts=_is_legacy(path)),
    "tokenizer.json": HFTokenizer,
}
BESIDE = "tokenizer_config.json"


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder or GGUF file, or None where it has none. ValueError for one that cannot be
    read."""
    if (gguf := gguf_file(path)) is not None:
        return read_tokenizer(read_headers(gguf)[0].metadata, gguf)
    for name, kind in KINDS.items():
        if (file := Path(path) / name).is_file():
            return kind(file)
    return None


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """What a folder needs to have the same tokenizer and chat templates, by name: the files of a checkpoint's folder,
    or those that a GGUF file's metadata becomes. Raises as `load_tokenizer` and `load_chat` do."""
    templates = chat_files(Path(path), load_tokenizer(path))
    if (gguf := gguf_file(path)) is not None:
        return templates | gguf_tokenizer_files(read_headers(gguf)[0].metadata, gguf)
    return templates | {name: file.read_bytes() for name in (*KINDS, BESIDE) if (file := Path(path) / name).is_file()}


def _is_legacy(path: Path) -> bool:
    """transformers' word for a `tokenizer.model` whose space before a text goes behind every control token too."""
    beside = path.with_name(BESIDE)
    return beside.is_file() and json.loads(beside.read_bytes()).get("legacy") is True
