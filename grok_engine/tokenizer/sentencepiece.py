"""SentencePiece tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from .base import SPACE, ControlTokens, Surface, check_ids, check_text, read_file


class SentencePieceTokenizer:
    """A `tokenizer.model`, as the sentencepiece library reads it.

    User-defined pieces spelled out in a text (`<|separator|>`) are their token, control pieces (`[EOS]`) only if asked.
    model: the bytes of a model that is no file; `path` is then for messages. add_bos, add_eos: whether BOS goes before
    and EOS after a prompt of text, which the file does not say, nor spaces_parts (see `Tokenizer`).
    """

    replace_each_byte = True

    def __init__(
        self, path: str | Path, model: bytes | None = None, *,
        add_bos: bool = False, add_eos: bool = False, spaces_parts: bool = False,
    ) -> None:  # fmt: skip
        import sentencepiece  # lazily, as this import is slow

        model = read_file(Path(path)) if model is None else model
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            if not (model and self._sp.LoadFromSerializedProto(model)):
                raise RuntimeError("it is empty")
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.spaces_parts = spaces_parts
        sp = self._sp
        self.vocab_size: int = sp.GetPieceSize()
        self.bos_token_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_token_ids: tuple[int, ...] = (sp.eos_id(),) if sp.eos_id() >= 0 else ()
        bos = self.bos_token_id
        self.prefix: tuple[int, ...] = (bos,) if add_bos and bos is not None else ()
        self.suffix: tuple[int, ...] = self.eos_token_ids if add_eos else ()
        # How a leading space is decoded depends on the model's normalizer, which the library does not expose: try it.
        lone = sp.PieceToId(SPACE)
        spaced = (i for i in range(self.vocab_size) if sp.IdToPiece(i).startswith(SPACE))
        probe = lone if sp.IdToPiece(lone) == SPACE else next(spaced, None)
        self._drops_space = probe is not None and not sp.DecodeIds([probe]).startswith(" ")
        self._drops_spaces = probe is not None and sp.DecodeIds([probe, probe]) == ""

    @cached_property
    def user_defined(self) -> dict[str, int]:
        """Found by their score, 0, which only the first merge has besides."""
        sp = self._sp
        others = [i for i in range(self.vocab_size) if sp.GetScore(i) == 0 and len(sp.IdToPiece(i)) > 2]
        return {sp.IdToPiece(i): i for i in others if not (sp.IsControl(i) or sp.IsUnknown(i) or sp.IsByte(i))}

    @cached_property
    def control(self) -> ControlTokens:
        sp = self._sp
        return ControlTokens({sp.IdToPiece(i): i for i in range(self.vocab_size) if sp.IsControl(i)})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        check_text(text)
        return self.control.encode(text, self._sp.EncodeAsIds) if special else list(self._sp.EncodeAsIds(text))

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
