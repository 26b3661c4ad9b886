"""Tokenizers that are lists of byte sequences with ranks, as tiktoken has them: `tokenizer.tok.json` of Grok-2's
release, and `tekken.json` of Mistral's own files. Each becomes a `tokenizer.json`.

They merge the neighbours whose bytes together have the lowest rank. So each way to cut a token into two tokens becomes
a merge, in the order of the ranks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .base import read_file
from .byte_level import byte_level_files
from .gguf import GROK2
from .hf import spelled

# The special tokens of a tekken.json that lists none, by id; the last three since version 7. Later ids have no name.
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def tok_json_files(path: Path) -> dict[str, bytes]:
    """A `tokenizer.tok.json` as a `tokenizer.json` and its `tokenizer_config.json`.

    It has `regular_tokens` and `special_tokens`, lists of {"bytes": [...], "token": id}, and how a text is cut: as
    `word_split` "V1", or an expression in `pat_str`. ValueError for any other content.
    """
    return _read(path, _tok_json)


def tekken_files(path: Path) -> dict[str, bytes]:
    """A `tekken.json`, likewise. BOS goes before a prompt.

    It has a `config` with `pattern`, `default_vocab_size` and `default_num_special_tokens`, a `vocab`, of which the
    first tokens count, as a list of {"rank": 0, "token_bytes": base64}, and perhaps `special_tokens`. The ids of the
    special tokens come first.
    """
    return _read(path, _tekken)


def _read(path: Path, parse: Callable[[Any], dict[str, bytes]]) -> dict[str, bytes]:
    try:
        return parse(json.loads(read_file(path)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a tokenizer of its kind: {what}") from None


def _tok_json(values: Any) -> dict[str, bytes]:
    regular, special = (
        dict(_distinct((bytes(entry["bytes"]), entry["token"]) for entry in values[key]))
        for key in ("regular_tokens", "special_tokens")
    )
    if values["word_split"] != "V1" and "pat_str" not in values:
        raise ValueError(f"word_split={values['word_split']!r:.80} is not 'V1'")
    names = {token.decode(): i for token, i in special.items()}
    return _files(regular, names, values.get("pat_str", GROK2), eos="<|eos|>", pad="<|pad|>")


def _tekken(values: Any) -> dict[str, bytes]:
    config, listed = values["config"], values.get("special_tokens")
    count, size = config["default_num_special_tokens"], config["default_vocab_size"]
    if not (type(count) is int and type(size) is int and 0 <= count <= size <= count + len(values["vocab"])):
        raise ValueError(
            f"default_num_special_tokens={count!r:.80} and default_vocab_size={size!r:.80} do not fit "
            f"{len(values['vocab'])} tokens"
        )
    special = {name: i for i, name in enumerate(_TEKKEN_SPECIAL[: 20 if config.get("version") == "v7" else 17])}
    if listed is not None:
        special = {entry["token_str"]: entry["rank"] for entry in listed}
    if len(special) > count or sorted(special.values()) != [*range(len(special))]:
        raise ValueError(
            f"special_tokens have the ids {sorted(special.values())!r:.80}, expected 0..{count - 1} at most"
        )
    special |= {f"<SPECIAL_{i}>": i for i in range(len(special), count)}
    tokens = ((base64.b64decode(e["token_bytes"], validate=True), e["rank"]) for e in values["vocab"][: size - count])
    regular = {token: count + rank for token, rank in _distinct(tokens)}
    return _files(regular, special, config["pattern"], bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


def _distinct(tokens: Iterator[tuple[bytes, Any]]) -> Iterator[tuple[bytes, int]]:
    seen = set()
    for token, token_id in tokens:
        if not token or type(token_id) is not int or token_id < 0 or token in seen:
            raise ValueError(f"the token {token!r:.80} of id {token_id!r:.80} has no bytes or no id of its own")
        seen.add(token)
        yield token, token_id


def _files(regular: Mapping[bytes, int], special: dict[str, int], expression: Any, **named: str) -> dict[str, bytes]:
    """named: how BOS, EOS and others are spelled; those that `special` lacks are none. BOS goes before a text."""
    if not isinstance(expression, str):
        raise ValueError(f"the expression that cuts a text is {expression!r:.80}, expected text")
    ids = {*regular.values(), *special.values()}
    if len(ids) != len(regular) + len(special):
        raise ValueError(f"{len(regular) + len(special)} tokens have {len(ids)} ids")
    text = {token: spelled(token) for token in regular}
    merges = [
        [text[token[:at]], text[token[at:]]]
        for token in sorted(regular, key=regular.__getitem__)
        for at in range(1, len(token))
        if token[:at] in regular and token[at:] in regular
    ]
    named = {kind: token for kind, token in named.items() if token in special}
    return byte_level_files(
        {text[token]: i for token, i in regular.items()} | special, merges,
        added=((i, token, True) for token, i in sorted(special.items(), key=lambda item: item[1])),
        expression=expression, ignore_merges=True, named=named, before=named.get("bos"),
    )  # fmt: skip
