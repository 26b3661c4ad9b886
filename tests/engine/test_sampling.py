from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from grok_engine.sampling.params import RequestOutputKind, SamplingParams, StructuredOutput, uniform

NAN, INF = float("nan"), float("inf")
NO_REPR = 10**5000
NOT_COUNTS: list[Any] = [
    -2, 1.5, NAN, True, np.True_, "1", b"1", [1], np.float32(1), np.ones(1, int), 2**63, NO_REPR,
]  # fmt: skip
NOT_NUMBERS: list[Any] = [NAN, INF, -INF, True, np.True_, "0.5", None, [0.5], NO_REPR, 1j, np.ones(1)]
NOT_BOOLS: list[Any] = [1, 0, None, "yes", "", [True]]
NOT_TOKENS: list[Any] = [
    [-1],
    [2**63],
    [1.0],
    [True],
    ["2"],
    [None],
    2,
    "2",
    b"\x02",
    bytearray(2),
    memoryview(b"2"),
    {2: 1},
]
NOT_TEXTS: list[Any] = ["", ["a", ""], [1], 5, b"x", {"a": 1}, ["\ud800"], [b"x"], [None]]
# For each field: values that are refused, and values that are accepted, each with what it becomes.
ODD: dict[str, tuple[list[Any], list[tuple[Any, Any]]]] = {
    "n": ([*NOT_COUNTS, 0, None], [(np.int64(2), 2), (2**63 - 1, 2**63 - 1)]),
    "max_tokens": ([*NOT_COUNTS, 0], [(None, None), (np.uint8(3), 3), (2**63 - 1, 2**63 - 1)]),
    "min_tokens": ([*NOT_COUNTS, 17, None], [(np.int32(3), 3)]),
    "temperature": (
        [*NOT_NUMBERS, -0.1, 1e39], [(0, 0.0), (np.float32(0.5), 0.5), (5e-324, 5e-324), (3e38, 3e38)],
    ),
    "top_p": ([*NOT_NUMBERS, 0, -0.5, 1.01], [(1, 1.0), (np.float16(0.5), 0.5), (1e-300, 1e-300)]),
    "top_k": ([*NOT_COUNTS, None], [(-1, -1), (np.int64(5), 5), (2**63 - 1, 2**63 - 1)]),
    "min_p": ([*NOT_NUMBERS, -0.1, 1.1], [(1, 1.0), (np.float64(0.5), 0.5), (5e-324, 5e-324)]),
    "repetition_penalty": ([*NOT_NUMBERS, 0, -1, 1e-40, 1e-7, 1e7], [(1e-6, 1e-6), (np.float32(2), 2.0)]),
    "presence_penalty": ([*NOT_NUMBERS, -2.1, 2.1], [(-2, -2.0), (np.float32(0.5), 0.5)]),
    "frequency_penalty": ([*NOT_NUMBERS, -2.1, 2.1], [(2, 2.0), (np.float32(0.5), 0.5)]),
    "seed": ([*NOT_COUNTS, -1], [(None, None), (np.uint64(2**63 - 1), 2**63 - 1)]),
    "stop": (NOT_TEXTS, [("ab", ("ab",)), (None, ()), (np.array(["a", "b"]), ("a", "b")), ("\0", ("\0",))]),
    "stop_token_ids": (NOT_TOKENS, [(None, ()), ({5}, (5,)), (np.arange(2), (0, 1)), (torch.tensor([3]), (3,))]),
    "bad_words": ([*NOT_TEXTS, "word"], [(None, ()), (("a",), ("a",))]) ,
    "logits_processors": ([[1], len, "x"], [(None, ()), ([len], (len,))]),
    "include_stop_str_in_output": (NOT_BOOLS, [(np.True_, True)]),
    "skip_special_tokens": (NOT_BOOLS, [(np.False_, False)]),
    "expert_load": (NOT_BOOLS, [(np.True_, True)]),
    "ignore_eos": (NOT_BOOLS, [(np.False_, False)]),
    "logprobs": (NOT_COUNTS, [(None, None), (-1, -1), (np.int64(5), 5)]),
    "prompt_logprobs": (NOT_COUNTS, [(None, None), (0, 0), (np.int64(5), 5)]),
    "logit_bias": (
        [[1], "1", 1, {"1": 1.0}, {1: "x"}, {1: NAN}, {1: INF}, {-1: 1.0}, {True: 1.0}, {1: True}, {1: 1e39}],
        [(None, None), ({}, {}), ({np.int64(3): np.float32(0.5)}, {3: 0.5}), ({0: 1}, {0: 1.0})],
    ),
    "allowed_token_ids": (
        [*NOT_TOKENS, [], np.zeros(0, int)], [(None, None), (range(2), (0, 1)), ([np.int8(1)], (1,))],
    ),
    "structured": (["a+", {"regex": "a"}, True], [(None, None)]),
    "output_kind": (["DELTA", 1, None], [(RequestOutputKind.DELTA, RequestOutputKind.DELTA)]),
}  # fmt: skip


def test_an_empty_text_is_called_empty() -> None:
    for stop in ("", ["a", ""]):
        with pytest.raises(ValueError, match="stop has '', which is empty: expected text of at least one character"):
            SamplingParams(stop=stop)


def test_every_field_is_tried() -> None:
    assert set(ODD) == {f.name for f in dataclasses.fields(SamplingParams)}


def python_types(value: Any) -> Any:
    """The types of a value and of what it holds."""
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return type(value), [type(item) for item in inside]


@pytest.mark.parametrize("name", ODD)
def test_odd_values(name: str) -> None:
    wrong, right = ODD[name]
    for value in wrong:
        with pytest.raises(ValueError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith(name), value
        assert "expected" in message or " is not " in message, value
        assert len(message) < 400
        items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        shown = [value, *items, *(value if isinstance(value, dict) else ())]
        assert value is NO_REPR or any(repr(v) in message for v in shown) or "=()" in message, value
    for value, becomes in right:
        found = getattr(SamplingParams(**{name: value}), name)
        assert (found, python_types(found)) == (becomes, python_types(becomes))


def test_defaults_and_names() -> None:
    params: Any = SamplingParams
    assert SamplingParams().max_tokens == 16
    SamplingParams(max_tokens=None, min_tokens=10**6)
    with pytest.raises(ValueError, match=r"min_tokens=9 is not an integer in 0\.\.max_tokens=8"):
        SamplingParams(max_tokens=8, min_tokens=9)
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
