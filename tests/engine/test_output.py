from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_engine.runtime.text import FinishReason, SequenceText, StopStrings, begins_text, token_text
from grok_engine.sampling.automaton import Automaton
from grok_engine.sampling.params import SamplingParams
from grok_engine.sampling.rules import SamplingRules
from grok_engine.tokenizer.base import PaddedTokenizer, Tokenizer
from grok_engine.tokenizer.sentencepiece import SentencePieceTokenizer

ALPHABET = ["a", "b", "ab", " ", "é", "猫"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abba ab aab baba", "a b ab ba", "aaa bbb"]), model_writer=model, model_type="bpe",
        vocab_size=285, byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def automaton(stops: Sequence[str]) -> Automaton[str] | None:
    return SamplingRules(SamplingParams(stop=stops), 1).stops


def cut(text: str, stops: Sequence[str], *, include: bool = False) -> tuple[str, str | None]:
    """By definition: cut at the earliest end of any match, by the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def pieces() -> st.SearchStrategy[list[int]]:
    # bytes of é and 猫 (3 + byte), alone and together, and pieces of a and b
    byte = st.sampled_from([3 + b for b in "é猫a".encode()])
    return st.lists(byte | st.integers(259, 275) | st.sampled_from([1, 2, 0]), max_size=25)


stop_sets = st.lists(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4).map("".join), max_size=4)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.lists(st.sampled_from(ALPHABET), max_size=3).map("".join), max_size=12),
    stops=stop_sets,
    include=st.booleans(),
)
def test_a_text_in_pieces_is_cut_as_the_whole(parts: list[str], stops: list[str], include: bool) -> None:
    stream = StopStrings(automaton(stops), include=include)
    expected, matched = cut("".join(parts), stops, include=include)
    out, seen = "", ""
    for part in parts:
        out += stream.push(part)
        seen += part
        if not include:
            # only text that begins a stop string is held back
            held = cut(seen, stops)[0][len(out) :]
            assert expected.startswith(out)
            assert not held or any(s.startswith(held) for s in stops)
        elif stream.matched is None:
            assert out == seen
    assert out + stream.finish() == expected
    assert stream.matched == matched


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["abcd", "bc"], "xabcd", "xa"),
        (["bc", "abc"], "xabcd", "x"),
        (["ab"], "xaab", "xa"),
        (["aab"], "aaab", "a"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["🙂🙃"], "a🙂🙂🙃b", "a🙂"),
        (["z"], "abc", "abc"),
    ],
)
def test_cut(stops: list[str], text: str, expected: str) -> None:
    for size in range(1, len(text) + 1):
        stream = StopStrings(automaton(stops))
        out = "".join(stream.push(text[i : i + size]) for i in range(0, len(text), size)) + stream.finish()
        assert out == expected


class Output(SequenceText):
    """A text whose tokens are appended here, as an engine appends them, and whose new text is returned."""

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int] = (), **options: Any
    ) -> None:
        self.token_ids: list[int] = []
        rules = SamplingRules(params, 300, eos_token_ids=eos_token_ids)
        super().__init__(rules, tokenizer, self.token_ids, **options)

    def take(self, token: int) -> tuple[str, FinishReason | None]:
        shown = len(self.text)
        self.token_ids.append(token)
        self.push(token)
        return self.text[shown:], self.finish_reason

    def end(self) -> str:
        shown = len(self.text)
        self.finish()
        return self.text[shown:]


def drain(output: Output, ids: Sequence[int]) -> list[str]:
    parts = []
    for token in ids:
        text, reason = output.take(token)
        parts.append(text)
        if reason is not None:
            return parts
    return [*parts, output.end()]


@pytest.mark.parametrize("include", [False, True])
def test_deltas_concatenate_to_the_cut_of_the_decoded_text(tokenizer: Tokenizer, include: bool) -> None:
    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(ids=pieces(), stops=stop_sets | st.just(["\ufffd"]) | st.just(["a\ufffd"]))
    def check(ids: list[int], stops: list[str]) -> None:
        params = SamplingParams(stop=stops, max_tokens=100, ignore_eos=True, include_stop_str_in_output=include)
        output = Output(params, tokenizer)
        expected, matched = cut(tokenizer.decode(ids), stops, include=include)
        assert "".join(drain(output, ids)) == expected == output.text
        assert output.stop_reason == matched
        assert output.finish_reason == ("stop" if matched else "abort")
        assert output.token_ids == ids[: len(output.token_ids)]
        if matched is None:
            assert output.token_ids == ids

    check()


def test_the_first_min_tokens_are_not_searched(tokenizer: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(ids=st.lists(st.integers(259, 275), min_size=1, max_size=15), least=st.integers(1, 15), stops=stop_sets)
    def check(ids: list[int], least: int, stops: list[str]) -> None:
        output = Output(SamplingParams(stop=stops, max_tokens=50, min_tokens=least), tokenizer)
        before = tokenizer.decode(ids[:least])
        after = tokenizer.decode(ids)[len(before) :]
        assert "".join(drain(output, ids)) == before + cut(after, stops)[0]
        assert output.finish_reason == "abort" or len(output.token_ids) > least

    check()


def test_end_and_stop_tokens_and_the_length(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    output = Output(SamplingParams(max_tokens=5), tokenizer, eos_token_ids=(2,))
    assert output.take(a) == ("a", None)
    assert output.take(2) == ("", "stop")
    assert (output.stop_reason, output.token_ids, output.end()) == (None, [a, 2], "")
    with pytest.raises(AssertionError, match="stop"):
        output.take(a)
    output = Output(SamplingParams(max_tokens=3, ignore_eos=True), tokenizer, eos_token_ids=(2,))
    assert [output.take(t)[1] for t in (a, 2, b)] == [None, None, "length"]
    for include in (False, True):
        params = SamplingParams(stop_token_ids=[b], include_stop_str_in_output=include, stop="a b", max_tokens=9)
        output = Output(params, tokenizer)
        assert output.take(a) == ("a" if include else "", None)  # held back: "a b" may come
        assert output.take(b) == (" b" if include else "a", "stop")
        assert output.stop_reason == ("a b" if include else b)
    output = Output(SamplingParams(max_tokens=9), tokenizer, max_tokens=1)
    assert output.take(3 + 0xE7) == ("\ufffd", "length")


def test_stop_strings_find_control_tokens_that_are_shown(tokenizer: Tokenizer) -> None:
    a = tokenizer.encode("a")[0]
    output = Output(SamplingParams(stop="a<s>", max_tokens=9), tokenizer, spelled={1: "<s>", 2: "</s>"})
    assert drain(output, [2, a, 1, a]) == ["</s>", " ", ""]
    assert (output.finish_reason, output.stop_reason) == ("stop", "a<s>")


def test_an_output_that_goes_on_in_a_prompt_keeps_its_space(tokenizer: Tokenizer) -> None:
    a = tokenizer.encode("a")[0]
    assert Output(SamplingParams(), tokenizer).take(a)[0] == "a"
    assert Output(SamplingParams(), tokenizer, context=[1]).take(a)[0] == "a"
    assert Output(SamplingParams(), tokenizer, context=[1, a, *[1] * 9]).take(a)[0] == " a"
    whole = [3 + byte for byte in "猫".encode()]
    assert Output(SamplingParams(), tokenizer, context=[a, *whole[:2]]).take(whole[2])[0] == "猫"


def test_the_text_of_one_token(tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a")
    byte = 3 + "猫".encode()[0]
    assert [token_text(tokenizer, t) for t in (a, byte, 3 + ord("a"), 2)] == [" a", "\ufffd", "a", ""]


def test_tokens_that_the_tokenizer_lacks_have_no_text(tokenizer: Tokenizer) -> None:
    """A model's vocabulary may be padded beyond its tokenizer's, and nothing keeps such a token from being sampled."""
    (a,), beyond = tokenizer.encode("a"), tokenizer.vocab_size
    tokenizer = PaddedTokenizer(tokenizer, beyond + 16)
    assert tokenizer.decode([a, beyond, beyond + 15]) == "a"
    with pytest.raises(ValueError, match=f"{beyond + 16} is not in"):
        tokenizer.decode([beyond + 16])
    output = Output(SamplingParams(), tokenizer, context=[beyond, beyond + 9])
    assert [output.take(t)[0] for t in (beyond, a, beyond + 1, a)] == ["", "a", "", " a"]
    assert begins_text(tokenizer, [beyond])
    assert token_text(tokenizer, beyond) == ""


def test_without_a_tokenizer() -> None:
    output = Output(SamplingParams(max_tokens=2), None, eos_token_ids=(2,))
    assert [output.take(t) for t in (5, 7)] == [("", None), ("", "length")]


def test_the_text_held_back_is_no_longer_than_a_stop_string() -> None:
    stream = StopStrings(automaton(["a" * 500 + "b", *(f"{'a' * n}c" for n in range(50))]))
    total = out = 0
    for i in range(5000):
        text = "aaaa" if i % 200 else "x"
        total, out = total + len(text), out + len(stream.push(text))
        assert total - out == min(4 * (i % 200), 500)
    assert out + len(stream.finish()) == total
