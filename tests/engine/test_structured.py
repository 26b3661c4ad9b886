from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from grok_engine.runtime.text import SequenceText, begins_text
from grok_engine.sampling.grammar_limits import GrammarLimits
from grok_engine.sampling.params import SamplingParams, StructuredOutput
from grok_engine.sampling.rules import SamplingRules
from grok_engine.sampling.sampler import sample
from grok_engine.sampling.state import SamplingState
from grok_engine.sampling.structured import StructuredCompiler
from grok_engine.tokenizer.base import Tokenizer
from grok_engine.tokenizer.hf import HFTokenizer
from grok_engine.tokenizer.sentencepiece import SentencePieceTokenizer

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

SENTENCES = [
    'The quick brown fox {"name": "Käse", "age": 12, "tags": ["a", "b"]} jumps - over 1984-11-23',
    "Ein süßer Käse; (1 + 2) * 3 = 9, où est le café? true false null",
    "".join(map(chr, range(33, 127))),
]


def sentencepiece_model(path: Path, *, dummy: bool, fallback: bool = True) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=400 if fallback else 180,
        character_coverage=1.0, byte_fallback=fallback, hard_vocab_limit=False, normalization_rule_name="identity",
        minloglevel=2, remove_extra_whitespaces=False, add_dummy_prefix=dummy, user_defined_symbols=["  "],
        num_threads=1,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def byte_level(folder: Path) -> Path:
    tk = tokenizers.Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options: dict[str, Any] = {"special_tokens": ["<|bos|>", "<|eos|>", "<|end|>"], "initial_alphabet": alphabet}
    tk.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=320, show_progress=False, **options))
    tk.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>", "bos_token": "<|bos|>"}')
    return folder / "tokenizer.json"


LIMITS = GrammarLimits(max_bytes=65536, max_depth=100, max_rules=1000, seconds=60.0)  # a machine may be slow
KINDS = ["dummy", "no dummy", "no bytes", "byte level"]


class Model:
    """A tokenizer, a vocabulary larger than the tokenizer's, end tokens, and a compiler for them."""

    def __init__(self, tokenizer: Tokenizer, limits: GrammarLimits = LIMITS) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size + 13
        self.eos = (*tokenizer.eos_token_ids, tokenizer.vocab_size + 3)  # one that the tokenizer does not know
        self.compiler = StructuredCompiler(tokenizer, self.vocab_size, self.eos, limits)
        # made likelier, since random text would end late
        self.closing = [
            i for i in range(tokenizer.vocab_size) if tokenizer.surface(i, False).text.strip() in ('"', "}", "]", ")")
        ] + [i for i in range(tokenizer.vocab_size) if tokenizer.surface(i, False).data in (b'"', b"}", b"]", b")")]


@pytest.fixture(scope="module")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "dummy": Model(SentencePieceTokenizer(sentencepiece_model(folder / "a.model", dummy=True))),
        "no dummy": Model(SentencePieceTokenizer(sentencepiece_model(folder / "b.model", dummy=False))),
        "no bytes": Model(SentencePieceTokenizer(sentencepiece_model(folder / "c.model", dummy=True, fallback=False))),
        "byte level": Model(HFTokenizer(byte_level(folder))),
    }


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, all_models: dict[str, Model]) -> Model:
    return all_models[request.param]


def generate(
    model: Model, structured: StructuredOutput, seed: int, *, context: list[int] | None = None, close: float = 6.0
) -> tuple[str, SequenceText]:
    """Text sampled from random logits, as an engine does it."""
    params = SamplingParams(structured=structured, max_tokens=400, temperature=1.5, seed=seed)
    context = context or []
    matcher = model.compiler.matcher(structured, at_start=begins_text(model.tokenizer, context))
    output_ids: list[int] = []
    rules = SamplingRules(params, model.vocab_size, eos_token_ids=model.eos)
    sampler = SamplingState(rules, output_ids, seed=seed, matcher=matcher)
    output = SequenceText(rules, model.tokenizer, output_ids, context=context)
    generator = torch.Generator().manual_seed(seed)
    while output.finish_reason is None:
        logits = torch.randn(1, model.vocab_size, generator=generator) * 2
        logits[:, [*model.eos, *model.closing]] += close
        complete = matcher.complete
        (found,) = sample([sampler], logits)
        assert found.error is None, found.error
        assert complete or found.token not in model.eos
        output_ids.append(found.token)
        output.push(found.token)
    return output.text, output


