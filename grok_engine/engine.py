"""LLMEngine: serves many requests at once, a step at a time, on the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, EngineConfig, ModelConfig
from .loading.build import build_model
from .loading.fill import Progress
from .loading.resolve import find_model
from .runtime.allocator import PageAllocator
from .runtime.builder import Prompt, RequestBuilder
from .runtime.flatten import take_rows
from .runtime.plan import Entry, StepPlan
from .runtime.request import Answer, Request, RequestOutput
from .runtime.runner import Runner
from .runtime.scheduler import Scheduler, SchedulerStats
from .runtime.text import FinishReason
from .sampling.params import RequestOutputKind, SamplingParams
from .sampling.sampler import Sampled, sample
from .tokenizer.base import Tokenizer
from .tokenizer.load import load_tokenizer

Taker = tuple[Request, Answer]  # an answer that takes a token in this step


class EngineClosedError(RuntimeError):
    """The engine was closed, by its user or by a step that failed, whose exception is the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Requests, sequences and pages now; steps, tokens and seconds by part of a step since the start."""

    requests: int
    scheduler: SchedulerStats
    kv_bytes: int
    steps: int
    prompt_tokens: int  # computed; those of preempted sequences count again
    generated_tokens: int
    seconds: dict[str, float]


class LLMEngine:
    """A decoder loaded from `model`, and the requests it serves. `model` is `tiny`, or a folder: one that holds a
    release's `ckpt-0`, or one that `grok-engine convert` wrote. A `ModelConfig` in its place gets random weights
    and no tokenizer: to measure speed with.

    `options` are the fields of `EngineConfig`. Nothing runs but inside `step`; nothing is shared between two engines.
    A request's tokens are the same, bit for bit, whatever else runs. `progress` is called while loading, with the bytes
    done and the bytes in all. Bad values raise ConfigError, a ValueError; a folder that does not hold the model raises
    CheckpointError with everything that is wrong in it.
    """

    def __init__(
        self, model: str | Path | ModelConfig = "tiny", *, progress: Progress | None = None, **options: Any
    ) -> None:
        folder, architecture = (None, model) if isinstance(model, ModelConfig) else find_model(model)
        c = EngineConfig.of(architecture, options)
        self.tokenizer = None if folder is None else _tokenizer(folder, c)
        self.model, c = build_model(c, folder, progress)
        self.config = c
        self.runner = Runner(self.model, c)
        self.allocator = PageAllocator(self.runner.num_pages, c.page_size, c.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.allocator, max_num_seqs=c.max_num_seqs, max_num_batched_tokens=c.max_num_batched_tokens
        )
        self._requests: dict[str, Request] = {}
        self._by_seq_id: dict[int, Taker] = {}  # of the sequences that the scheduler has
        self._ready: list[RequestOutput] = []  # of aborted requests, for the next step to return
        self._builder = RequestBuilder(c, self.tokenizer)
        self._closed: BaseException | None = None
        self._steps = self._generated = 0
        self._lap_began = 0.0
        self._seconds = dict.fromkeys(("schedule", "forward", "sample", "output"), 0.0)

    # Requests

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. ValueError without a tokenizer for text, or if an id or the length is out of range."""
        return self._builder.encode(prompt)

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue a request; a lower priority number is more urgent. ValueError if it is invalid or can never fit.

        Generation ends with finish_reason "length" at max_tokens or where max_model_len is reached.
        """
        self._check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={params!r} is not a SamplingParams")
        if not isinstance(request_id, str) or request_id in self._requests:
            raise ValueError(f"request_id={request_id!r}: expected text that no unfinished request has")
        request = self._builder.build(request_id, prompt, params, priority)
        self._builder.compile(request)
        first = request.answers[0]
        self.scheduler.add(first.state)
        self._requests[request_id] = request
        self._by_seq_id[first.state.seq_id] = (request, first)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests, at any time; their pages are free at once. The next step returns what they had, with
        finish_reason "abort". Unknown and finished requests are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            request = self._requests.get(request_id)
            if request is not None:
                for answer in request.started:
                    self._finish(answer, "abort")
                self._ready.append(self._output(request, time.monotonic(), ended=True))

    def discard_request(self, request_ids: str | Iterable[str]) -> None:
        """`abort_request`, without the outputs."""
        ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        self.abort_request(ids)
        self._ready = [output for output in self._ready if output.request_id not in ids]

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._requests or self._ready)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; returns an output for every request with something new to show.

        An exception other than a request's own (which ends that request with finish_reason "error") closes the engine.
        """
        self._check_open()
        ready, self._ready = self._ready, []
        try:
            return ready + self._step()
        except BaseException as error:
            self._close(error)
            raise

    def _step(self) -> list[RequestOutput]:
        """Schedule, forward, sample, emit. Scheduler and sequences change in the first and the last alone."""
        self._lap_began = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan.entries:
            return []
        self._lap("schedule")
        takers, logits_BV = self._forward(plan)
        self._lap("forward")
        sampled = sample([answer.sampler for _, answer in takers], logits_BV)
        self._lap("sample")
        outputs = self._emit(plan, takers, sampled)
        self._lap("output")
        return outputs

    def _forward(self, plan: StepPlan) -> tuple[list[Taker], Tensor]:
        """The answers that take a token, and logits_BV, one row for each.

        A row of hidden states predicts the token after its own. Known tokens, of a prompt whose log-probabilities are
        asked for, are scored here; the first unknown one is sampled. At the end of a prompt all n answers sample from
        the same row.
        """
        x_RD = self.runner.forward(plan)
        takers: list[Taker] = []
        rows: list[int] = []  # rows of x_RD to sample from
        sources: list[int] = []  # which of `rows` each taker reads
        end = 0
        for token_ids, start, _, wanted, seq_id in plan.entries:
            if not wanted:
                continue
            end += wanted
            request, answer = taker = self._by_seq_id[seq_id]
            stop, samples = start + len(token_ids), 0
            if stop == answer.state.length:
                samples = 1
                if request.forked:
                    takers.append(taker)
                    sources.append(len(rows))
                else:
                    takers += [(request, each) for each in request.answers]
                    sources += [len(rows)] * len(request.answers)
                rows.append(end - 1)
            if wanted > samples:
                request.score_prompt(stop - wanted, x_RD[end - wanted : end - samples], self.runner.logits)
        if not rows:
            return [], x_RD[:0]
        logits_BV = self.runner.logits(x_RD if len(rows) == len(x_RD) else take_rows(x_RD, rows))
        return takers, logits_BV if len(takers) == len(rows) else take_rows(logits_BV, sources)

    def _emit(self, plan: StepPlan, takers: list[Taker], sampled: list[Sampled]) -> list[RequestOutput]:
        """Commit the step, append the tokens, and finish what they end."""
        self.scheduler.commit(plan)
        for request, answer in takers:
            if not request.forked:  # all its answers are here, the first of them without its token yet
                if answer.index:
                    self.scheduler.fork(request.answers[0].state, answer.state)
                    self._by_seq_id[answer.state.seq_id] = (request, answer)
                request.forked = answer is request.answers[-1]
        now = time.monotonic()
        changed: dict[str, Request] = {}
        for (request, answer), result in zip(takers, sampled, strict=True):
            if request.first_token is None:
                request.first_token = now
            if result.error is not None:
                answer.error = result.error
                self._finish(answer, "error")
            elif answer.accept(result):
                self._drop(answer)
            changed[request.request_id] = request
        self._steps += 1
        self._generated += len(sampled)
        return [
            self._output(request, now, ended=done)
            for request in changed.values()
            if (done := request.done) or request.params.output_kind is not RequestOutputKind.FINAL_ONLY
        ]

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        if answer.text.finish_reason is None:
            answer.text.finish(reason)
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        self.scheduler.finish(answer.state)
        del self._by_seq_id[answer.state.seq_id]

    def _output(self, request: Request, now: float, *, ended: bool) -> RequestOutput:
        if ended:
            request.finished = now
            del self._requests[request.request_id]
        return request.output()

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[part] += now - self._lap_began
        self._lap_began = now

    # The rest

    def logits(self, token_ids: Prompt, *, chunk: int | None = None) -> Tensor:
        """logits_TV in fp32 after each token. `chunk` of them go through the model at once; no result depends on it."""
        self._check_open()
        chunk = self.config.max_num_batched_tokens if chunk is None else chunk
        if not isinstance(chunk, Integral) or chunk < 1:
            raise ValueError(f"chunk={chunk!r} is not a positive integer")
        ids = self.encode(token_ids)
        need = self.allocator.pages_for(len(ids))
        pages = self.allocator.allocate(need)
        if pages is None:
            raise ValueError(f"{len(ids)} tokens need {need} pages, {self.allocator.available} are free")
        try:
            parts = [
                self.runner.logits(self.runner.run([Entry(ids[at : at + chunk], at, pages)]))
                for at in range(0, len(ids), chunk)
            ]
        finally:
            self.allocator.release(pages)
        return torch.cat(parts)

    def stats(self) -> EngineStats:
        """Counts now and since the start."""
        self._check_open()
        return EngineStats(
            requests=len(self._requests),
            scheduler=self.scheduler.stats(),
            kv_bytes=self.runner.num_pages * self.runner.page_bytes,
            steps=self._steps,
            prompt_tokens=self.scheduler.prompt_tokens,
            generated_tokens=self._generated,
            seconds=dict(self._seconds),
        )

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or a step failed."""
        return self._closed is not None

    def close(self) -> None:
        """Drop every request and free weights and pages. Later calls raise EngineClosedError; a second close is no
        error."""
        self._close(None)

    def _close(self, cause: BaseException | None) -> None:
        if self._closed is None:
            self._closed = EngineClosedError("the engine is closed")
            self._closed.__cause__ = cause
            self._requests.clear()
            self._by_seq_id.clear()
            self._ready.clear()
            del self.model, self.runner, self.scheduler, self.allocator

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(str(self._closed)) from self._closed.__cause__


def _tokenizer(folder: Path, config: EngineConfig) -> Tokenizer | None:
    tokenizer = load_tokenizer(folder)
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"more than the model's vocab_size={config.model.vocab_size}"
        )
    return tokenizer
