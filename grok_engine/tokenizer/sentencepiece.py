"""SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import SPACE, Surface, check_ids, check_text, require_file


class SentencePieceTokenizer:
    """A `tokenizer.model`, as the sentencepiece library reads it.

    Control pieces spelled out in a text (`[EOS]`) are text, user-defined ones (`<|separator|>`) their token.
    """

    replace_each_byte = True

    def __init__(self, path: str | Path) -> None:
        import sentencepiece  # lazily, as this import is slow

        require_file(path)
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        sp = self._sp
        self.vocab_size: int = sp.GetPieceSize()
        self.bos_token_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_token_ids: tuple[int, ...] = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        # How a leading space is decoded depends on the model's normalizer, which the library does not expose: try it.
        lone = sp.PieceToId(SPACE)
        spaced = (i for i in range(self.vocab_size) if sp.IdToPiece(i).startswith(SPACE))
        probe = lone if sp.IdToPiece(lone) == SPACE else next(spaced, None)
        self._drops_space = probe is not None and not sp.DecodeIds([probe]).startswith(" ")
        self._drops_spaces = probe is not None and sp.DecodeIds([probe, probe]) == ""

    def encode(self, text: str) -> list[int]:
        check_text(text)
        return list(self._sp.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size)
        return str(self._sp.DecodeIds([int(i) for i in ids])) if len(ids) else ""

    def surface(self, token_id: int, at_start: bool) -> Surface:
        check_ids((token_id,), self.vocab_size)
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