REGEXES = [
    r"[A-Z][a-z]+ [0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"(yes|no|maybe not)!?",
    r"[ä-ü猫é]{2,5} *x",
    r" two  spaces",
    r"a/b\n\"c\"",
    r"(🙂|🙃)+",
    r"",
    r"[^a-z ]{3}",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_text_matches_its_regex(model: Model, regex: str, all_models: dict[str, Model]) -> None:
    if model is all_models["no bytes"] and re.search(r"[猫🙂]|\\n|^ ", regex):
        pytest.skip("a vocabulary that cannot spell it")
    texts = set()
    for seed in range(12):
        text, output = generate(model, StructuredOutput(regex=regex), seed)
        assert re.fullmatch(regex, text), text
        assert output.finish_reason == "stop"
        assert output.output_ids[-1] in model.eos
        assert text == model.tokenizer.decode([t for t in output.output_ids if t < model.tokenizer.vocab_size])
        texts.add(text)
    assert len(texts) > 1 or regex in ("", " two  spaces", r"a/b\n\"c\"")


@pytest.mark.parametrize("kind", ["dummy", "byte level"])
def test_after_a_prompt_the_text_still_matches(all_models: dict[str, Model], kind: str) -> None:
    model = all_models[kind]
    prompt = model.tokenizer.encode("The fox")
    for seed in range(10):
        text, _ = generate(model, StructuredOutput(regex=r"[a-z]+( [a-z]+)?"), seed, context=prompt)
        assert re.fullmatch(r"[a-z]+( [a-z]+)?", text)
    bos = [model.tokenizer.bos_token_id or 0]
    assert begins_text(model.tokenizer, bos)
    assert begins_text(model.tokenizer, prompt) is False


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", None]}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "age", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


def check_schema(value: Any) -> None:
    assert set(value) <= {"name", "age", "tags", "inner"}
    assert {"name", "age", "inner"} <= set(value)
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 120
    assert all(tag in ("a", "bé", None) for tag in value.get("tags", []))
    assert len(value.get("tags", [])) <= 3
    assert list(value["inner"]) == ["x"]
    assert type(value["inner"]["x"]) is bool


def test_a_text_is_valid_against_its_schema(model: Model) -> None:
    names = set()
    for seed in range(12):
        schema = SCHEMA if seed % 2 else json.dumps(SCHEMA)
        text, output = generate(model, StructuredOutput(json_schema=schema), seed)
        assert output.finish_reason == "stop", text
        value = json.loads(text)
        check_schema(value)
        assert "\ufffd" not in text
        names.add(value["name"])
    assert len(names) > 3


def test_any_json(model: Model) -> None:
    for seed in range(6):
        text, output = generate(model, StructuredOutput(json_schema=True), seed, close=9.0)
        assert output.finish_reason == "stop", text
        json.loads(text)


GBNF = """
root ::= term (" " [-+] " " term)*
term ::= number | "(" root ")"
number ::= [0-9] | [1-9] [0-9]
"""
LARK = """
%llguidance {"allow_initial_skip": false}
start: term (" " SIGN " " term)*
term: NUMBER | "(" start ")"
SIGN: /[-+]/
NUMBER: /[0-9]|[1-9][0-9]/
"""


def balanced(text: str) -> bool:
    """Without a grammar: rewrite the innermost terms until one number is left."""
    before = None
    while before != text:
        before, text = text, re.sub(r"(?<![\d])([1-9]?\d)( [-+] [1-9]?\d)+(?=\)|$)", "1", text)
        text = re.sub(r"\(([1-9]?\d)\)", "1", text)
    return re.fullmatch(r"[1-9]?\d", text) is not None


@pytest.mark.parametrize("grammar", [GBNF, LARK], ids=["gbnf", "lark"])
def test_a_text_parses_by_its_grammar(model: Model, grammar: str) -> None:
    assert balanced("(1 + 23) - ((4) + 5)")
    assert not balanced("(1 + 2")
    texts = set()
    for seed in range(12):
        text, output = generate(model, StructuredOutput(grammar=grammar), seed)
        if output.finish_reason == "stop":
            assert balanced(text), text
            texts.add(text)
    assert len(texts) >= 8


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "no token"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": "[]"}, "not a schema"),
        ({"json_schema": {"type": "foo"}}, "foo"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": False}, "false"),
        ({"json_schema": {"enum": [object]}}, "is not JSON"),
        ({"grammar": "root ::= x"}, "'x' not found"),
        ({"grammar": ""}, "root"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": '%llguidance {"x": \nstart: "a"'}, "%llguidance"),
    ],
    ids=str,
)
def test_what_is_not_valid_is_refused_with_the_reason(
    all_models: dict[str, Model], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        all_models["dummy"].compiler.matcher(StructuredOutput(**options))
    assert f"structured.{next(iter(options))}" in str(caught.value)
    assert len(str(caught.value)) < 600


def bits(mask: Any, size: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask, bitorder="little")[:size]).tolist()


def test_the_mask_is_every_token_that_fits_and_no_other(model: Model) -> None:
    tokenizer, text = model.tokenizer, "abé c"
    matcher = model.compiler.matcher(StructuredOutput(regex=re.escape(text)))
    done, at_start = b"", True
    while done != text.encode():
        wanted = []
        for i in range(tokenizer.vocab_size):
            surface = tokenizer.surface(i, at_start)
            data = surface.data or surface.text.encode()
            if data and i not in model.eos and text.encode().startswith(done + data):
                wanted.append((i, data))
        assert bits(matcher.allowed(), model.vocab_size) == [i for i, _ in wanted]
        assert len(wanted) > 0
        token, data = wanted[-1]
        matcher.accept(token)
        done, at_start = done + data, False
    assert bits(matcher.allowed(), model.vocab_size) == sorted(model.eos)
    assert matcher.complete


def test_a_token_that_does_not_fit_is_an_error(all_models: dict[str, Model]) -> None:
    model = all_models["dummy"]
    a, b = (model.tokenizer.encode(c)[-1] for c in "ab")
    for before in ([], [a]):
        matcher = model.compiler.matcher(StructuredOutput(regex="a+"))
        for token in before:
            matcher.accept(token)
        with pytest.raises(ValueError, match="structured output"):
            matcher.accept(b)
    with pytest.raises(ValueError, match="end token 2 before"):
        model.compiler.matcher(StructuredOutput(regex="a+")).accept(2)
    other = model.compiler.matcher(StructuredOutput(regex="a+"))  # the template is not touched
    other.accept(a)
    assert other.complete


def test_sequences_of_one_request_do_not_share_a_state(all_models: dict[str, Model]) -> None:
    model = all_models["byte level"]
    structured = StructuredOutput(regex="a{3}")
    first, second = (model.compiler.matcher(structured) for _ in range(2))
    a = model.tokenizer.encode("a")[0]
    for _ in range(3):
        first.accept(a)
    assert first.complete
    assert not second.complete


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, all_models: dict[str, Model]) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[structured\]' in a checkout"):
        StructuredCompiler(all_models["dummy"].tokenizer, 400, (2,), LIMITS)


def test_an_end_token_is_needed(all_models: dict[str, Model]) -> None:
    with pytest.raises(ValueError, match="eos_token_ids"):
        StructuredCompiler(all_models["dummy"].tokenizer, 400, (), LIMITS)
