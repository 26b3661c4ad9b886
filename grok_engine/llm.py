"""LLM: generate text from a model, synchronously."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import EngineConfig
from .engine import LLMEngine
from .errors import EngineBusyError
from .models.decoder import Decoder
from .progress import byte_bar, request_bar
from .runtime.builder import Prompt
from .runtime.request import Request, RequestOutput
from .runtime.text import FinishReason
from .sampling.logprobs import chosen_logprobs
from .sampling.params import RequestOutputKind, SamplingParams
from .tokenizer.base import Tokenizer
from .tokenizer.chat_messages import Message, is_conversation

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .config import EngineOptions
    from .tokenizer.chat import ChatOptions


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One new token, the text that became final with it, and, in the last chunk, why generation ended. The last chunk
    of a request that was aborted has no token."""

    token_id: int | None
    text: str
    finish_reason: FinishReason | None


class LLM:
    """A model in an engine of its own.

    model: `tiny`, which ships with the package, a folder (a release's, a model of the Hugging Face hub, or what
    `grok-engine convert` wrote), a GGUF file, or the name of a model in the hub's local cache. dtype: of the
    computation, bfloat16 or float32. weights: None keeps the checkpoint's format (the release's int8, bit for bit),
    bf16 or fp32 dequantise while loading, int8 and fp8 round, with a scale per output channel, int8_g128, int4_g128 and
    int4 with one per channel and group of at most 128, 128 and 32 columns. The other options are those of
    `EngineConfig`. Loading and generating show a progress bar on a terminal. Errors are those of `LLMEngine`.
    `with LLM(...) as llm:` closes it at the end.

    Threads: calls may come from many at once. One of them steps the engine for all, each waits for its own requests,
    and when the one that steps leaves, another takes over. A call from within a step (a logits processor's) raises
    EngineBusyError.
    """

    def __init__(self, model: str | Path = "tiny", **options: Unpack[EngineOptions]) -> None:
        with byte_bar("loading") as progress:
            self.engine = LLMEngine(model, progress=progress, **options)
        self.config: EngineConfig = self.engine.config  # resolved
        self.tokenizer: Tokenizer | None = self.engine.tokenizer  # without one, prompts and outputs are token ids
        self._ids = count()
        self._lock = threading.RLock()  # of the next two
        self._stepping = 0  # the thread that has the engine; 0: none
        self._waiting: dict[_Call, int] = {}  # the calls that wait for it, and their threads
        self._calls: dict[str, _Call] = {}  # by request

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return self.engine.model

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt, as `LLMEngine.encode` gives them."""
        return self.engine.encode(prompt, add_special_tokens=add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """How requests without SamplingParams sample: as the model's files say, else by the defaults of the class."""
        return self.engine.default_sampling_params

    def apply_chat_template(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation, for `generate` and `stream`. The options and the errors are those of `chat`."""
        return self.engine.apply_chat_template(messages, **options)

    def logits(self, token_ids: Prompt, *, first: int = 0, chunk: int | None = None) -> Tensor:
        """logits_TV in fp32 after each token from `first` on, computed `chunk` tokens at a time; no result depends on
        `chunk`."""
        with self._alone("logits"):
            return self.engine.logits(token_ids, first=first, chunk=chunk)

    def score(self, token_ids: Prompt, *, first: int = 1) -> Tensor:
        """(T − first,) fp32: the log-probability of each token from `first` on, given all those before it.

        T may be one more than max_model_len, since the last token is only scored. The logits of a few rows are in
        memory at once.
        """
        ids = (
            self.encode(token_ids, add_special_tokens=True)
            if isinstance(token_ids, (str, Mapping))
            else list(token_ids)
        )
        if not 1 <= first < len(ids):
            raise ValueError(f"first={first} is not in 1..{len(ids) - 1}: {len(ids)} tokens are given")
        self.encode(ids[-1:])  # checks the last token

        def score(at: int, x_TD: Tensor) -> Tensor:
            skipped = min(max(first - 1 - at, 0), len(x_TD))
            return chosen_logprobs(
                x_TD[skipped:], ids[at + 1 + skipped : at + 1 + len(x_TD)], self.engine.runner.logits
            )

        with self._alone("score"):
            return torch.cat(self.engine.prefill(ids[:-1], score, None))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts (text or token ids) in one batch. Outputs are in the order of the prompts. On a
        terminal, `use_tqdm` shows a progress bar.

        Nothing runs unless all prompts are valid; a ValueError says which one is not. An error of one request is in its
        output, with finish_reason "error"; RuntimeError if it was a step that failed, with its exception as the cause.
        """
        requests = _as_requests(prompts)
        if isinstance(sampling_params, Sequence):
            params = list(sampling_params)
            if len(params) != len(requests):
                raise ValueError(f"{len(params)} sampling_params for {len(requests)} prompts: expected as many, or one")
        else:
            params = [self.engine.default_sampling_params if sampling_params is None else sampling_params]
            params *= len(requests)
        finished: dict[str, RequestOutput] = {}
        call = _Call(self._lock)
        try:
            prepared = []
            for i, (prompt, param) in enumerate(zip(requests, params, strict=True)):
                if isinstance(param, SamplingParams):
                    param = _with_kind(param, RequestOutputKind.FINAL_ONLY)
                try:
                    prepared.append(self.engine.prepare(str(next(self._ids)), prompt, param, 0))
                    self.engine.compile(prepared[-1])
                except ValueError as error:
                    if len(requests) == 1:
                        raise
                    raise ValueError(f"prompts[{i}]: {error}") from error
            for request in prepared:
                self._submit(request, call)
            with request_bar(len(prepared), shown=use_tqdm) as progress:
                while len(finished) < len(prepared):
                    output = self._next(call)
                    _raise_failed_step(output)
                    finished[output.request_id] = output
                    progress(len(finished), len(prepared))
        finally:
            self._end(call)
        return [finished[request.request_id] for request in prepared]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, in one batch.

        A message is OpenAI's: `{"role": "user", "content": "Hello"}`, its content text or parts of type text. Turns are
        written by the model's chat template, or by `chat_template`; the other options are those of `ChatOptions`. A
        control token that a message spells out is text. ValueError for a wrong message, with its index, for a template
        that fails, and for a model without one; otherwise errors are those of `generate`.
        """
        conversations: Any = [messages] if is_conversation(messages) else messages
        prompts: list[Prompt] = []
        for i, conversation in enumerate(conversations):
            if len(conversations) == 1:
                prompts.append(self.apply_chat_template(conversation, **options))
                continue
            try:
                prompts.append(self.apply_chat_template(conversation, **options))
            except ValueError as error:
                raise ValueError(f"conversations[{i}]: {error}") from error
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate token by token. The request is checked at the call; leaving the loop aborts it. RuntimeError if it
        fails."""
        params = self.engine.default_sampling_params if params is None else params
        if isinstance(params, SamplingParams):
            if params.n != 1:
                raise ValueError(f"n={params.n}: a stream has one answer, expected 1")
            params = _with_kind(params, RequestOutputKind.DELTA)
        call = _Call(self._lock)
        self._submit(self.engine.prepare(str(next(self._ids)), prompt, params, 0), call)
        stream = self._stream(call)
        weakref.finalize(stream, self._end, call).atexit = False  # if dropped unread
        return stream

    def _stream(self, call: _Call) -> Iterator[StreamChunk]:
        try:
            finished = False
            while not finished:
                output = self._next(call)
                finished = output.finished
                (answer,) = output.outputs
                if answer.error is not None:
                    raise RuntimeError(answer.error) from answer.cause
                token = answer.token_ids[0] if answer.token_ids else None
                yield StreamChunk(token, answer.text, answer.finish_reason)
        finally:
            self._end(call)

    def _submit(self, request: Request, call: _Call) -> None:
        call.request_ids.append(request.request_id)
        self._calls[request.request_id] = call
        self.engine.submit(request)

    def _next(self, call: _Call) -> RequestOutput:
        """The next output of one call."""
        while not call.outputs:
            with self._having_engine(call, "generate"):
                # another call that needs the engine alone comes first
                while not call.outputs and not any(other.alone for other in list(self._waiting)):
                    self.engine.advance(self._deliver)
        return call.outputs.popleft()

    def _alone(self, name: str) -> AbstractContextManager[None]:
        """The engine between two steps, with the steps of other calls waiting."""
        return self._having_engine(_Call(self._lock, alone=True), name)

    @contextmanager
    def _having_engine(self, call: _Call, name: str) -> Iterator[None]:
        """Wait until no other thread has the engine, or until `call` has an output without it; then run the block."""
        me = threading.get_ident()
        self.engine._turn.check_process(name)
        if self._stepping == me or me in list(self._waiting.values()):  # a processor's, or a signal handler's
            raise EngineBusyError(f"{name}() was called from within another call: expected one call a thread")
        try:
            with self._lock:
                self._waiting[call] = me
                while not call.outputs and (self._stepping or next(self._order()) is not call):
                    call.changed.wait()
                del self._waiting[call]
                if not call.outputs:
                    self._stepping = me
            yield
        finally:
            try:
                self._leave(call, me)
            except BaseException:  # a signal handler's, Ctrl-C say, fell in here
                self._leave(call, me)
                raise

    def _leave(self, call: _Call, me: int) -> None:
        with self._lock:
            self._waiting.pop(call, None)
            if self._stepping == me:
                self._stepping = 0
            if not self._stepping and self._waiting:
                next(self._order()).changed.notify()

    def _order(self) -> Iterator[_Call]:
        """The calls that wait, in the order in which they have the engine."""
        return iter(sorted(self._waiting, key=lambda call: not call.alone))

    def _deliver(self, output: RequestOutput) -> None:
        """Pass an output to its call. The same one again, after an interrupt, changes nothing."""
        call = self._calls.get(output.request_id)
        if call is not None:
            with self._lock:
                if not call.outputs or call.outputs[-1] is not output:
                    call.outputs.append(output)
                call.changed.notify()

    def _end(self, call: _Call) -> None:
        """Forget a call, and abort what is left of its requests. It takes no lock: finalisers run it too."""
        for request_id in call.request_ids:
            self._calls.pop(request_id, None)
        if not self.engine.closed:
            self.engine.discard_request(call.request_ids)

    def sleep(self) -> None:
        """`LLMEngine.sleep`: free weights and pages until `wake_up`."""
        with self._alone("sleep"):
            self.engine.sleep()

    def wake_up(self) -> None:
        """Load again what `sleep` freed."""
        with self._alone("wake_up"):
            self.engine.wake_up()

    def close(self) -> None:
        """Free weights and pages, once the step that runs has ended. Calls that wait raise EngineClosedError."""
        with self._alone("close"):
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Call:
    """One call: its requests, and their outputs that it has not taken. alone: it needs the engine for itself."""

    def __init__(self, lock: threading.RLock, *, alone: bool = False) -> None:
        self.alone = alone
        self.request_ids: list[str] = []
        self.outputs: deque[RequestOutput] = deque()
        self.changed = threading.Condition(lock)


def _raise_failed_step(output: RequestOutput) -> None:
    for answer in output.outputs:
        if answer.cause is not None:
            raise RuntimeError(answer.error) from answer.cause


def _with_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    """A copy with another output kind. A subclass may have an `__init__` of its own, which `replace` would call."""
    found = copy(params)
    object.__setattr__(found, "output_kind", kind)
    return found


def _as_requests(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; arrays and tensors count as the lists they hold."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    values = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(values, Sequence):
        raise ValueError(f"prompts={prompts!r}: expected text, token ids, or a list of them")
    several = not values or isinstance(values[0], (str, Sequence, Mapping)) or getattr(values[0], "ndim", 0) > 0
    return list(values) if several else [values]
