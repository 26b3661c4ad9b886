"""What a request builder accepts, refuses and shares, over a tokenizer of bytes and no model."""

from __future__ import annotations

import array
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine.config import EngineConfig, ModelConfig
from grok_engine.runtime.builder import RequestBuilder
from grok_engine.runtime.request import Request
from grok_engine.sampling.params import SamplingParams, StructuredOutput
from grok_engine.tokenizer.base import PaddedTokenizer, Surface

MODEL = ModelConfig(
    vocab_size=300, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, dense_d_ff=32, max_position=100,
)  # fmt: skip


class Bytes:
    """A token for each byte, and one for `hello`."""

    vocab_size, bos_token_id, eos_token_ids, replace_each_byte = 257, None, (2,), True
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.encoded = 0  # characters

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.encoded += len(text)
        return list(text.replace("hello", "\u0100").encode("latin-1", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def surface(self, token_id: int, at_start: bool) -> Surface:
        return Surface("hello", b"", True, False) if token_id == 256 else Surface("", bytes([token_id]), False, False)


def builder(tokenizer: Any = None, **options: Any) -> RequestBuilder:
    return RequestBuilder(
        EngineConfig(model=MODEL, **options), PaddedTokenizer(tokenizer or Bytes(), MODEL.vocab_size), 1000
    )


def build(prompt: Any = "word", *, priority: Any = 0, limits: Any = None, **params: Any) -> Request:
    return builder(**limits or {}).build("it", prompt, SamplingParams(**params), priority)


IDS = [5, 6, 255]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (IDS, None), (tuple(IDS), None), (np.array(IDS), None), (np.array(IDS, np.int16), None),
        (torch.tensor(IDS), None), (array.array("H", IDS), None), ([np.int64(5), 6, np.uint16(255)], None),
        ({"prompt_token_ids": IDS}, None), ({"prompt_token_ids": np.array(IDS)}, None),
        ({"prompt_token_ids": IDS, "prompt": None}, None), ({"prompt_token_ids": IDS, "prompt": "shown"}, "shown"),
    ],
)  # fmt: skip
def test_prompts_of_ids(prompt: Any, text: str | None) -> None:
    request = build(prompt)
    assert (request.prompt_ids, request.prompt) == (IDS, text)
    assert [type(t) for t in request.prompt_ids] == [int] * 3
    assert builder().encode(prompt) == IDS


def test_prompts_of_text() -> None:
    for prompt in ("abc", np.str_("abc"), {"prompt": "abc"}, {"prompt": "abc", "prompt_token_ids": None}):
        request = build(prompt)
        assert (request.prompt, request.prompt_ids) == ("abc", [97, 98, 99])
    assert build(range(3)).prompt_ids == [0, 1, 2]


def test_bos_and_eos_go_around_a_prompt_of_text_and_nothing_else() -> None:
    """Words that are banned, stop strings and ids get none."""
    tokenizer = Bytes()
    tokenizer.prefix, tokenizer.suffix = (1,), (2,)
    around = builder(tokenizer)

    def ids(prompt: Any) -> list[int]:
        return around.build("it", prompt, SamplingParams(), 0).prompt_ids

    assert around.encode("ab") == [97, 98] == ids([97, 98])
    assert around.encode("ab", add_special_tokens=True) == [1, 97, 98, 2] == ids("ab")
    assert around.encode([97], add_special_tokens=True) == [97]
    for add, expected in ((True, [1, 97, 2]), (np.False_, [97])):
        prompt = {"prompt": "a", "add_special_tokens": add}
        assert ids(prompt) == around.encode(prompt) == expected
    assert ids({"prompt": "a", "prompt_token_ids": [5], "add_special_tokens": True}) == [5]
    assert ids("") == [1, 2]
    request = around.build("it", "a", SamplingParams(bad_words=["b"], stop=["c"]), 0)
    assert request.answers[0].sampler.rules.banned.tolist() == [98]


