"""Gives a golden model a tokenizer, trained on random words, with as many pieces as the model has tokens."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import sentencepiece


def spell(source: Path, target: Path, vocab_size: int, letters: str, more: Sequence[str] = ()) -> Path:
    """Copy the model to `target` and give it a tokenizer of `letters`, trained on the lines of `more` too."""
    rng = random.Random(3)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4000)]
    lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)] + list(more)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("golden.npz"))
    (target / "tokenizer.model").write_bytes(trained.getvalue())
    return target
