from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grok_engine.sampling import sampler
from grok_engine.sampling.logprobs import prompt_logprobs, token_logprobs
from grok_engine.sampling.params import SamplingParams, StructuredOutput, uniform
from grok_engine.sampling.rules import FEW_BANS, SamplingRules, bad_word_tokens
from grok_engine.sampling.sampler import FEW, Sampled
from grok_engine.sampling.state import SamplingState

NEVER = float("-inf")
EOS = (2,)
# a program whose warnings are errors is served like any other
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _strict_numpy() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def row(
    seed: int = 0, *, vocab: int = 40, matcher: Any = None, output: Sequence[int] = (), index: int = 0, **options: Any
) -> SamplingState:
    named = {k: options.pop(k) for k in ("prompt", "bad_words") if k in options}
    rules = SamplingRules(SamplingParams(**options), vocab, eos_token_ids=EOS, **named)
    return SamplingState(rules, list(output), seed=seed, index=index, matcher=matcher)


def sample(rows: Sequence[SamplingState], logits_BV: Tensor) -> list[Sampled]:
    """`sampler.sample`, with the tokens appended as an engine does."""
    found = sampler.sample(rows, logits_BV)
    for state, sampled in zip(rows, found, strict=True):
        if sampled.error is None:
            state.output_ids.append(sampled.token)
    return found


class Bits:
    """A matcher that allows multiples of `step`, or fails."""

    def __init__(self, step: int, vocab: int, fails: bool = False) -> None:
        self.step, self.vocab, self.fails, self.accepted = step, vocab, fails, list[int]()

    def allowed(self) -> Any:
        if self.fails:
            raise ValueError("the grammar is too complex")
        return np.packbits(np.arange(self.vocab) % self.step == 0, bitorder="little")

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def expected_token(s: SamplingState, logits_V: Tensor, prompt: Sequence[int] = ()) -> int:
    """The documented order, step by step in fp64."""
    p, out = s.params, s.output_ids
    x = logits_V.double().numpy().copy()
    for processor in p.logits_processors:
        x = processor(list(out), torch.from_numpy(x)).numpy().copy()
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *out}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        x[token] -= p.frequency_penalty * out.count(token) + p.presence_penalty * (token in out)
    if p.allowed_token_ids is not None:
        x[[i for i in range(len(x)) if i not in p.allowed_token_ids]] = NEVER
    if len(out) < p.min_tokens:
        x[list(p.end_token_ids(EOS))] = NEVER
    if p.temperature == 0:
        return int(x.argmax())
    x /= p.temperature
    probs = np.exp(x - x.max())
    x[probs < p.min_p * (1 - 1e-9)] = NEVER
    if 0 < p.top_k < len(x):
        x[x < np.sort(x)[-p.top_k]] = NEVER
    order = np.argsort(-x, kind="stable")
    probs = np.exp(x[order] - x.max())
    probs /= probs.sum()
    kept = 1 + int((np.cumsum(probs)[:-1] < p.top_p).sum())
    sums = np.cumsum(probs[:kept])
    place = int((sums <= uniform(s.seed, s.index, len(out)) * sums[-1]).sum())
    return int(order[min(place, kept - 1)])


