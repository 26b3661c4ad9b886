"""A byte-level BPE as a `tokenizer.json`, for files that hold the same in other forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .hf import CONFIG

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def byte_level_files(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    added: Iterable[tuple[int, str, bool]],
    expression: str | None,
    ignore_merges: bool,
    named: Mapping[str, str],
    before: str | None = None,
    after: str | None = None,
) -> dict[str, bytes]:
    """A `tokenizer.json` and its `tokenizer_config.json`.

    vocab, merges: in the characters that byte-level BPE writes bytes with. added: id, text and whether it is special of
    the tokens that are no result of merging; they are in `vocab` too. expression: how a text is cut before merging;
    None is GPT-2's alone, "" the same after every digit is cut off. ignore_merges: a word that is a token is not
    merged. named: tokens by what they are for, such as bos. before, after: tokens that go around a text.
    """
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": special, **flags} for i, text, special in added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(expression)},
        "post_processor": _around(vocab, before, after),
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }
    config = {f"{kind}_token": token for kind, token in named.items()}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), CONFIG: json.dumps(config).encode()}


def _pre_tokenizers(expression: str | None) -> list[dict[str, Any]]:
    if expression is None:
        return [{**_BYTE_LEVEL, "use_regex": True}]
    if not expression:
        return [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}]
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTE_LEVEL, "use_regex": False}]


def _around(vocab: Mapping[str, int], before: str | None, after: str | None) -> dict[str, Any] | None:
    """The post-processor that puts these tokens around a text."""
    if before is None and after is None:
        return None
    tokens = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (before, after) if token}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first, last = ([{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in (before, after))
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": [*first, text, *last], "pair": pair, "special_tokens": tokens}
