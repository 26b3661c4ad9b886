"""Tokenizers rebuilt from GGUF metadata: the same ids and texts as the tokenizers that they were made from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from grok_engine.tokenizer.base import IncrementalDetokenizer, Tokenizer
from grok_engine.tokenizer.gguf import _PRE, read_tokenizer, tokenizer_files
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tokenizer.load import load_tokenizer
from grok_engine.tokenizer.sentencepiece import SentencePieceTokenizer

HERE = Path("model.gguf")
TEXTS = [
    "The quick brown fox, and   then 1234567 it's JUMPING.",
    " Ein süßer Käse; où est le garçon?\n\n\ttabs  ",
    "東京 😀 é e\u0301 \u200b \ud7ff",
    "def add(a, b):\r\n    return a + b  # 3.14",
    "<s> [INST] hi </s>",
    "",
]


def metadata(**keys: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


# llama: SentencePiece


def sentencepiece_metadata(model: bytes, **changes: Any) -> dict[str, Any]:
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.GetPieceSize())
    types = [
        2 if sp.IsUnknown(i) else 3 if sp.IsControl(i) else 6 if sp.IsByte(i) else 5 if sp.IsUnused(i) else
        4 if sp.GetScore(i) == 0 else 1 for i in ids
    ]  # fmt: skip
    return metadata(
        model="llama", tokens=tuple(map(sp.IdToPiece, ids)), scores=tuple(map(sp.GetScore, ids)),
        token_type=tuple(types), **{"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id(), **changes},
    )  # fmt: skip


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:4] * 3), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", user_defined_symbols=["<|sep|>", "  "],
        control_symbols=["[INST]"], minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("squeeze", [True, False])
def test_a_sentencepiece_model_comes_back(prefix: bool, squeeze: bool) -> None:
    model = trained(add_dummy_prefix=prefix, remove_extra_whitespaces=squeeze)
    original = SentencePieceTokenizer(HERE, model)
    keys = sentencepiece_metadata(model, add_space_prefix=prefix, remove_extra_whitespaces=squeeze)
    rebuilt = read_tokenizer(keys, HERE)
    assert isinstance(rebuilt, SentencePieceTokenizer)
    assert rebuilt.vocab_size == original.vocab_size
    assert (rebuilt.bos_token_id, rebuilt.eos_token_ids) == (original.bos_token_id, original.eos_token_ids) == (1, (2,))
    for text in [*TEXTS, "a<|sep|>b", "東<|sep|>  x"]:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == original.decode(ids) == streamed(rebuilt, ids)
    assert (rebuilt.encode("  x") == rebuilt.encode("x")) is squeeze


def test_beginning_and_end_under_other_names() -> None:
    model = trained(bos_piece="<|begin|>", eos_piece="<|end|>", unk_piece="<?>")
    rebuilt = read_tokenizer(sentencepiece_metadata(model, unknown_token_id=0), HERE)
    assert rebuilt is not None
    assert (rebuilt.bos_token_id, rebuilt.eos_token_ids) == (1, (2,))
    assert rebuilt.decode([1, 5, 2]) == SentencePieceTokenizer(HERE, model).decode([5])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = IncrementalDetokenizer(tokenizer)
    return "".join(map(stream.push, ids)) + stream.finish()


# gpt2: byte-level BPE

SPECIALS = ["<|end|>", "<|start|>"]


def byte_level(pre: Any) -> tokenizers.Tokenizer:
    tk = tokenizers.Tokenizer(models.BPE())
    tk.pre_tokenizer, tk.decoder = pre, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 340, "special_tokens": SPECIALS, "initial_alphabet": alphabet, "show_progress": False}
    tk.train_from_iterator([*TEXTS[:4], "  1  22 333  4444 " * 3] * 3, trainers.BpeTrainer(**options))
    tk.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tk


def byte_level_metadata(tk: tokenizers.Tokenizer, pre: str | None, **changes: Any) -> dict[str, Any]:
    model = json.loads(tk.to_str())["model"]
    size = tk.get_vocab_size(with_added_tokens=True)
    tokens = tuple(str(tk.id_to_token(i)) for i in range(size))
    types = tuple(3 if token in SPECIALS else 4 if token == "<tool>" else 1 for token in tokens)
    merges = tuple(" ".join(merge) for merge in model["merges"])
    keys = {"tokens": tokens, "token_type": types, "merges": merges, "bos_token_id": 1, "eos_token_id": 0}
    return metadata(model="gpt2", pre=pre, **{**keys, **changes})


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(("name", "pre"), [("gpt-2", GPT2), ("smollm", SMOLLM)])
def test_a_byte_level_tokenizer_comes_back(name: str, pre: Any) -> None:
    original = byte_level(pre)
    original.encode_special_tokens = True
    rebuilt = read_tokenizer(byte_level_metadata(original, name), HERE)
    assert isinstance(rebuilt, HFTokenizer)
    assert (rebuilt.vocab_size, rebuilt.bos_token_id, rebuilt.eos_token_ids) == (341, 1, (0,))
    for text in [*TEXTS, "x<tool>y", "  7", "a  123 45"]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == text == streamed(rebuilt, ids)


def test_only_templates_may_write_control_tokens() -> None:
    models = [byte_level_metadata(byte_level(GPT2), "gpt-2"), sentencepiece_metadata(trained(add_dummy_prefix=False))]
    for keys, (end, start) in zip(models, (SPECIALS, ("</s>", "<s>")), strict=True):
        tokenizer = read_tokenizer(keys, HERE)
        assert tokenizer is not None
        stop, begin, text = tokenizer.eos_token_ids[0], tokenizer.bos_token_id, f"{start}hello{end}{end}"
        hello = tokenizer.encode("hello")
        assert tokenizer.encode(text, special=True) == [begin, *hello, stop, stop]
        ids = tokenizer.encode(text)
        assert not {stop, begin} & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode("hello", special=True) == hello


# Where each expression cuts: spaces are "Ġ", tabs "ĉ", line feeds "Ċ", carriage returns "č".
CUTS = {
    "gpt-2": ("It's  1234 x\t\ny", "It 's Ġ Ġ1234 Ġx ĉ Ċ y"),
    "smollm": ("It's  1234 x\t\ny", "It 's ĠĠ 1 2 3 4 Ġx ĉ Ċ y"),
    "llama-bpe": ("It'S  1234 x.\r\n\ny a/b", "It 'S Ġ Ġ 123 4 Ġx .čĊĊ y Ġa /b"),
    "grok-2": ("It'S  1234 x.\r\n\ny a/b", "It 'S Ġ Ġ 1 2 3 4 Ġx .čĊĊ y Ġa /b"),
    "tekken": ("it'S  1234 helloWorld ABC./\ny", "it 'S Ġ Ġ 1 2 3 4 Ġhello World ĠABC ./Ċ y"),
}


@pytest.mark.parametrize("name", CUTS)
def test_where_a_text_is_cut_before_merging(name: str) -> None:
    text, cut = CUTS[name]
    content = tokenizer_files(byte_level_metadata(byte_level(GPT2), name), HERE)["tokenizer.json"]
    pre = tokenizers.Tokenizer.from_buffer(content).pre_tokenizer
    assert [piece for piece, _ in pre.pre_tokenize_str(text)] == cut.split(" ")


def test_words_that_are_tokens_are_not_merged_where_the_model_says_so() -> None:
    tk = byte_level(GPT2)
    tokens = ("a", "b", "c", "ab", "bc", "abc")
    keys: dict[str, Any] = {"tokens": tokens, "token_type": (1,) * 6, "merges": ("b c", "a b")}
    keys |= {"bos_token_id": None, "eos_token_id": None}
    found = {pre: read_tokenizer(byte_level_metadata(tk, pre, **keys), HERE) for pre in ("llama-bpe", "gpt-2")}
    assert {pre: tokenizer.encode("abc") for pre, tokenizer in found.items() if tokenizer} == {
        "llama-bpe": [5],
        "gpt-2": [0, 4],
    }


@pytest.mark.parametrize(
    ("kind", "flags", "around"),
    [
        ("llama", {}, ("<s>", "")),  # llama.cpp's defaults, by kind and pre-tokenizer
        ("llama", {"add_bos_token": False}, ("", "")),
        ("llama", {"add_bos_token": True, "add_eos_token": True}, ("<s>", "</s>")),
        ("gpt-2", {}, ("", "")),
        ("smollm", {}, ("", "")),
        ("smollm", {"add_bos_token": True}, ("<|start|>", "")),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ("<|start|>", "<|end|>")),
        ("llama-bpe", {}, ("<|start|>", "")),
        ("tekken", {}, ("<|start|>", "")),
        ("llama-bpe", {"add_bos_token": False, "add_eos_token": True}, ("", "<|end|>")),
        ("llama-bpe", {"bos_token_id": None}, ("", "")),
    ],
)
def test_what_goes_around_a_prompt(tmp_path: Path, kind: str, flags: dict[str, Any], around: tuple[str, str]) -> None:
    if kind == "llama":
        keys = sentencepiece_metadata(trained(), **flags)
    else:
        keys = byte_level_metadata(byte_level(GPT2), kind, **flags)
    for name, content in tokenizer_files(keys, HERE).items():
        (tmp_path / name).write_bytes(content)
    tokens = keys["tokenizer.ggml.tokens"]
    for tokenizer in (read_tokenizer(keys, HERE), load_tokenizer(tmp_path)):  # the second as converted
        assert tokenizer is not None
        assert tuple("".join(tokens[i] for i in ids) for ids in (tokenizer.prefix, tokenizer.suffix)) == around


# Refusals


def test_no_tokenizer() -> None:
    for keys in ({}, metadata(model="no_vocab"), metadata(model="none")):
        assert read_tokenizer(keys, HERE) is None
        assert tokenizer_files(keys, HERE) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model is 'bert', expected 'llama', 'gpt2' or 'no_vocab'"),
        ({"pre": "default"}, "pre is 'default', expected one of gpt-2, smollm"),
        ({"pre": None}, "pre is None, expected one of gpt-2, smollm"),
        ({"tokens": None}, "tokens is None, expected a list of strings"),
        ({"tokens": (1, 2)}, r"tokens is \(1, 2\), expected a list of strings"),
        ({"tokens": ("a", "a")}, "tokens has 1 duplicates, expected none"),
        ({"token_type": (1,)}, r"token_type is \(1,\), expected 341 of int, one for each token"),
        ({"merges": ("a b c",)}, "expected pairs of tokens, found 'a b c'"),
        ({"merges": ("q  q",)}, "expected pairs of tokens, found 'q  q'"),
        ({"merges": ("nothing here",)}, "is not a tokenizer.json"),
        ({"eos_token_id": 341}, "eos_token_id is 341, expected 0 to 340"),
        ({"bos_token_id": "1"}, "bos_token_id is '1', expected 0 to 340"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is True, expected false, since bos_token_id"),
        ({"add_eos_token": 1}, "add_eos_token is 1, expected a boolean"),
    ],
)
def test_keys_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    keys = byte_level_metadata(byte_level(GPT2), "gpt-2") | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        read_tokenizer(keys, HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores is None, expected"),
        ({"scores": (1,) * 330}, "expected .* of float"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1, expected a boolean"),
        ({"token_type": (1,) * 330}, "."),
    ],
)
def test_sentencepiece_keys_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    keys = sentencepiece_metadata(trained()) | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        read_tokenizer(keys, HERE)


def test_every_expression_compiles() -> None:
    tk = byte_level(GPT2)
    for pre in _PRE:
        assert read_tokenizer(byte_level_metadata(tk, pre), HERE) is not None
