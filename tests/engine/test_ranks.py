"""Lists of ranks against the libraries that they are made for: tokenizer.tok.json and tiktoken, tekken.json and
mistral-common."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tiktoken
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from grok_engine.tokenizer.gguf import GROK2
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tokenizer.load import load_tokenizer, tokenizer_files

FILE = "tokenizer.tok.json"
SPECIAL = ("<|pad|>", "<|separator|>", "<|eos|>", "<|control1|>")
TEXTS = (
    "", " ", "a", "Hello  world, it's 2024!", "  two\n\n  lines \t", "naïve café — 日本語 🙂🙃", "I'LL 12345 x1y2",
    "aaaaaaaabababab", "<|eos|> spelled <|separator|>", "\r\n\r\n x", "the theatre of the absurd, the the the",
)  # fmt: skip


def content() -> dict[str, Any]:
    """Ranks as training gives them: pairs that are frequent in a text first."""
    text = Path(__file__).read_bytes() * 2 + "日本語 🙂🙃 naïve café the theatre 12 34".encode() * 9
    tokens = [bytes([b]) for b in range(256)]
    parts = [[bytes([b]) for b in word] for word in re.findall(rb" ?[a-z]+|[^a-z]+", text)]
    while len(tokens) < 600:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in parts:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(a + b)
        for word in parts:
            at = 0
            while at < len(word) - 1:
                if word[at] + word[at + 1] == a + b:
                    word[at : at + 2] = [a + b]
                at += 1
    special = [{"bytes": [*name.encode()], "token": i} for i, name in enumerate(SPECIAL)]
    regular = [{"bytes": [*token], "token": len(SPECIAL) + i} for i, token in enumerate(dict.fromkeys(tokens))]
    return {"regular_tokens": regular, "special_tokens": special, "word_split": "V1", "vocab_size": 640}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return content()


def test_the_ids_are_tiktoken_s(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(values))
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    regular, special = (values[key] for key in ("regular_tokens", "special_tokens"))
    theirs = tiktoken.Encoding(
        "test", pat_str=GROK2, mergeable_ranks={bytes(t["bytes"]): t["token"] for t in regular},
        special_tokens={bytes(t["bytes"]).decode(): t["token"] for t in special},
    )  # fmt: skip
    for text in (*TEXTS, Path(__file__).read_text(encoding="utf-8")):
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text)
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all")
        assert ours.decode(ids) == text
    assert ours.eos_token_ids == (2,)
    assert ours.bos_token_id is None
    assert (ours.prefix, ours.suffix) == ((), ())


def test_a_conversion_has_the_same_tokenizer(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(values))
    ours = load_tokenizer(tmp_path)
    files = tokenizer_files(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = HFTokenizer(tmp_path / "tokenizer.json")
    assert ours is not None
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"word_split": "V2"}, "word_split='V2' is not 'V1'"),
        ({"regular_tokens": None}, "regular_tokens|NoneType"),
        ({"special_tokens": [{"bytes": [256], "token": 0}]}, "256"),
        ({"special_tokens": [{"bytes": [60], "token": 9}]}, "ids"),
        ({"special_tokens": [{"bytes": [60], "token": True}]}, "id True"),
        ({"regular_tokens": [{"bytes": [60], "token": 9}] * 2}, "of id 9 has no"),
        ({"regular_tokens": [{"token": 9}]}, "'bytes' is missing"),
        ({"pat_str": 3}, "is 3, expected text"),
        ({"pat_str": "("}, FILE),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], said: str, values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(tmp_path)
    assert FILE in str(error.value)


def test_mistral_names_versions_of_tokenizer_model(tmp_path: Path) -> None:
    data = Path(mistral_common.__file__).parent / "data"
    for version, name in (("v2", "240216.model.v2"), ("v3", "240323.model.v3")):
        (tmp_path / f"tokenizer.model.{version}").write_bytes(
            (data / f"mistral_instruct_tokenizer_{name}").read_bytes()
        )
    (tmp_path / "params.json").write_text("{}")
    ours, theirs = load_tokenizer(tmp_path), SentencePieceTokenizer(tmp_path / "tokenizer.model.v3")
    assert ours is not None
    assert ours.prefix == (1,)
    assert ours.encode(TEXTS[3]) == theirs.encode(TEXTS[3], bos=False, eos=False)
    assert tokenizer_files(tmp_path)["tokenizer.model"] == (tmp_path / "tokenizer.model.v3").read_bytes()


@pytest.mark.parametrize("version", ["v3", "v7"])
def test_the_ids_are_mistral_common_s(version: str, tmp_path: Path) -> None:
    """A part of a real file's ranks: whole, it takes a second to read."""
    values = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240718.json").read_bytes())
    values["config"] |= {"version": version, "default_vocab_size": 9000, "num_vocab_tokens": 9000}
    values["vocab"] = values["vocab"][:9000]
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps(values))
    ours, theirs = load_tokenizer(tmp_path), Tekkenizer.from_file(file)
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)
    assert ours.encode("<s>[INST]a", special=True)[:2] == [1, theirs.get_special_token("[INST]")]
    assert (ours.prefix, ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == ((1,), 1, (2,), 9000)
    assert ("[SYSTEM_PROMPT]" in ours.control.ids) == (version == "v7")
    values["config"]["default_vocab_size"] = 10**6
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="1000000 do not fit 9000 tokens"):
        load_tokenizer(tmp_path)
