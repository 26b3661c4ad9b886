"""LLMEngine: serves many requests at once, a step at a time, on the caller's thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import EngineConfig, ModelConfig, described, shown
from .errors import EngineAsleepError, EngineBusyError, EngineClosedError, QueueFullError
from .loading.build import build_model, build_tokenizer
from .loading.fill import Progress
from .loading.generation import default_sampling_params
from .loading.resolve import find_model
from .log import QuietLogger
from .runtime.allocator import PageAllocator
from .runtime.builder import Prompt, RequestBuilder
from .runtime.expert_load import read_routed
from .runtime.flatten import take_rows
from .runtime.memory import fit
from .runtime.meter import Meter
from .runtime.plan import Entry, StepPlan
from .runtime.request import Answer, Request, RequestOutput, id_set
from .runtime.runner import Runner
from .runtime.scheduler import Scheduler
from .runtime.sequence import Status
from .runtime.stats import EngineStats
from .runtime.text import FinishReason
from .runtime.turn import Turn
from .sampling.params import RequestOutputKind, SamplingParams
from .sampling.sampler import Sampled, sample

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .config import EngineOptions
    from .tokenizer.chat import ChatOptions, Message

logger = QuietLogger(__name__)

Taker = tuple[Request, Answer]  # an answer that takes a token in this step


class LLMEngine:
    """A decoder loaded from `model`, and the requests it serves. `model` is `tiny`, a folder (a release's, a model of
    the Hugging Face hub, or what `grok-engine convert` wrote), a GGUF file, or the name of a model in the hub's local
    cache. A `ModelConfig` in its place gets random weights and no tokenizer: to measure speed with.

    `options` are the fields of `EngineConfig`. Nothing runs but inside `step`; nothing is shared between two engines.
    A request's tokens are the same, bit for bit, whatever else runs. `progress` is called while loading, with the bytes
    done and the bytes in all. Bad values raise ConfigError, a ValueError; a folder that does not hold the model raises
    CheckpointError with everything that is wrong in it.

    Threads: requests may be added, aborted and counted from any thread, at any time, from within a step too. `step`,
    `logits`, `sleep`, `wake_up` and `close` are for one thread at a time: a second call, or one from within a step,
    raises EngineBusyError and changes nothing. In a fork of the process they raise RuntimeError.
    """

    def __init__(
        self, model: str | Path | ModelConfig = "tiny", *, progress: Progress | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:  # fmt: skip
        folder, architecture = (None, model) if isinstance(model, ModelConfig) else find_model(model)
        self._folder: Path | None = None if folder is None else folder.absolute()  # `wake_up` finds it after a chdir
        self.tokenizer, self.config = build_tokenizer(self._folder, EngineConfig.of(architecture, options))
        self.default_sampling_params = default_sampling_params(self._folder, self.config.generation_config)
        self._turn = Turn(self._reset)
        self._closed: EngineClosedError | None = None
        self.asleep = False
        self._load(progress, cut=options.get("max_model_len") is None)
        c, pages = self.config, self.runner.num_pages
        self.allocator = PageAllocator(pages, c.page_size, c.enable_prefix_caching)
        limits = {"max_num_seqs": c.max_num_seqs, "max_num_batched_tokens": c.max_num_batched_tokens}
        self.scheduler = Scheduler(self.allocator, **limits)
        self._builder = RequestBuilder(c, self.tokenizer, pages * c.page_size, self._folder)
        self._requests: dict[str, Request] = {}  # unfinished ones
        self._fresh: dict[str, None] = {}  # those of them that have no token yet
        self._by_seq_id: dict[int, Taker] = {}  # of the sequences that the scheduler has
        self._ready: deque[RequestOutput] = deque()  # for `step` to return
        self._meter = Meter(c)

    def _load(self, progress: Progress | None, *, cut: bool) -> None:
        began = time.perf_counter()
        self.model, self.config = build_model(self.config, self._folder, progress, partial(fit, cut=cut))
        self.runner = Runner(self.model, self.config)
        c, seconds = self.config, time.perf_counter() - began
        text = "loaded %s in %.1f s: %d KV pages of %d tokens, %s"
        logger.info(text, self._folder or c.model.name, seconds, self.runner.num_pages, c.page_size, c)

    # Requests

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt; of a text its own alone, or with BOS and EOS around it as every other call puts them.
        ValueError without a tokenizer for text, or if an id or the length is out of range."""
        return self._builder.encode(prompt, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation, for `add_request`. The options and the errors are those of `LLM.chat`."""
        return self._builder.apply_chat_template(messages, **options)

    def chat_template(self, wanted: str | None = None, *, with_tools: bool = False) -> str:
        """The Jinja text that writes conversations, of the options of `LLM.chat`. ValueError where there is none."""
        return self._builder.chat_template(wanted, with_tools=with_tools)

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queue a request; a lower priority number is more urgent. ValueError if it is invalid or can never fit,
        QueueFullError if `max_waiting` requests wait already.

        Generation ends with finish_reason "length" at max_tokens or where max_model_len is reached.
        """
        request = self.prepare(request_id, prompt, params, priority)
        if self.num_waiting >= self.config.max_waiting:
            raise QueueFullError(
                f"request {request_id!r}: {self.num_waiting} requests wait, expected fewer than "
                f"max_waiting={self.config.max_waiting}"
            )
        self.submit(request)

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams | None, priority: int) -> Request:
        """A request for `submit`, with everything checked but its grammar. Takes no longer than encoding the prompt."""
        self._check_open()
        params = self.default_sampling_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={shown(params)} is not a SamplingParams")
        if not isinstance(request_id, str):
            raise ValueError(f"request_id={shown(request_id)} is not text")
        request_id = str.__str__(request_id)  # a subclass may compare and hash as it likes
        if request_id in self._requests:
            raise ValueError(f"request_id={shown(request_id)} is in use: expected one that no unfinished request has")
        request = self._builder.build(request_id, prompt, params, priority)
        self.scheduler.check_fits(request.answers[0].state)
        return request

    def compile(self, request: Request) -> None:
        """Compile the request's grammar, if any, on this thread. ValueError if it is invalid or takes too long."""
        self._builder.compile(request)

    def submit(self, request: Request) -> None:
        """Queue a prepared request, compiling its grammar first. ValueError if an unfinished one has its id."""
        self._turn.check_process("add_request")
        self.compile(request)
        self._check_open()
        logger.debug(
            "request %r: %d prompt tokens, priority %d, %s",
            request.request_id, len(request.prompt_ids), request.answers[0].state.priority, request.params,
        )  # fmt: skip
        try:
            if self._requests.setdefault(request.request_id, request) is not request:
                raise ValueError(
                    f"request_id={shown(request.request_id)} is in use: expected one that no unfinished request has"
                )
            self._fresh[request.request_id] = None
            self._turn.ask(self._add, request)
        except BaseException:
            if self._requests.get(request.request_id) is request:  # interrupted
                self.discard_request(request.request_id)
            raise

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests: now, or at the end of the step that runs. Their pages are free then, and the next outputs
        hold what they had, with finish_reason "abort". Unknown and finished requests are ignored. It never waits, so
        it may be called from anywhere: a processor, a signal handler, a finaliser."""
        self._turn.ask(self._abort, id_set(request_ids))

    def discard_request(self, request_ids: str | Iterable[str]) -> None:
        """`abort_request`, without the outputs."""
        self._turn.ask(self._discard, id_set(request_ids))

    @property
    def num_waiting(self) -> int:
        """Requests that have no token yet."""
        return len(self._fresh)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to compute or to return."""
        return bool(self._requests or self._ready or self._turn.asked)

    def _add(self, request: Request) -> None:
        first = request.answers[0]
        if first.state.status is Status.NEW and request.finished is None:  # else it was aborted meanwhile
            self._by_seq_id[first.state.seq_id] = (request, first)
            self.scheduler.add(first.state)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                logger.info("request %r: aborted", request_id)
                self._end(request, "abort")

    def _discard(self, request_ids: Collection[str]) -> None:
        self._abort(request_ids)
        for output in [output for output in self._ready if output.request_id in request_ids]:
            self._ready.remove(output)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; returns an output for every request with something new to show.

        An exception costs the requests of the step, which end with finish_reason "error"; the others go on. One that is
        no Exception (KeyboardInterrupt, say) is raised once they have ended, and the next step returns their outputs.
        Where a failure left the device unusable the engine closes, with EngineClosedError.
        """
        outputs: list[RequestOutput] = []
        try:
            self.advance(outputs.append)
        except BaseException:  # interrupted while it hands out
            self._ready.extendleft(o for o in reversed(outputs) if not any(o is left for left in self._ready))
            raise
        return outputs

    def advance(self, take: Callable[[RequestOutput], None]) -> None:
        """`step`, handing out one output after the other. An output that `take` did not return from comes again."""
        with self._turn("step"):
            self._check_open()
            try:
                self._turn.settle()
                self._step()
                self._turn.settle()
            except BaseException as error:
                if not self._turn.intact:
                    self._reset(error)
                if not isinstance(error, Exception):
                    raise
                self._check_open()
            while self._ready:
                take(self._ready[0])
                self._ready.popleft()

    def _step(self) -> None:
        """Schedule, forward, sample, emit. Scheduler and sequences change in the first and the last alone: where the
        two between them fail, the requests of the plan end, and the others are untouched."""
        self._meter.begin()
        self._turn.intact = False
        plan = self.scheduler.schedule()
        try:
            self._turn.intact = True
            if not plan.entries:
                return
            if self._fresh:
                self._meter.start(self._by_seq_id[entry.seq_id][0] for entry in plan.entries)
            self._meter.lap("schedule")
            routed: list[Tensor] | None = [] if self.config.expert_load else None
            takers, logits_RV, sources = self._forward(plan, routed)
            self._meter.lap("forward")
            sampled = self._sample(takers, logits_RV, sources)
            experts_LTA = read_routed(routed) if routed else None
            self._meter.lap("sample")
        except BaseException as error:
            self._give_up(plan, error)
            raise
        self._turn.intact = False
        if experts_LTA is not None:
            self._meter.load.count(plan.entries, experts_LTA, self._by_seq_id)
        self._emit(plan, takers, sampled)
        self._turn.intact = True
        self._meter.lap("output")

    def _forward(self, plan: StepPlan, routed: list[Tensor] | None) -> tuple[list[Taker], Tensor, list[int]]:
        """The answers that take a token, logits_RV, and the row of them that each answer samples from.

        A row of hidden states predicts the token after its own. Known tokens, of a prompt whose log-probabilities are
        asked for, are scored here; the first unknown one is sampled. At the end of a prompt all n answers sample from
        the same row.
        """
        x_RD = self.runner.forward(plan, routed)
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
            return [], x_RD[:0], []
        return takers, self.runner.logits(x_RD if len(rows) == len(x_RD) else take_rows(x_RD, rows)), sources

    def _sample(self, takers: list[Taker], logits_RV: Tensor, sources: list[int]) -> list[Sampled]:
        """A token for each taker. A row of logits that n answers share is repeated for `max_num_seqs` of them at a
        time: memory does not grow with n."""
        samplers = [answer.sampler for _, answer in takers]
        if len(takers) == len(logits_RV):
            return sample(samplers, logits_RV)
        sampled: list[Sampled] = []
        for at in range(0, len(takers), size := self.config.max_num_seqs):
            sampled += sample(samplers[at : at + size], take_rows(logits_RV, sources[at : at + size]))
        return sampled

    def _emit(self, plan: StepPlan, takers: list[Taker], sampled: list[Sampled]) -> None:
        """Commit the step, append the tokens, and finish what they end."""
        self.scheduler.commit(plan)
        for request, answer in takers:
            if not request.forked:  # all its answers are here, the first of them without its token yet
                if answer.index:
                    self.scheduler.fork(request.answers[0].state, answer.state)
                    self._by_seq_id[answer.state.seq_id] = (request, answer)
                    answer.counted = request.answers[0].counted
                request.forked = answer is request.answers[-1]
        now = time.monotonic()
        changed: dict[str, Request] = {}
        for (request, answer), result in zip(takers, sampled, strict=True):
            if request.first_token is None:
                request.first_token = now
                self._meter.first_token(request)
                self._fresh.pop(request.request_id, None)
            if result.error is not None:
                logger.warning("request %r: %s", request.request_id, result.error)
                answer.error = result.error
                self._finish(answer, "error")
            elif answer.accept(result):
                self._drop(answer)
            changed[request.request_id] = request
        self._meter.step(sum([len(entry.token_ids) for entry in plan.entries]), takers, now)
        for request in changed.values():
            if request.done:
                self._retire(request, now)
            elif request.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                self._ready.append(request.output())

    # The end of a request

    def _end(self, request: Request, reason: FinishReason, cause: BaseException | None = None) -> None:
        """End all of a request's answers that are not finished, and queue its last output."""
        for answer in request.started:
            if cause is not None and answer.text.finish_reason is None:
                answer.cause = cause
                answer.error = f"the step failed: {described(cause)}"
            self._finish(answer, reason)
        self._retire(request, time.monotonic())

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        if answer.text.finish_reason is None:
            answer.text.finish(reason)
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        if answer.state.status is not Status.NEW:
            self.scheduler.finish(answer.state)
        self._by_seq_id.pop(answer.state.seq_id, None)

    def _retire(self, request: Request, now: float) -> None:
        if request.finished is None:
            request.finished = now
            self._meter.finish(request)
            self._ready.append(request.output())
            logger.debug("request %r: %s", request.request_id, [a.text.finish_reason for a in request.answers])
        self._fresh.pop(request.request_id, None)
        del self._requests[request.request_id]

    # Failures

    def _give_up(self, plan: StepPlan, error: BaseException) -> None:
        """End the requests of a plan that failed between `schedule` and `commit`. Pages and prefix index stay."""
        self._turn.intact = False
        logger.ended(error, "a step failed, and its %d sequences end with it", len(plan.entries))
        for entry in plan.entries:
            request, _ = self._by_seq_id.get(entry.seq_id, (None, None))
            if request is not None:
                self._end(request, "error", error)
        self.scheduler.commit(plan)
        self._turn.intact = True
        if not self.runner.recover():
            self._close(f"the device failed: {error}", error)

    def _reset(self, error: BaseException) -> None:
        """Where a change was interrupted half-way: end the requests that the scheduler has, and empty all pages."""
        added = {id(argument) for _, argument in self._turn.asked}  # requests that are still to be added
        ended = [request for request in list(self._requests.values()) if id(request) not in added]
        logger.ended(error, "pages were left half changed: %d requests end", len(ended))
        self.allocator.reset()
        self.scheduler.reset()
        self._by_seq_id.clear()
        for request in list(self._requests.values()):
            for answer in request.answers:
                answer.state.status = Status.NEW  # the scheduler knows it no longer
        for request in ended:
            self._end(request, "error", error)
        self._turn.intact = True

    # The rest

    def logits(self, token_ids: Prompt, *, first: int = 0, chunk: int | None = None) -> Tensor:
        """logits_TV in fp32 after each token from `first` on. `chunk` of them go through the model at once; no result
        depends on it."""
        return torch.cat(self.prefill(token_ids, lambda at, x: self.runner.logits(x[max(first - at, 0) :]), chunk))

    def prefill(self, token_ids: Prompt, take: Callable[[int, Tensor], Tensor], chunk: int | None) -> list[Tensor]:
        """Run one sequence beside the requests; what `take` makes of the first position of each chunk of tokens, and
        of their hidden states, which the next chunk may overwrite."""
        with self._turn("logits"):
            self._check_open()
            chunk = self.config.max_num_batched_tokens if chunk is None else chunk
            if not isinstance(chunk, Integral) or chunk < 1:
                raise ValueError(f"chunk={shown(chunk)} is not a positive integer")
            ids = self.encode(token_ids, add_special_tokens=True)
            need = self.allocator.pages_for(len(ids))
            self._turn.settle()
            self._turn.intact = False
            pages = self.allocator.allocate(need)
            try:
                self._turn.intact = True
                if pages is None:
                    raise ValueError(f"{len(ids)} tokens need {need} pages, {self.allocator.available} are free")
                chunks = ((at, ids[at : at + chunk]) for at in range(0, len(ids), chunk))
                return [take(at, self.runner.run([Entry(part, at, pages)])) for at, part in chunks]
            finally:
                self._turn.intact = False
                self.allocator.release(pages or [])
                self._turn.intact = True

    def stats(self) -> EngineStats:
        """Counts now and since the start."""
        self._check_open()
        return EngineStats(
            requests=len(self._requests), scheduler=self.scheduler.stats(),
            kv_bytes=self.runner.num_pages * self.runner.page_bytes, prompt_tokens=self.scheduler.prompt_tokens,
            **self._meter.read(),
        )  # fmt: skip

    def sleep(self) -> None:
        """Free weights and pages, the prefix cache included; `wake_up` loads them again. EngineBusyError while requests
        are unfinished. Asleep, the engine refuses other calls with EngineAsleepError."""
        with self._turn("sleep"):
            self._check_open()
            self._turn.settle()
            if self.has_unfinished_requests():
                raise EngineBusyError(f"sleep() with {len(self._requests)} unfinished requests: expected none")
            # as many pages again, whatever memory is free then
            self.config = replace(self.config, num_pages=self.runner.num_pages, kv_memory=None)
            self.asleep = True  # first: freeing takes long, and may be interrupted
            self._free()
            logger.info("asleep")

    def wake_up(self) -> None:
        """Load what `sleep` freed. Awake, it does nothing. An error of loading leaves the engine asleep."""
        with self._turn("wake_up"):
            if self.asleep:
                self._load(None, cut=False)
                self.asleep = False
            self._check_open()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the device failed."""
        return self._closed is not None

    def close(self) -> None:
        """Drop every request and free weights and pages. Later calls raise EngineClosedError; a second close is no
        error."""
        with self._turn("close"):
            self._close("the engine is closed", None)

    def _close(self, what: str, cause: BaseException | None) -> None:
        if self._closed is None:
            self._closed = EngineClosedError(what)
            self._closed.__cause__ = cause
            self.asleep = False
            for state in (self._requests, self._fresh, self._by_seq_id, self._ready, self._turn.asked):
                state.clear()
            logger.info("closed")
        self._free()  # again, if the first time was interrupted

    def _free(self) -> None:
        self.allocator.reset()
        self.scheduler.reset()
        for name in ("model", "runner"):
            self.__dict__.pop(name, None)
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(str(self._closed)) from self._closed.__cause__
        if self.asleep:
            raise EngineAsleepError("the engine is asleep: wake_up() loads it again")
