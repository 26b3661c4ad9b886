"""Which tokenizer a folder has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .base import Tokenizer
from .hf import HFTokenizer
from .sentencepiece import SentencePieceTokenizer

# By file, the first that a folder has.
KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": SentencePieceTokenizer,
    "tokenizer.json": HFTokenizer,
}


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None where it has none. ValueError for a file that cannot be read."""
    for name, kind in KINDS.items():
        if (file := Path(folder) / name).is_file():
            return kind(file)
    return None