WRONG_PROMPTS: list[tuple[Any, str]] = [
    (None, "prompt None is neither text nor a list of token ids"), (5, "prompt 5 is neither"), (1.5, "prompt 1.5"),
    (b"ab", "prompt b'ab' is neither text nor"), (bytearray(b"ab"), r"prompt bytearray"),
    (memoryview(b"ab"), "prompt <memory at .* is neither"),
    ({5, 6}, "prompt {5, 6}"), (np.int64(5), r"prompt np.int64\(5\) is neither"), (np.array(5), "prompt array"),
    ("", "prompt '' is empty"), ([], r"prompt \[\] is empty"), (np.zeros(0, int), "prompt array.* is empty"),
    ([1.0], r"token id 1\.0 is not in"), ([True], "token id True"), (["5"], "token id '5'"), ([None], "token id None"),
    ([[5]], r"token id \[5\]"), (np.zeros(2), r"token id 0\.0"), (np.array([True]), "token id True"),
    ([300], r"token id 300 is not in the vocabulary: expected an integer in 0\.\.299"), ([-1], "token id -1"),
    ([10**5000], "token id <int that has no repr>"), ([2.5, 5], r"token id 2\.5"),
    (range(10**12), "prompt has 1000000000000 tokens"),
    ([5] * 101, "prompt has 101 tokens, expected at most max_model_len=100"),
    ([5] * 100, "prompt has 100 tokens, all of max_model_len: no room for a new one"),
    ("a\ud800", r"prompt has '\\ud800' at 1, half of a surrogate pair"),
    ({}, r"prompt has the keys \[\]: expected one or both of prompt, prompt_token_ids"),
    ({"prompt": "a", "multi_modal_data": {}}, "prompt has the keys .*multi_modal_data"),
    ({"prompt": 5}, "prompt=5 is not text"),
    ({"prompt": None}, r"keys \[\]"), ({"prompt_token_ids": "abc"}, "prompt 'abc' is neither"),
    ({"prompt_token_ids": []}, "empty"), ({"add_special_tokens": True}, r"keys \[\]"),
    ({"prompt": "a", "add_special_tokens": 1}, "prompt has add_special_tokens=1: expected True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS)
def test_wrong_prompts(prompt: Any, message: str) -> None:
    for call in (build, builder().encode):
        if "no room" in message and call is not build:
            continue
        with pytest.raises(ValueError, match=message):
            call(prompt)


def test_a_text_that_cannot_fit_is_not_encoded() -> None:
    tokenizer = Bytes()
    limited = builder(tokenizer, max_model_len=20)
    with pytest.raises(ValueError, match="prompt has 101 bytes, more than max_model_len=20 tokens of at most 5 bytes"):
        limited.encode("é" * 50 + "a")
    assert tokenizer.encoded == 0
    with pytest.raises(ValueError, match="prompt has 100 tokens, expected at most max_model_len=20"):
        limited.encode("a" * 100)


def test_priorities() -> None:
    for value in (-3, np.int64(-3), np.int8(-3)):
        assert build(priority=value).answers[0].state.priority == -3
        assert type(build(priority=value).answers[0].state.priority) is int
    for value in (None, "1", 1.5, float("nan"), True, [1], 2**63, 10**5000, np.float32(1)):
        with pytest.raises(ValueError, match=r"priority=.* is not an integer of 64 bits"):
            build(priority=value)


def test_max_tokens_none_fills_the_context() -> None:
    for max_tokens, room in ((None, 96), (96, 96), (97, 96), (5, 5), (2**62, 96)):
        (answer,) = build(max_tokens=max_tokens).answers
        assert (answer.state.max_new_tokens, answer.text.max_tokens) == (room, room)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 129}, "n=129 is more than max_n=128"),
        ({"n": 2**63 - 1}, "n=9223372036854775807 is more"),
        ({"logprobs": 21}, "logprobs=21 asks for 21 tokens, more than max_logprobs=20"),
        ({"logprobs": -1}, "logprobs=-1 asks for 300 tokens"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 asks for 300 tokens"),
        ({"stop": "é" * 8193}, "stop and bad_words have 16386 bytes, more than max_stop_bytes=16384"),
        ({"stop": ["a" * 9000, "b"], "bad_words": ["c" * 7384]}, "have 16385 bytes"),
        ({"structured": StructuredOutput(regex="a" * 65537)}, r"structured\.regex=.* has 65537 bytes, more than max_"),
        ({"structured": StructuredOutput(grammar="é" * 32769)}, "has 65538 bytes"),
        ({"structured": StructuredOutput(json_schema={"enum": ["a" * 65536]})}, "has 65550 bytes"),
        ({"stop_token_ids": [300]}, r"stop_token_ids has token id 300: expected 0\.\.299"),
    ],
)  # fmt: skip
def test_limits(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**params)


@pytest.mark.parametrize("params", [{"stop": "x"}, {"bad_words": ["x"]}, {"structured": StructuredOutput(regex="x")}])
def test_text_needs_a_tokenizer(params: dict[str, Any]) -> None:
    bare = RequestBuilder(EngineConfig(model=MODEL), None, 1000)
    with pytest.raises(ValueError, match=f"{next(iter(params))}=.* needs text"):
        bare.build("it", IDS, SamplingParams(**params), 0)
    for prompt in ("text", {"prompt": "text"}):
        with pytest.raises(ValueError, match="prompt 'text' is text, but the model has no tokenizer"):
            bare.build("it", prompt, SamplingParams(), 0)
    assert bare.build("it", {"prompt": "text", "prompt_token_ids": IDS}, SamplingParams(), 0).prompt == "text"


def test_limits_can_be_reached_and_moved() -> None:
    assert len(build(n=128).answers) == 128
    build(logprobs=20, prompt_logprobs=20, stop="a" * 16384)
    build(logprobs=-1, prompt_logprobs=300, limits={"max_logprobs": -1})
    build(logprobs=0, limits={"max_logprobs": 0})
    with pytest.raises(ValueError, match=r"prompt_logprobs=301 is not in -1\.\.300, the size of the vocabulary"):
        build(prompt_logprobs=301, limits={"max_logprobs": -1})
    build(stop="abc", n=2, limits={"max_stop_bytes": 3, "max_n": 2})
    with pytest.raises(ValueError, match="stop and bad_words have 4 bytes, more than max_stop_bytes=3"):
        build(stop="abcd", limits={"max_stop_bytes": 3})


def test_what_the_parameters_mean_is_built_once() -> None:
    encode = Bytes()
    request = builder(encode).build("it", "a", SamplingParams(n=50, bad_words=["word"], stop=["x", "yz"]), 0)
    assert len({id(answer.sampler.rules) for answer in request.answers}) == 1
    assert encode.encoded < 50
    alone = builder(encode).build("it", "a", SamplingParams(stop=["x"], repetition_penalty=1.5), 0).answers[0]
    assert alone.sampler.rules.counted == {97: 0}


def test_builders_work_on_any_thread() -> None:
    shared, found = builder(seed=0), list[Request]()

    def work() -> None:
        found.extend(shared.build("it", "word", SamplingParams(n=3), 0) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({a.state.seq_id for r in found for a in r.answers}) == 600
    assert {r.answers[0].sampler.seed for r in found} == set(range(200))
