"""A request: what a user gets back of it, and what the engine keeps of it while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from grok_engine.sampling.params import RequestOutputKind, SamplingParams
from grok_engine.sampling.sampler import SequenceSampler

from .scheduler import Sequence
from .text import FinishReason, SequenceOutput

TopLogprobs = dict[int, float]  # token id to log probability; the sampled token and the most probable ones


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on `time.monotonic`: when the request came, its first token, its end; None while there is none."""

    arrival: float
    first_token: float | None
    finished: float | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` answers. An end token is in `token_ids`, not in `text`; without tokenizer `text` is "".

    With output_kind DELTA, `text`, `token_ids` and `logprobs` are what is new since the output before.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TopLogprobs] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None  # the stop string, or the token of stop_token_ids, that ended it
    error: str | None = None  # what went wrong, with finish_reason "error"


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The state of a request after a step. `cached_tokens`: of the prompt, found in the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    cached_tokens: int = 0
    prompt_logprobs: list[TopLogprobs | None] | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's n sequences, while it runs."""

    index: int
    tokens: Sequence
    sampler: SequenceSampler
    text: SequenceOutput
    logprobs: list[TopLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    error: str | None = None
    shown: tuple[int, int] = (0, 0)  # characters and tokens that DELTA outputs have shown

    def completion(self, delta: bool) -> CompletionOutput:
        """What there is of it; with `delta`, since the last call."""
        text, ids = self.text.text, self.tokens.output_ids
        text_from, tokens_from = self.shown if delta else (0, 0)
        self.shown = (len(text), len(ids))
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
        )


@dataclass(slots=True, eq=False)
class Request:
    """A request while it runs. It has one answer until its prompt is computed, and then all n."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float
    answers: list[Answer]
    make_answer: Callable[[int, Sequence], Answer]
    first_token: float | None = None
    finished: float | None = None
    prompt_logprobs: list[TopLogprobs | None] | None = None

    @property
    def done(self) -> bool:
        return len(self.answers) == self.params.n and all(a.text.finish_reason for a in self.answers)

    def output(self) -> RequestOutput:
        """What the user gets of it now."""
        delta = self.params.output_kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[answer.completion(delta) for answer in self.answers],
            finished=self.finished is not None,
            metrics=RequestMetrics(self.arrival, self.first_token, self.finished),
            cached_tokens=self.answers[0].tokens.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )
