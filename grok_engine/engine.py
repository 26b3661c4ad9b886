"""LLMEngine: many requests at once, a step at a time, in one process and on the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grok_kernels

from .checkpoint.packed import PackedCheckpoint, is_packed_folder
from .checkpoint.xai.reader import XaiCheckpoint
from .config import ActFormat, ConfigError, DType, EngineConfig, ModelConfig
from .loading.convert import load_packed
from .loading.load import Progress, load_weights, resolve_model
from .loading.random import dummy_weights
from .models.decoder import Decoder
from .runtime.allocator import PageAllocator
from .runtime.batch import Work, take_rows
from .runtime.request import Answer, Request, RequestOutput, TopLogprobs
from .runtime.runner import Runner
from .runtime.scheduler import Entry, Schedule, Scheduler, SchedulerStats
from .runtime.scheduler import Sequence as Tokens
from .runtime.text import FinishReason, SequenceOutput, begins_text, check_tokenizer
from .sampling.params import RequestOutputKind, SamplingParams, fresh_seed
from .sampling.sampler import Sampled, SequenceSampler, bad_word_tokens, prompt_logprobs, sample
from .sampling.structured import StructuredCompiler
from .tokenizer.base import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
_DTYPES: dict[DType, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class EngineClosedError(RuntimeError):
    """The engine was closed, by its user or by a step that failed; the cause is chained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Now: requests, sequences and pages. Since the start: steps, tokens, and seconds by part of a step."""

    requests: int
    scheduler: SchedulerStats
    kv_bytes: int
    steps: int
    prompt_tokens: int  # computed, those of preempted sequences again
    generated_tokens: int
    seconds: dict[str, float]


class LLMEngine:
    """A decoder loaded from `model`, and the requests it serves. `model` is `tiny`, or a folder: one that holds a
    release's `ckpt-0`, or one that `grok-engine convert` wrote. A `ModelConfig` in its place gets random weights
    (`dummy`) and no tokenizer: to measure speed with.

    `options` are the fields of `EngineConfig`. Nothing runs but inside `step`; nothing is shared between two engines.
    A request's tokens are the same, bit for bit, whatever else runs. `progress` is called while loading, with the bytes
    done and the bytes in all. Bad values raise ConfigError, a ValueError; a folder that does not hold the model raises
    CheckpointError with everything that is wrong in it.
    """

    def __init__(
        self, model: str | Path | ModelConfig = "tiny", *, progress: Progress | None = None, **options: Any
    ) -> None:
        known = [f.name for f in fields(EngineConfig) if f.name != "model"]
        for option in options:
            if option not in known:
                raise ConfigError(f"unknown option {option!r}: expected one of {', '.join(known)}")
        if isinstance(options.get("dtype"), torch.dtype):
            options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        path = None
        if isinstance(model, ModelConfig):
            name, architecture = model.name, model
        else:
            path = resolve_model(model)
            name, architecture = str(model), ModelConfig.from_pretrained(path)
        self.config = EngineConfig(model=architecture, **options)
        self.tokenizer: Tokenizer | None = load_tokenizer(path) if path else None
        if self.tokenizer and self.tokenizer.vocab_size > self.config.model.vocab_size:
            raise ConfigError(
                f"{path}: the tokenizer has {self.tokenizer.vocab_size} tokens, "
                f"more than the model's vocab_size={self.config.model.vocab_size}"
            )
        device = _device(self.config.device)
        c = self.config
        checkpoint: PackedCheckpoint | XaiCheckpoint | None = None
        if path:
            checkpoint = PackedCheckpoint(path) if is_packed_folder(path) else XaiCheckpoint(path, c.model)
        if c.mmap and not (isinstance(checkpoint, PackedCheckpoint) and device.type == "cpu"):
            raise ConfigError(
                f"mmap=True with model {name!r} on {device}: expected a folder that `grok-engine convert` wrote, "
                "on the CPU"
            )
        activations = _activations(c, checkpoint, device)
        c = self.config = replace(c, activations=activations)
        self.model = Decoder(c.model, _DTYPES[c.dtype], device, c.max_len, activations)
        if isinstance(checkpoint, PackedCheckpoint):
            load_packed(self.model, checkpoint, weights=c.weights, mapped=c.mmap, progress=progress)
        elif checkpoint:
            load_weights(self.model, checkpoint, weights=c.weights, progress=progress)
        else:
            dummy_weights(self.model, c.weights, progress=progress)
        self.runner = Runner(self.model, self.config)
        self.allocator = PageAllocator(self.runner.num_pages, c.page_size, c.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.allocator,
            max_num_seqs=c.max_num_seqs,
            max_num_batched_tokens=c.max_num_batched_tokens,
            max_model_len=c.max_len,
        )
        self._requests: dict[str, Request] = {}
        self._by_tokens: dict[int, tuple[Request, Answer]] = {}
        self._ready: list[RequestOutput] = []  # of aborts, for the next step to return
        self._serial = count()
        self._seq_ids = count()
        self._closed: BaseException | None = None
        self._steps = self._prompt_tokens = self._generated = 0
        self._seconds = dict.fromkeys(("schedule", "forward", "sample", "output"), 0.0)

    # Requests

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: text needs a tokenizer, ids must be in the vocabulary, and it must fit."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {prompt[:40]!r} is text, but the model has no tokenizer: give token ids")
            token_ids = self.tokenizer.encode(prompt)
        else:
            token_ids = list(_as_list(prompt))
        if not token_ids:
            raise ValueError(f"prompt {prompt!r} is empty: expected at least one token")
        vocab, longest = self.config.model.vocab_size, self.config.max_len
        for t in token_ids:
            if not isinstance(t, Integral) or isinstance(t, bool) or not 0 <= t < vocab:
                raise ValueError(f"token id {t!r} is not in the vocabulary: expected an integer in 0..{vocab - 1}")
        if len(token_ids) > longest:
            raise ValueError(f"prompt has {len(token_ids)} tokens, expected at most max_model_len={longest}")
        return [int(t) for t in token_ids]

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue a request; a lower priority number is more urgent. ValueError where it is wrong or can never fit.

        Generation ends with finish_reason "length" at max_tokens or where max_model_len is reached.
        """
        self._check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={params!r} is not a SamplingParams")
        if not isinstance(request_id, str) or request_id in self._requests:
            raise ValueError(f"request_id={request_id!r}: expected text that no unfinished request has")
        prompt_ids = self.encode(prompt)
        room = self.config.max_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"prompt has {len(prompt_ids)} tokens, all of max_model_len: no room for a new one")
        params.check_vocabulary(self.config.model.vocab_size)
        serial = next(self._serial)
        seed = fresh_seed(params) if params.seed is not None or self.config.seed is None else self.config.seed + serial
        make_answer = self._answers(params, prompt_ids, seed % 2**63)
        tokens = Tokens(next(self._seq_ids), prompt_ids, min(params.max_tokens, room), priority)
        tokens.use_cache = params.prompt_logprobs is None  # whose logits all have to be computed
        answer = make_answer(0, tokens)
        self.scheduler.add(tokens)
        request = Request(
            request_id,
            prompt if isinstance(prompt, str) else None,
            prompt_ids,
            params,
            time.monotonic(),
            [answer],
            make_answer,
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt_ids),
        )
        self._requests[request_id] = request
        self._by_tokens[tokens.seq_id] = (request, answer)

    def _answers(self, params: SamplingParams, prompt_ids: list[int], seed: int) -> Callable[[int, Tokens], Answer]:
        """What makes each of a request's answers. Here, or at the first of them, all that is wrong in `params` is found."""
        tokenizer, eos = self.tokenizer, self.config.model.eos_token_ids
        check_tokenizer(params, tokenizer)
        words = bad_word_tokens(params.bad_words, tokenizer.encode) if tokenizer else []
        room = self.config.max_len - len(prompt_ids)
        structured = params.structured
        at_start = tokenizer is not None and begins_text(tokenizer, prompt_ids)

        def make(index: int, tokens: Tokens) -> Answer:
            matcher = self._compiler.matcher(structured, at_start=at_start) if structured else None
            sampler = SequenceSampler(
                params, seed=seed, index=index, prompt=prompt_ids, eos_token_ids=eos, bad_words=words, matcher=matcher
            )
            text = SequenceOutput(params, tokenizer, eos_token_ids=eos, context=prompt_ids, max_tokens=room)
            return Answer(index, tokens, sampler, text)

        return make

    @cached_property
    def _compiler(self) -> StructuredCompiler:
        assert self.tokenizer is not None
        return StructuredCompiler(self.tokenizer, self.config.model.vocab_size, self.config.model.eos_token_ids)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests, at any time; their pages are free at once. The next step returns what they had, with
        finish_reason "abort". Unknown and finished ones are passed over."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            request = self._requests.get(request_id)
            if request is not None:
                for answer in request.answers:
                    self._finish(answer, "abort")
                self._ready += self._outputs([request], time.monotonic(), aborted=True)

    def discard_request(self, request_ids: str | Iterable[str]) -> None:
        """`abort_request` by one who does not want the outputs."""
        ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        self.abort_request(ids)
        self._ready = [output for output in self._ready if output.request_id not in ids]

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return bool(self._requests or self._ready)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; the outputs of every request that has something new to show.

        An exception other than a request's own (which ends that request with finish_reason "error") closes the engine.
        """
        self._check_open()
        ready, self._ready = self._ready, []
        began = time.perf_counter()
        try:
            schedule = self.scheduler.schedule()
            return ready + self._step(schedule, began) if schedule.entries else ready
        except BaseException as error:
            self._close(error)
            raise

    def _step(self, schedule: Schedule, began: float) -> list[RequestOutput]:
        entries = schedule.entries
        self.runner.copy(schedule.copies)
        work = [Work(e.seq.tokens(e.start, e.start + e.count), e.start, e.seq.table) for e in entries]
        scheduled = time.perf_counter()
        x_TD = self.runner.run(work)
        rows, row = [], -1
        for entry in entries:
            row += entry.count
            rows.append(row)
        self._take_prompt_logprobs(entries, rows, x_TD)
        sampling = [i for i, entry in enumerate(entries) if entry.samples]
        logits_BV = None
        if sampling:  # every row does where all of them decode
            last_BD = x_TD if len(sampling) == len(x_TD) else take_rows(x_TD, [rows[i] for i in sampling])
            logits_BV = self.runner.logits(last_BD)
        computed = time.perf_counter()

        self.scheduler.commit(schedule)
        answers: list[Answer] = []
        sources: list[int] = []
        for source, i in enumerate(sampling):
            forked = self._with_siblings(entries[i].seq)
            answers += forked
            sources += [source] * len(forked)
        sampled: list[Sampled] = []
        if logits_BV is not None:
            if len(sources) > len(sampling):
                logits_BV = take_rows(logits_BV, sources)
            with torch.inference_mode():
                sampled = sample([a.sampler for a in answers], logits_BV)
        chosen = time.perf_counter()

        now = time.monotonic()
        changed: dict[str, Request] = {}
        for answer, result in zip(answers, sampled, strict=True):
            request = self._by_tokens[answer.tokens.seq_id][0]
            if request.first_token is None:
                request.first_token = now
            self._accept(answer, result)
            changed[request.request_id] = request
        outputs = self._outputs(changed.values(), now)
        ended = time.perf_counter()
        self._steps += 1
        self._generated += len(sampled)
        self._prompt_tokens += len(x_TD) - sum([e.start >= len(e.seq.prompt_ids) for e in entries])  # who decode
        times = (began, scheduled, computed, chosen, ended)
        for part, start, stop in zip(self._seconds, times, times[1:], strict=False):
            self._seconds[part] += stop - start
        return outputs

    def _with_siblings(self, tokens: Tokens) -> list[Answer]:
        """The answer that these tokens are of and, once their prompt is computed, its n − 1 others."""
        request, answer = self._by_tokens[tokens.seq_id]
        if len(request.answers) == request.params.n:
            return [answer]
        ids = [next(self._seq_ids) for _ in range(request.params.n - 1)]
        for child in self.scheduler.fork(tokens, ids):
            sibling = request.make_answer(len(request.answers), child)
            request.answers.append(sibling)
            self._by_tokens[child.seq_id] = (request, sibling)
        return list(request.answers)

    def _accept(self, answer: Answer, result: Sampled) -> None:
        """One more token, or an error, of one answer."""
        if result.error is not None:
            answer.error = result.error
            self._finish(answer, "error")
            return
        tokens = answer.tokens
        tokens.output_ids.append(result.token)
        if result.logprob is not None:
            answer.logprobs.append(_as_dict(result.token, result.logprob, result.top_logprobs or []))
            answer.cumulative_logprob += result.logprob
        if answer.text.push(result.token).finish_reason:
            self._drop(answer)

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        if answer.text.finish_reason is None:
            answer.text.finish(reason)
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        self.scheduler.finish(answer.tokens)
        del self._by_tokens[answer.tokens.seq_id]

    def _take_prompt_logprobs(self, entries: Sequence[Entry], rows: Sequence[int], x_TD: Tensor) -> None:
        for entry, last in zip(entries, rows, strict=True):
            request, _ = self._by_tokens[entry.seq.seq_id]
            into = request.prompt_logprobs
            if into is None or request.params.prompt_logprobs is None:
                continue
            targets = request.prompt_ids[entry.start + 1 : entry.start + entry.count + 1]  # the row t foretells t + 1
            if not targets or into[entry.start + len(targets)] is not None:
                continue  # known already, from before a preemption
            first = last - entry.count + 1
            step = 64  # bounds the logits held at once
            for at in range(0, len(targets), step):
                part = targets[at : at + step]
                logits_TV = self.runner.logits(x_TD[first + at : first + at + len(part)])
                for i, found in enumerate(prompt_logprobs(logits_TV, part, request.params.prompt_logprobs)):
                    into[entry.start + 1 + at + i] = _as_dict(part[i], found.logprob, found.top)

    # Outputs

    def _outputs(self, requests: Iterable[Request], now: float, *, aborted: bool = False) -> list[RequestOutput]:
        outputs = []
        for request in requests:
            if aborted or request.done:
                request.finished = now
                del self._requests[request.request_id]
            if request.finished or request.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(request.output())
        return outputs

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
                self.runner.logits(self.runner.run([Work(ids[at : at + chunk], at, pages)]))
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
            prompt_tokens=self._prompt_tokens,
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
            self._by_tokens.clear()
            self._ready.clear()
            del self.model, self.runner, self.scheduler, self.allocator

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(str(self._closed)) from self._closed.__cause__


def _as_dict(token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TopLogprobs:
    return {token: logprob, **dict(top)}


def _as_list(prompt: Any) -> Sequence[Any]:
    """Arrays and tensors count as the lists they hold."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Sequence):
        raise ValueError(f"prompt {prompt!r} is neither text nor a list of token ids")
    return values


def _activations(
    config: EngineConfig, checkpoint: PackedCheckpoint | XaiCheckpoint | None, device: torch.device
) -> ActFormat:
    """`config.activations`, resolved by what the weights will be held as."""
    if config.activations is not None:
        return config.activations
    rounded = config.weights == "fp8"
    if isinstance(checkpoint, PackedCheckpoint):  # the release's own format has no e4m3
        rounded = any(info.dtype == "F8_E4M3" for info in checkpoint.tensors)
    return "fp8" if rounded and grok_kernels.multiplies_fp8(device) else "none"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} cannot be used: {reason}") from None
    return device
