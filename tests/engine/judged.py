"""A random Llama with a tokenizer, and its perplexity as transformers' own guide computes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.hf_models import build

TEXT = "It was the best of times, it was the worst of times — “Où sont les neiges?” 42\n" * 3


def write_llama(folder: Path, **config: Any) -> Path:
    """`TEXT`'s bytes are its tokens, but for a few pairs that the tokenizer merges; 256 is BOS, 257 is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [("e", "s"), ("t", "h"), ("Ġ", "o"), ("Ġo", "f")]
    vocab = {token: i for i, token in enumerate(sorted(letters))} | {"<s>": 256, "</s>": 257}
    vocab |= {a + b: 258 + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    build("Llama", vocab_size=262, bos_token_id=256, eos_token_id=257, **config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@torch.inference_mode()
def perplexity(model: Any, ids: list[int], context: int, stride: int) -> float:
    """By transformers' loss of each window, whose mean is over the tokens scored in it."""
    nats, scored, before = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        window = torch.tensor([ids[start:stop]])
        labels = window.clone()
        labels[:, : before - start] = -100  # scored by an earlier window
        count = int((labels[:, 1:] != -100).sum())  # the loss shifts them
        if count:
            nats += float(model(window, labels=labels).loss) * count
            scored += count
        before = stop
        if stop == len(ids):
            break
    return math.exp(nats / scored)
