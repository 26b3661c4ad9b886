from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from grok_engine.sampling.params import RequestOutputKind, SamplingParams, StructuredOutput, uniform

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, True, "1", None],
    "max_tokens": [0, -1, 2.0, False, "16"],
    "min_tokens": [-1, 17, 0.0, True, None],
    "temperature": [-0.1, NAN, INF, True, "1", None, 1e39],
    "top_p": [0, -0.5, 1.01, NAN, True, "0.9", None],
    "top_k": [-2, 1.5, True, "5", None],
    "min_p": [-0.1, 1.1, NAN, True, "0", None],
    "repetition_penalty": [0, -1, NAN, INF, True, "1", None],
    "presence_penalty": [-2.1, 2.1, NAN, True, "0", None],
    "frequency_penalty": [-2.1, 2.1, NAN, True, "0", None],
    "seed": [-1, 2**63, 1.0, True, "7"],
    "stop": ["", ["a", ""], [1], 5, b"x", {"a": 1}],
    "stop_token_ids": [[-1], [1.0], [True], ["2"], 2, "2"],
    "bad_words": [[""], "word", [1]],
    "logits_processors": [[1], len, "x"],
    "include_stop_str_in_output": [1, None, "yes"],
    "ignore_eos": [1, None, "yes"],
    "logprobs": [-2, 1.5, True, "1"],
    "prompt_logprobs": [-2, 1.5, True, "1"],
    "logit_bias": [[1], {"1": 1.0}, {1: "x"}, {1: NAN}, {1: INF}, {-1: 1.0}, {True: 1.0}, {1: True}, {1: 1e39}],
    "allowed_token_ids": [[], [-1], [True], "1", 3],
    "structured": ["a+", {"regex": "a"}],
    "output_kind": ["DELTA", 1, None],
}


def test_every_field_is_tried() -> None:
    assert set(WRONG) == {f.name for f in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    wrong = next(iter(value.values())) if isinstance(value, dict) and name == "logit_bias" else value
    wrong = next((v for v in wrong if v not in (3, "a")), ()) if isinstance(wrong, list) else wrong
    assert repr(wrong) in message or repr(value) in message
    assert "expected" in message or " is not " in message


def test_what_is_accepted() -> None:
    SamplingParams(
        n=3, max_tokens=1, min_tokens=1, temperature=0, top_p=1, top_k=-1, min_p=1, repetition_penalty=2, seed=0,
        presence_penalty=-2, frequency_penalty=2, logprobs=-1, prompt_logprobs=0, logit_bias={3: -100, 0: 1.5},
        allowed_token_ids=[1], stop_token_ids={5}, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    params: Any = SamplingParams
    nothing = params(stop=None, stop_token_ids=None, bad_words=None, logits_processors=None)
    assert nothing == SamplingParams()
    assert SamplingParams().max_tokens == 16
    with pytest.raises(TypeError):
        params(16)
    with pytest.raises(TypeError, match="max_token"):
        params(max_token=3)


def test_sequences_are_resolved_once_and_the_rest_is_frozen() -> None:
    bias, stop = {1: 2.0}, ["a", "b"]
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("c")
    bias[2] = 1.0
    assert params.stop == ("a", "b")
    assert params.logit_bias == {1: 2.0}
    assert SamplingParams(stop="ab").stop == ("ab",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=4).stop == ("a", "b")


def test_the_vocabulary_bounds_token_ids() -> None:
    SamplingParams(stop_token_ids=[9], allowed_token_ids=[9], logit_bias={9: 1}, logprobs=10).check_vocabulary(10)
    for name, value in {"stop_token_ids": [10], "allowed_token_ids": [3, 10], "logit_bias": {10: 1.0}}.items():
        params: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=rf"{name} .*10.*0\.\.9"):
            SamplingParams(**params).check_vocabulary(10)
    for name in ("logprobs", "prompt_logprobs"):
        params = {name: 11}
        with pytest.raises(ValueError, match=rf"{name}=11.*\.\.10"):
            SamplingParams(**params).check_vocabulary(10)


def test_end_tokens() -> None:
    assert SamplingParams(stop_token_ids=[5]).end_token_ids((2,)) == {2, 5}
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).end_token_ids((2,)) == {5}


def test_structured_output_is_exactly_one_thing() -> None:
    for options in ({}, {"regex": "a", "grammar": 'root ::= "a"'}, {"regex": 5}, {"grammar": b"x"}, {"json_schema": 5}):
        wrong: dict[str, Any] = options
        with pytest.raises(ValueError, match="structured"):
            StructuredOutput(**wrong)
    StructuredOutput(json_schema={"type": "object"})
    StructuredOutput(json_schema=True)
    with pytest.raises(ValueError, match="ignore_eos"):
        SamplingParams(structured=StructuredOutput(regex="a"), ignore_eos=True)


def test_random_numbers_are_uniform_and_of_their_place_alone() -> None:
    numbers = torch.tensor([[uniform(s, 0, i) for i in range(200)] for s in range(50)], dtype=torch.float64)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert torch.equal(numbers.float().double(), numbers)
    n = numbers.numel()
    assert len(set(numbers.flatten().tolist())) > n - 10
    counts = torch.histc(numbers.flatten(), 20, 0, 1)
    chi2 = float(((counts - n / 20) ** 2 / (n / 20)).sum())
    assert 5 < chi2 < 45  # 19 degrees of freedom
    for a, b in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.04
    assert uniform(7, 1, 3) == uniform(7, 1, 3)
    assert len({uniform(7, 1, 3), uniform(7, 3, 1), uniform(3, 1, 7), uniform(2**63 - 1, 1, 3)}) == 4
    # a seed repeats its text in the next release, too
    assert [uniform(0, 0, 0), uniform(1, 2, 3)] == [0.15674251317977905, 0.7069603204727173]
