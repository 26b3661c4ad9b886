"""The tokenizer of Grok-2's release, `tokenizer.tok.json`: byte sequences with ranks, as tiktoken has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import read_file
from .gguf import GROK2, pre_tokenizers
from .hf import CONFIG, spelled

EOS, PAD = "<|eos|>", "<|pad|>"


def tok_json_files(path: Path) -> dict[str, bytes]:
    """The same tokenizer as a `tokenizer.json` and its `tokenizer_config.json`.

    The file has `regular_tokens` and `special_tokens`, lists of {"bytes": [...], "token": id}, and `word_split`, of
    which "V1" is known, or its expression as `pat_str`. It takes the pair of neighbours whose bytes together have the
    lowest id, so every way to cut a token into two tokens becomes a merge, in the order of the ids. ValueError for any
    other content.
    """
    try:
        values = json.loads(read_file(path))
        regular, special = (dict(_tokens(values[key])) for key in ("regular_tokens", "special_tokens"))
        names = {token.decode(): i for token, i in special.items()}
        if values["word_split"] != "V1" and "pat_str" not in values:
            raise ValueError(f"word_split={values['word_split']!r:.80} is not 'V1'")
        expression = values.get("pat_str", GROK2)
        if not isinstance(expression, str):
            raise ValueError(f"pat_str={expression!r:.80} is not text")
        if (count := len(set(regular.values()) | set(names.values()))) != len(regular) + len(names):
            raise ValueError(f"{len(regular) + len(names)} tokens have {count} ids")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a tokenizer of Grok-2's kind: {what}") from None
    text = {token: spelled(token) for token in regular}
    merges = [
        [text[token[:at]], text[token[at:]]]
        for token in sorted(regular, key=regular.__getitem__)
        for at in range(1, len(token))
        if token[:at] in regular and token[at:] in regular
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in sorted(names.items(), key=lambda x: x[1])],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(expression, byte_level)},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE", "vocab": {text[token]: i for token, i in regular.items()} | names, "merges": merges,
            "ignore_merges": True,
        },
    }  # fmt: skip
    config = {key: token for key, token in (("eos_token", EOS), ("pad_token", PAD)) if token in names}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), CONFIG: json.dumps(config).encode()}


def _tokens(entries: Any) -> Iterator[tuple[bytes, int]]:
    seen = set()
    for entry in entries:
        token, token_id = bytes(entry["bytes"]), entry["token"]
        if not token or type(token_id) is not int or token_id < 0 or token in seen:
            raise ValueError(f"{entry!r:.80} is not a token with bytes and an id of its own")
        seen.add(token)
        yield token, token_id