def some_options(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Parameters of one random request."""
    options: dict[str, Any] = {"max_tokens": 50}
    choices: dict[str, Any] = {
        "temperature": [0, 0.3, 1.0, 2.5],
        "top_p": [0.05, 0.5, 0.9],
        "top_k": [-1, 1, 2, 7, 500],
        "min_p": [0.01, 0.2],
        "repetition_penalty": [1.3, 0.7],
        "presence_penalty": [0.7, -1.0],
        "frequency_penalty": [0.4, -0.3],
        "logprobs": [0, 1, 5],
        "logit_bias": [{3: 2.0, 5: -1.5}],
        "allowed_token_ids": [[i for i in range(vocab) if i % 3], [2, 4, 9]],
        "min_tokens": [3],
        "stop_token_ids": [[4]],
        "logits_processors": [[lambda ids, x: x + len(ids) * (torch.arange(len(x)) % 2)]],
    }
    for name, values in choices.items():
        if rng.random() < 0.3:
            options[name] = rng.choice(values)
    return options


def test_tokens_are_those_of_the_documented_order() -> None:
    rng, vocab = random.Random(1), 40
    used = set()
    for trial in range(150):
        requests = [(some_options(rng, vocab), [rng.randrange(vocab) for _ in range(4)]) for _ in range(4)]
        rows = [row(trial * 10 + i, prompt=prompt, index=i, **o) for i, (o, prompt) in enumerate(requests)]
        for step in range(4):
            x_BV = logits(4, vocab, seed=trial * 4 + step)
            wanted = [
                expected_token(r, x, prompt if r.params.repetition_penalty != 1 else ())
                for r, x, (_, prompt) in zip(rows, x_BV, requests, strict=True)
            ]
            assert [s.token for s in sample(rows, x_BV)] == wanted
        used.update(name for o, _ in requests for name in o)
    assert len(used) == 14


@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 5003])
def test_a_row_depends_on_itself_alone_to_the_bit(vocab: int) -> None:
    rng = random.Random(vocab)
    for trial in range(8 if vocab < 2000 else 3):
        count, steps = rng.choice([3, 9, 17]), 3
        options = [
            some_options(rng, vocab) if vocab > 9 else {"temperature": i % 2, "logprobs": 1} for i in range(count)
        ]
        x_SBV = [logits(count, vocab, seed=100 * trial + s) for s in range(steps)]

        def made(options: list[dict[str, Any]]) -> list[SamplingState]:
            return [
                row(i, vocab=vocab, prompt=[0], matcher=Bits(2, vocab) if i % 5 == 4 else None, **o)
                for i, o in enumerate(options)
            ]

        alone, together, shuffled = made(options), made(options), made(options)
        for x_BV in x_SBV:
            one = [sample([r], x[None])[0] for r, x in zip(alone, x_BV, strict=True)]
            assert sample(together, x_BV) == one  # floats compare by value: equal bits, no NaN
            order = rng.sample(range(count), count)
            mixed = [*order, *[None] * 3]  # and other requests between them
            rng.shuffle(mixed)
            others = [row(99, vocab=vocab, temperature=1.3, top_k=2, logprobs=1) for _ in mixed]
            batch = [others[i] if j is None else shuffled[j] for i, j in enumerate(mixed)]
            noise = logits(len(mixed), vocab, seed=5)
            found = sample(batch, torch.stack([noise[i] if j is None else x_BV[j] for i, j in enumerate(mixed)]))
            assert [found[mixed.index(j)] for j in range(count)] == one
        assert [r.output_ids for r in together] == [r.output_ids for r in alone] == [r.output_ids for r in shuffled]


def test_the_random_stream_is_the_seed_and_the_place() -> None:
    x_BV = logits(1, 50, scale=0.5)
    whole, n_2, other = row(3, max_tokens=99), row(3, index=1, max_tokens=99), row(4, max_tokens=99)
    for r in (whole, n_2, other):
        for _ in range(30):
            sample([r], x_BV)
    assert len({tuple(r.output_ids) for r in (whole, n_2, other)}) == 3
    resumed = row(3, output=whole.output_ids[:11], max_tokens=99)  # as after a move to another engine
    for _ in range(19):
        sample([resumed], x_BV)
    assert resumed.output_ids == whole.output_ids


def test_draws_follow_the_distribution() -> None:
    x_V = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    rows = [row(i, temperature=0.8) for i in range(4000)]
    tokens = torch.tensor([s.token for s in sample(rows, x_V.expand(4000, 5).contiguous())])
    expected = torch.softmax(x_V / 0.8, 0) * 4000
    chi2 = float(((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum())
    assert chi2 < 20  # 4 degrees of freedom


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-20, 1e-5, 3e38, 3.4e38])
def test_extreme_values_mean_what_they_say(temperature: float) -> None:
    """A tiny temperature, top_p or a min_p of 1 takes the best token; a huge temperature takes any."""
    x_BV = logits(1, 40)
    best = int(x_BV.argmax())
    for min_p, top_p in itertools.product((0, 5e-324, 1e-300, 0.5, 1), (1e-300, 1e-46, 0.5, 1)):
        options: dict[str, Any] = {"temperature": temperature, "min_p": min_p, "top_p": top_p}
        rows = [row(seed, **options) for seed in range(5)]
        found = sample(rows, x_BV.expand(5, 40).contiguous())
        assert [s.error for s in found] == [None] * 5
        certain = temperature < 1 or min_p == 1 or top_p < 1e-40
        assert ({s.token for s in found} == {best}) is certain, options
    edits: list[dict[str, Any]] = [
        {"logit_bias": {5: 3.4e38, 6: -3.4e38}}, {"logit_bias": {5: 5e-324}},
        {"repetition_penalty": 1e-6, "presence_penalty": -2}, {"repetition_penalty": 1e6, "frequency_penalty": 2},
    ]  # fmt: skip
    found = sample([row(temperature=temperature, prompt=range(40), **o) for o in edits], x_BV.expand(4, 40).clone())
    assert [s.error for s in found] == [None] * 4
    assert found[0].token == 5 or temperature > 1


@pytest.mark.parametrize("count", [FEW, FEW + 1])
def test_a_bias_of_many_tokens(count: int) -> None:
    vocab = FEW + 10
    bias = {i: 0.001 * i for i in range(count)}
    x_BV = logits(2, vocab)
    expected = x_BV[0] + torch.tensor([bias.get(i, 0.0) for i in range(vocab)])
    (found, other) = sample([row(vocab=vocab, temperature=0, logit_bias=bias), row(vocab=vocab, temperature=0)], x_BV)
    assert (found.token, other.token) == (int(expected.argmax()), int(x_BV[1].argmax()))


def test_ties_go_to_the_lower_index() -> None:
    x_BV = torch.zeros(4, 70)
    x_BV[:, [30, 60]] = 1
    rows = [row(temperature=0), row(9, top_k=1), row(1, top_k=1, min_p=0.5), row(temperature=0, logprobs=3)]
    found = sample(rows, x_BV)
    assert [s.token for s in found] == [30] * 4
    assert found[3].logprobs is not None
    assert ([(t, rank) for t, _, rank in found[3].logprobs.top], found[3].logprobs.rank) == (
        [(30, 1), (60, 1), (0, 3)],
        1,
    )
    assert found[0].logprobs is None


def test_top_k_keeps_what_equals_the_kth() -> None:
    x_V = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    rows = [row(i, top_k=2) for i in range(300)]
    assert {s.token for s in sample(rows, x_V.expand(300, 5).contiguous())} == {1, 2, 3}


@pytest.mark.parametrize("edit", [{}, {"logit_bias": {0: 1.0}}, {"presence_penalty": 1.0}])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("bad", "word"), [(float("nan"), "NaN"), (float("inf"), r"\+inf"), (NEVER, "all -inf")], ids=["nan", "inf", "-inf"]
)
def test_a_bad_row_is_an_error_and_the_others_do_not_notice(
    edit: dict[str, Any], temperature: float, bad: float, word: str
) -> None:
    x_BV = logits(3, 20)
    clean = sample([row(i, temperature=temperature, logprobs=1, **edit) for i in range(3)], x_BV)
    x_BV[1] = bad
    if bad != NEVER:
        x_BV[1, 1:] = 0.5
    before = x_BV.clone()
    rows = [row(i, temperature=temperature, logprobs=1, **edit) for i in range(3)]
    found = sample(rows, x_BV)
    assert [found[0], found[2]] == [clean[0], clean[2]]
    with pytest.raises(AssertionError, match=word):
        raise AssertionError(found[1].error)
    assert (found[1].token, found[1].logprobs, rows[1].output_ids) == (-1, None, [])
    assert torch.equal(x_BV.nan_to_num(7), before.nan_to_num(7))


def test_a_masked_nan_is_an_error_too() -> None:
    x_BV = logits(1, 8)
    x_BV[0, 3] = float("nan")
    assert "NaN" in (sample([row(allowed_token_ids=[1, 2])], x_BV)[0].error or "")


def test_nothing_left_is_an_error() -> None:
    found = sample([row(allowed_token_ids=[2], min_tokens=1), row()], logits(2, 8))
    assert "no token can follow" in (found[0].error or "")
    assert found[1].error is None


def test_processors_in_turn_and_their_failures() -> None:
    seen: list[list[int]] = []

    def only_5(ids: list[int], x_V: Tensor) -> Tensor:
        seen.append(ids)
        x_V[:] = NEVER
        x_V[5] = 0.0
        return x_V

    def only_6(ids: list[int], x_V: Tensor) -> Tensor:
        assert x_V[5] == 0
        ids.append(-1)  # a copy: of no consequence
        return torch.where(torch.arange(len(x_V)) == 6, 1.0, NEVER)

    def fails(ids: list[int], x_V: Tensor) -> Tensor:
        x_V[:] = float("nan")
        raise KeyError("what a pity")

    x_BV = logits(6, 10)
    rows = [
        row(logits_processors=[only_5, only_6]), row(logits_processors=[fails]), row(temperature=0),
        row(logits_processors=[lambda ids, x: x[:3]]), row(logits_processors=[lambda ids, x: None]),
        row(logits_processors=[lambda ids, x: x / 0]),
    ]  # fmt: skip
    found = sample(rows, x_BV)
    assert found[0].token == 6
    assert found[2].token == int(x_BV[2].argmax())
    for i, words in {1: "KeyError: 'what a pity'", 3: "(3,)", 4: "None", 5: "inf"}.items():
        assert words in (found[i].error or ""), found[i]
    sample(rows[:1], x_BV[:1])
    assert seen == [[], [6]]


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit])
def test_what_a_processor_raises_ends_its_request_but_for_what_ends_the_program(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(ids: list[int], x_V: Tensor) -> Tensor:
        raise error

    rows, x_BV = [row(logits_processors=[fails]), row(temperature=0)], logits(2, 10)
    if error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            sample(rows, x_BV)
        return
    failed, other = sample(rows, x_BV)
    assert failed.error == f"logits processor: {error.__name__}"
    assert other.token == int(x_BV[1].argmax())
    assert "in fails" in caplog.text  # the traceback


@pytest.mark.parametrize("more", [0, FEW_BANS])
def test_min_tokens_holds_every_end_token_back(more: int) -> None:
    vocab = more + 6
    x_BV = torch.zeros(1, vocab)
    x_BV[0, [2, 4]] = 9.0
    x_BV[0, 5] = 1.0
    r = row(vocab=vocab, temperature=0, min_tokens=2, stop_token_ids=[4, *range(6, vocab)])
    assert [sample([r], x_BV)[0].token for _ in range(3)] == [5, 5, 2]
    r = row(temperature=0, min_tokens=2, ignore_eos=True)
    assert sample([r], x_BV)[0].token == 2


def test_an_end_token_survives_min_tokens_where_nothing_else_can_follow() -> None:
    """As where a grammar's text is complete. `allowed_token_ids` still count."""
    only_ends, x_BV = Bits(2, 4), logits(1, 40)  # tokens 0 and 2
    structured = StructuredOutput(grammar="root ::= ")
    options: dict[str, Any] = {"structured": structured, "matcher": only_ends, "min_tokens": 8, "temperature": 0}
    assert sample([row(**options, stop_token_ids=[0], allowed_token_ids=[2, 5])], x_BV)[0].token == 2
    assert sample([row(**options)], x_BV)[0].token == 0
    assert "no token can follow" in (sample([row(**options, allowed_token_ids=[5])], x_BV)[0].error or "")


def test_bad_words_ban_what_would_complete_them() -> None:
    rng = random.Random(4)
    for trial in range(60):
        words = [[rng.randrange(4) for _ in range(rng.randrange(1, 4))] for _ in range(3)]
        if len({w[0] for w in words if len(w) == 1}) > 1:
            continue
        r = row(trial, vocab=5, bad_words=words, max_tokens=99)
        for step in range(40):
            x_BV = logits(1, 5, seed=trial * 40 + step)
            banned = {w[-1] for w in words if r.output_ids[len(r.output_ids) - len(w) + 1 :] == w[:-1]}
            bits = r.allowed()
            masked = set() if bits is None else {t for t in range(5) if not bits[0] >> t & 1}
            assert masked | set(r.banned().tolist()) == banned
            assert sample([r], x_BV)[0].token not in banned
        text = r.output_ids
        assert not any(text[i : i + len(w)] == w for w in words for i in range(len(text)))


def test_bad_word_tokens_cover_the_spellings() -> None:
    def encode(text: str) -> list[int]:  # a space of its own before every text, and "(w" as one token
        return [ord(c) for c in (" " + text).replace("(w", "W")]

    found = bad_word_tokens(["word"], encode)
    assert found == [tuple(map(ord, spelling)) for spelling in (" word", "  word", "word")]
    with pytest.raises(ValueError, match="'x'"):
        bad_word_tokens(["x"], lambda text: [])


def test_a_grammar_masks_and_is_told() -> None:
    vocab = 37
    matchers = [Bits(5, vocab), Bits(7, 16), Bits(1, vocab, fails=True)]  # the second knows only 16 tokens
    rows = [row(i, matcher=m, max_tokens=99, temperature=2.0) for i, m in enumerate(matchers)]
    rows.insert(1, row(9, temperature=0))
    for step in range(40):
        x_BV = logits(4, vocab, seed=step)
        found = sample(rows, x_BV)
        assert found[0].token % 5 == 0
        assert found[1].token == int(x_BV[1].argmax())
        assert found[2].token in (0, 7, 14)
        assert found[3].error == "the grammar is too complex"
    assert matchers[0].accepted == rows[0].output_ids
    assert set(rows[0].output_ids) == set(range(0, vocab, 5))
    assert sample(rows[:1], x_BV[:1])[0].token % 5 == 0  # all of the rows have one


@pytest.mark.parametrize("vocab", [5, 64, 1003])
def test_logprobs_are_of_the_unprocessed_logits(vocab: int) -> None:
    x_BV = logits(4, vocab)
    options: dict[str, Any] = {"temperature": 0.5, "logit_bias": {1: 50.0}, "top_k": 2}
    found = sample([row(i, vocab=vocab, logprobs=k, **options) for i, k in enumerate([0, 3, -1, vocab])], x_BV)
    wanted = torch.log_softmax(x_BV.double(), -1)
    for i, k in enumerate([0, 3, vocab, vocab]):
        assert found[i].token == 1
        s = found[i].logprobs
        assert s is not None
        assert s.logprob == pytest.approx(float(wanted[i, 1]), abs=1e-5)
        assert s.rank == 1 + int((x_BV[i] > x_BV[i, 1]).sum())
        ids = x_BV[i].sort(descending=True, stable=True).indices[:k].tolist()
        assert [t for t, *_ in s.top] == ids
        assert [p for _, p, _ in s.top] == pytest.approx(wanted[i, ids].tolist(), abs=1e-5)
        assert [rank for *_, rank in s.top] == list(range(1, k + 1))


def test_prompt_logprobs_are_the_same_in_parts() -> None:
    x_TV, ids = logits(150, 77), [random.Random(0).randrange(77) for _ in range(150)]
    whole = list(prompt_logprobs(x_TV, ids, 4, Tensor.float))
    parts = [prompt_logprobs(x_TV[t : t + 7], ids[t : t + 7], 4, Tensor.float) for t in range(0, 150, 7)]
    assert whole == [found for part in parts for found in part]
    assert whole[3] == token_logprobs(x_TV[3:4], ids[3:4], [4])[0]
    assert whole[3].logprob == pytest.approx(float(torch.log_softmax(x_TV.double(), -1)[3, ids[3]]), abs=1e-5)
    with pytest.raises(AssertionError, match="149 token_ids for 150 rows"):
        next(prompt_logprobs(x_TV, ids[1:], 4, Tensor.float))


def test_wrong_logits_are_refused() -> None:
    for wrong in (torch.zeros(2, 5), torch.zeros(5), torch.zeros(1, 5).bfloat16()):
        with pytest.raises(ValueError, match="expected"):
            sample([row()], wrong)
    assert sample([], torch.zeros(0, 5)) == []


@pytest.mark.parametrize(
    ("options", "same"),
    [({"temperature": 0}, True), ({"top_p": 0.9, "top_k": 3, "min_p": 0.1}, True), ({"frequency_penalty": 0.5}, True)],
)
def test_calls_do_not_grow_with_the_batch(options: dict[str, Any], same: bool) -> None:
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for size in (2, 50):
        rows = [row(i, output=[1], logprobs=2, **options) for i in range(size)]
        with Calls() as calls:
            sample(rows, logits(size, 30))
        counts.append(calls.count)
    assert (counts[0] == counts[1]) is same
