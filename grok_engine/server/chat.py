"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from grok_engine import AsyncLLM, CompletionOutput, RequestOutput, SamplingParams

from .errors import ApiError
from .params import Counter, Scores, chat_options, prompt_logprobs, sampling_params
from .protocol import Chat, ChatChoice, ChatMessage, ChatRequest
from .service import Endpoint, Job
from .streams import event


class ChatCompletions(Endpoint[ChatRequest]):
    """Answers a conversation, by the chat template of the model's files."""

    kind = ChatRequest

    def prepare(self, request: ChatRequest) -> Job[ChatRequest]:
        llm = self.service.llm
        name = self.service.check_model(request.model)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, f"top_logprobs={request.top_logprobs} needs logprobs=true", param="top_logprobs")
        own: dict[str, Any] = {"logprobs": (request.top_logprobs or 0) if request.logprobs else None}
        defaults = llm.get_default_sampling_params()
        if request.max_completion_tokens is not None:
            own["max_tokens"] = request.max_completion_tokens
        elif request.max_tokens is None and defaults.max_tokens == SamplingParams().max_tokens:
            own["max_tokens"] = None  # the model's files say nothing: as long as there is room
        params = sampling_params(request, defaults, **own)
        prompt = llm.apply_chat_template(request.messages, **chat_options(request, self.service.chat_template))
        return Job(request, [prompt], params, _View(request, name, llm))


class _View:
    def __init__(self, request: ChatRequest, name: str, llm: AsyncLLM) -> None:
        self._request, self._name = request, name
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._counter = Counter(request.stream_options)
        self._scores = Scores(llm, as_ids=request.return_tokens_as_token_ids)
        self._role = "assistant"
        if request.continue_final_message:
            self._role = str(request.messages[-1].get("role", self._role))
        self._begun: set[int] = set()  # answers that have had a chunk

    def chunks(self, at: int, output: RequestOutput) -> bytes:
        self._counter.add(at, output)
        made = []
        for answer in output.outputs:
            first = answer.index not in self._begun
            choice = self._choice(answer)
            if first or answer.text or choice.finish_reason or choice.logprobs or choice.token_ids:
                choice.delta = ChatMessage(role=self._role if first else UNSET, content=answer.text)
                chunk = self._made("chat.completion.chunk", [choice])
                if first and self._request.return_token_ids:
                    chunk.prompt_token_ids = output.prompt_token_ids
                made.append(event(chunk))
                self._begun.add(answer.index)
        return b"".join(made)

    def last(self) -> bytes:
        return event(self._made("chat.completion.chunk", [], whole=True)) if self._counter.at_end else b""

    def whole(self, outputs: Sequence[RequestOutput]) -> Chat:
        (output,) = outputs
        self._counter.add(0, output)
        choices = []
        for answer in output.outputs:
            choices.append(self._choice(answer))
            choices[-1].message = ChatMessage(role=self._role, content=answer.text)
        made = self._made("chat.completion", choices, whole=True)
        made.prompt_logprobs = prompt_logprobs(output)
        if self._request.return_token_ids:
            made.prompt_token_ids = output.prompt_token_ids
        return made

    def _made(self, kind: str, choices: list[ChatChoice], *, whole: bool = False) -> Chat:
        usage = self._counter.usage() if whole else self._counter.in_chunk()
        return Chat(id=self._id, object=kind, created=self._created, model=self._name, choices=choices, usage=usage)

    def _choice(self, answer: CompletionOutput) -> ChatChoice:
        made = ChatChoice(index=answer.index, finish_reason=answer.finish_reason, stop_reason=answer.stop_reason)
        if self._request.logprobs and answer.logprobs:
            most = self._request.top_logprobs or 0
            made.logprobs = self._scores.chat(answer.logprobs, answer.token_ids, most)
        if self._request.return_token_ids:
            made.token_ids = answer.token_ids
        return made
