"""Plain text in, training windows and held-out blocks out: what train_tiny.py and evaluate.py share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

from grok_engine.batch import Batch
from grok_engine.models.decoder import Decoder
from grok_engine.runtime.pages import allocate_pages

BLOCK = 8192  # characters
HELD_OUT_EVERY = 20  # one block in 20 is held out, spread over each file


def split(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Training text and held-out text, as runs of whole blocks. Block 19 of every 20 of each file is held out."""
    train: list[str] = []
    held_out: list[str] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        run: list[str] = []
        for i, start in enumerate(range(0, len(text), BLOCK)):
            block = text[start : start + BLOCK]
            if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                held_out.append(block)
                train.append("".join(run))
                run = []
            else:
                run.append(block)
        if run:
            train.append("".join(run))
    if not held_out:
        raise ValueError(f"no file has {HELD_OUT_EVERY * BLOCK} characters: nothing would be held out")
    return train, held_out


def train_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> Path:
    """A SentencePiece BPE model with Grok-1's settings and special tokens, trained on `texts`."""
    lines = [line for text in texts for line in text.split("\n") if line]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 16,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[BOS]", eos_piece="[EOS]", unk_piece="[UNK]", unk_surface="[UNK]",
        user_defined_symbols=["\n", "\n\n", "\n\n\n", "\t"],
        num_threads=2,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def encode(tokenizer: spm.SentencePieceProcessor, texts: Sequence[str], dropout: float = 0.0) -> Tensor:
    """All of `texts` as one row of token ids. `dropout` leaves out merges at random (BPE-dropout, Provilkov 2020)."""
    options = {"enable_sampling": True, "alpha": dropout} if dropout else {}
    ids = [np.asarray(tokenizer.encode(part, **options), np.int64) for text in texts for part in _pieces(text)]
    return torch.from_numpy(np.concatenate(ids))


def _pieces(text: str) -> Iterator[str]:
    return (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def dense_batch(tokens_BT: Tensor) -> Batch:
    """B sequences of one length, each in a page of its own."""
    b, t = tokens_BT.shape
    steps = torch.arange(b, dtype=torch.int32)
    return Batch(
        tokens_T=tokens_BT.flatten().int(),
        positions_T=torch.arange(t, dtype=torch.int32).repeat(b),
        slots_T=torch.arange(b * t, dtype=torch.int32),
        block_table_BN=steps[:, None],
        query_start=torch.arange(b + 1, dtype=torch.int32) * t,
        seq_lens_B=torch.full((b,), t, dtype=torch.int32),
        max_query_len=t,
    )


def logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """logits (B·T, V) of B sequences of one length."""
    b, t = tokens_BT.shape
    pages = allocate_pages(model.config, b, t, model.dtype, tokens_BT.device)
    return model.logits(model(dense_batch(tokens_BT), pages))


@torch.inference_mode()
def bits_per_byte(
    model: Decoder, tokenizer: spm.SentencePieceProcessor, texts: Sequence[str], context: int, rows: int = 8
) -> float:
    """Mean negative log2 probability of a byte of `texts`, each read alone after one newline.

    Windows of `context` tokens overlap by half, and each token is scored in the first window that reaches it, so all
    but a text's first have at least context / 2 tokens before them.
    """
    windows: list[tuple[list[int], int]] = []
    start = tokenizer.piece_to_id("\n")
    for text in texts:
        ids = [start, *tokenizer.encode(text)]
        scored = 1
        while scored < len(ids):
            end = min(len(ids), context + 1 if scored == 1 else scored + context // 2)
            first = max(0, end - context - 1)
            windows.append((ids[first:end], scored - first))
            scored = end
    windows.sort(key=lambda w: len(w[0]))
    total = 0.0
    for i in range(0, len(windows), rows):
        group = windows[i : i + rows]
        width = max(len(ids) for ids, _ in group)
        padded = torch.zeros((len(group), width), dtype=torch.int64)
        mask = torch.zeros((len(group), width), dtype=torch.bool)
        for row, (ids, first_scored) in enumerate(group):
            padded[row, : len(ids)] = torch.tensor(ids)
            mask[row, first_scored : len(ids)] = True
        loss = torch.nn.functional.cross_entropy(
            logits(model, padded[:, :-1].contiguous()), padded[:, 1:].flatten(), reduction="none"
        )
        total += float(loss.double()[mask[:, 1:].flatten()].sum())
    return total / math.log(2) / sum(len(text.encode()) for text in texts)
