"""What a user gets back of a request."""

from __future__ import annotations

from dataclasses import dataclass

from .output import FinishReason

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
