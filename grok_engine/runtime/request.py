"""A request: the outputs a user gets of it, and its answers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grok_engine.sampling.logprobs import TokenLogprobs, prompt_logprobs
from grok_engine.sampling.params import RequestOutputKind, SamplingParams
from grok_engine.sampling.sampler import Sampled
from grok_engine.sampling.state import SamplingState

from .sequence import SequenceState
from .text import FinishReason, SequenceText


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1 is the most probable), and its text as inside a text: with its leading
    space, a part of a character as U+FFFD, None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


Spell = Callable[[int], str | None]  # a token's text
TopLogprobs = dict[int, Logprob]  # by token id: the chosen token first, then the most probable ones


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times on `time.monotonic`, in seconds: arrival, begin of the first step, first token, end; None for what has not
    happened yet."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` answers. An end token is in `token_ids`, not in `text`; without a tokenizer `text` is "".

    With output_kind DELTA, `text`, `token_ids` and `logprobs` hold only what is new since the last output, and answers
    in which nothing is new are left out.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TopLogprobs] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None  # the stop string, or the token of stop_token_ids, that ended it
    error: str | None = None  # what failed, with finish_reason "error"
    cause: BaseException | None = None  # the exception, if it was the step that failed, and not this request


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of a request after a step. cached_tokens: prompt tokens found in the prefix cache.

    expert_load, if SamplingParams asked for it: how many tokens of this request each expert got so far,
    [layer][expert]. The last token of an answer reaches no expert.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    cached_tokens: int = 0
    prompt_logprobs: list[TopLogprobs | None] | None = None
    expert_load: list[list[int]] | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's n sequences. `state.output_ids` has its tokens; `sampler` and `text` read them there."""

    index: int
    state: SequenceState
    sampler: SamplingState
    text: SequenceText
    spell: Spell
    logprobs: list[TopLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    error: str | None = None
    cause: BaseException | None = None
    last_token: float | None = None  # when, on time.monotonic
    counted: int = 0  # tokens that `Request.expert_load_LE` has counted, or those of the answer it was forked from
    shown: tuple[int, int, FinishReason | None] = (0, 0, None)  # characters and tokens that outputs have shown

    def accept(self, result: Sampled) -> bool:
        """Append a sampled token. Returns whether it finishes the answer."""
        self.state.output_ids.append(result.token)
        if (found := result.logprobs) is not None:
            self.logprobs.append(_by_token(result.token, found, self.spell))
            self.cumulative_logprob += found.logprob
        self.text.push(result.token)
        return self.text.finish_reason is not None

    def completion(self, delta: bool) -> CompletionOutput:
        """The answer so far, or with `delta` what is new since the last call."""
        text, ids = self.text.text, self.state.output_ids
        text_from, tokens_from, _ = self.shown if delta else (0, 0, None)
        self.shown = self.known
        asked = self.sampler.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text[text_from:],
            token_ids=ids[tokens_from:],
            finish_reason=self.text.finish_reason,
            logprobs=self.logprobs[tokens_from:] if asked else None,
            cumulative_logprob=self.cumulative_logprob if asked else None,
            stop_reason=self.text.stop_reason,
            error=self.error,
            cause=self.cause,
        )

    @property
    def known(self) -> tuple[int, int, FinishReason | None]:
        """What `shown` is when an output has shown everything."""
        return len(self.text.text), len(self.state.output_ids), self.text.finish_reason


@dataclass(slots=True, eq=False)
class Request:
    """A request while it runs. The first answer computes the prompt; the others are forked from it then."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float
    answers: list[Answer]
    forked: bool  # whether the scheduler has all n sequences: from the first token on
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    expert_load_LE: NDArray[np.int64] | None = None  # if asked for
    shown_prompt_ids: list[int] = field(default_factory=list)  # the user's copy, which outputs share
    prompt_logprobs: list[TopLogprobs | None] | None = None

    @property
    def started(self) -> list[Answer]:
        """The answers whose sequences the scheduler has."""
        return self.answers if self.forked else self.answers[:1]

    @property
    def done(self) -> bool:
        return all(a.text.finish_reason is not None for a in self.answers)

    def score_prompt(self, position: int, x_TD: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """Take the log-probabilities of the prompt's tokens after `position`, one for each row of hidden states."""
        number = self.params.prompt_logprobs
        assert number is not None
        assert self.prompt_logprobs is not None
        token_ids = self.prompt_ids[position + 1 : position + 1 + len(x_TD)]
        for i, found in enumerate(prompt_logprobs(x_TD, token_ids, number, logits), position + 1):
            self.prompt_logprobs[i] = _by_token(self.prompt_ids[i], found, self.answers[0].spell)

    def output(self) -> RequestOutput:
        """What the user gets of it now. No list in it is one that the engine reads again."""
        if not self.shown_prompt_ids:
            self.shown_prompt_ids = list(self.prompt_ids)
        delta = self.params.output_kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.shown_prompt_ids,
            outputs=[a.completion(delta) for a in self.started if not delta or a.shown != a.known],
            finished=self.finished is not None,
            metrics=RequestMetrics(self.arrival, self.scheduled, self.first_token, self.finished),
            cached_tokens=self.answers[0].state.cached_tokens,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            expert_load=None if self.expert_load_LE is None else self.expert_load_LE.tolist(),
        )


def id_set(request_ids: str | Iterable[str]) -> frozenset[str]:
    """The ids as Python's own text: a subclass may compare and hash as it likes."""
    ids = [request_ids] if isinstance(request_ids, str) else request_ids
    return frozenset(str.__str__(request_id) for request_id in ids if isinstance(request_id, str))


def _by_token(token: int, found: TokenLogprobs, spell: Spell) -> TopLogprobs:
    listed = [(token, found.logprob, found.rank), *(each for each in found.top if each[0] != token)]
    return {t: Logprob(value, rank, spell(t)) for t, value, rank in listed}
