"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET

from grok_engine import AsyncLLM, CompletionOutput, RequestOutput, SamplingParams

from .answers import Chat, ChatChoice, ChatMessage, FunctionCall, ToolCall
from .errors import ApiError, refusals, rename
from .params import Counter, Scores, chat_options, prompt_logprobs, sampling_params
from .protocol import ChatRequest
from .service import Endpoint, Job
from .streams import event
from .tool_parser import Arguments, CallParser, CallStart, Content
from .tool_styles import ToolStyle, style_of
from .tools import constraint, explain_calls


class ChatCompletions(Endpoint[ChatRequest]):
    """Answers a conversation, by the chat template of the model's files."""

    kind = ChatRequest

    def prepare(self, request: ChatRequest) -> Job[ChatRequest]:
        llm = self.service.llm
        name = self.service.check_model(request.model)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, f"top_logprobs={request.top_logprobs} needs logprobs=true", param="top_logprobs")
        asked = constraint(msgspec.structs.asdict(request), self._style() if request.tools else None)
        own: dict[str, Any] = {
            "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
            "structured": asked.structured,
        }
        if not asked.skip_special_tokens:  # else the marks of calls could not be seen
            own["skip_special_tokens"] = False
        names = {"structured": asked.field}
        defaults = llm.get_default_sampling_params()
        if request.max_completion_tokens is not None:
            own["max_tokens"] = request.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        elif request.max_tokens is None and defaults.max_tokens == SamplingParams().max_tokens:
            own["max_tokens"] = None  # the model's files say nothing: as long as there is room
        if request.top_logprobs is not None:
            names["logprobs"] = "top_logprobs"
        explain = explain_calls if asked.field == "tools" else partial(rename, names=names)
        with refusals(self.kind.__struct_fields__, partial(rename, names=names)):
            params = sampling_params(request, defaults, **own)
        options = chat_options(request, self.service.chat_template)
        prompt = llm.apply_chat_template(request.messages, tools=request.tools or None, **options)
        return Job(request, [prompt], params, _View(request, name, llm, asked.style), explain)

    def _style(self) -> ToolStyle | None:
        """How the model's template spells tool calls."""
        llm = self.service.llm
        template = llm.chat_template(self.service.chat_template, with_tools=True)
        return style_of(template, llm.tokenizer.control.ids if llm.tokenizer else {})


class _Text:
    """What one answer's text is made of as it comes: content and tool calls."""

    def __init__(self, style: ToolStyle | None) -> None:
        self.begun = False  # whether anything of it was sent
        self._parser = None if style is None else CallParser(style)

    def read(self, answer: CompletionOutput) -> ChatMessage:
        """What is new; of each call all that is new in one."""
        if self._parser is None:
            return ChatMessage(content=answer.text)
        events = self._parser.feed(answer.text)
        if answer.finish_reason is not None:
            events += self._parser.finish()
        calls: dict[int, ToolCall] = {}
        content = ""
        for found in events:
            if isinstance(found, Content):
                content += found.text
            elif isinstance(found, CallStart):
                function = FunctionCall(name=found.name)
                calls[found.index] = ToolCall(index=found.index, id=found.id, type="function", function=function)
            elif isinstance(found, Arguments):
                call = calls.setdefault(found.index, ToolCall(index=found.index, function=FunctionCall()))
                call.function.arguments += found.text
        return ChatMessage(content=content or None, tool_calls=list(calls.values()) or UNSET)

    def finish_reason(self, answer: CompletionOutput) -> str | None:
        called = self._parser is not None and self._parser.calls
        return "tool_calls" if called and answer.finish_reason == "stop" else answer.finish_reason


class _View:
    def __init__(self, request: ChatRequest, name: str, llm: AsyncLLM, style: ToolStyle | None) -> None:
        self._request, self._name = request, name
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._counter = Counter(request.stream_options)
        self._scores = Scores(llm, as_ids=request.return_tokens_as_token_ids)
        self._role = "assistant"
        if request.continue_final_message:
            self._role = str(request.messages[-1].get("role", self._role))
        self._style, self._texts = style, dict[int, _Text]()  # by answer

    def _text(self, answer: CompletionOutput) -> _Text:
        if answer.index not in self._texts:
            self._texts[answer.index] = _Text(self._style)
        return self._texts[answer.index]

    def chunks(self, at: int, output: RequestOutput) -> bytes:
        self._counter.add(at, output)
        return b"".join(self._chunk(output, answer) for answer in output.outputs)

    def _chunk(self, output: RequestOutput, answer: CompletionOutput) -> bytes:
        text = self._text(answer)
        delta = text.read(answer)
        choice = self._choice(answer)
        if not text.begun:
            delta.role = self._role
        elif not (delta.content or delta.tool_calls or choice.finish_reason or choice.logprobs or choice.token_ids):
            return b""
        elif delta.content is None:
            delta.content = UNSET
        choice.delta = delta
        chunk = self._made("chat.completion.chunk", [choice])
        if not text.begun and self._request.return_token_ids:
            chunk.prompt_token_ids = output.prompt_token_ids
        text.begun = True
        return event(chunk)

    def last(self) -> bytes:
        return event(self._made("chat.completion.chunk", [], whole=True)) if self._counter.at_end else b""

    def whole(self, outputs: Sequence[RequestOutput]) -> Chat:
        (output,) = outputs
        self._counter.add(0, output)
        choices = []
        for answer in output.outputs:
            message = self._text(answer).read(answer)
            message.role = self._role
            for call in message.tool_calls or ():
                call.index = UNSET
            if message.content is None and not message.tool_calls:
                message.content = ""
            choices.append(self._choice(answer))
            choices[-1].message = message
        made = self._made("chat.completion", choices, whole=True)
        made.prompt_logprobs = prompt_logprobs(output)
        if self._request.return_token_ids:
            made.prompt_token_ids = output.prompt_token_ids
        return made

    def _made(self, kind: str, choices: list[ChatChoice], *, whole: bool = False) -> Chat:
        usage = self._counter.usage() if whole else self._counter.in_chunk()
        return Chat(id=self._id, object=kind, created=self._created, model=self._name, choices=choices, usage=usage)

    def _choice(self, answer: CompletionOutput) -> ChatChoice:
        reason = self._text(answer).finish_reason(answer)
        made = ChatChoice(index=answer.index, finish_reason=reason, stop_reason=answer.stop_reason)
        if self._request.logprobs and answer.logprobs:
            most = self._request.top_logprobs or 0
            made.logprobs = self._scores.chat(answer.logprobs, answer.token_ids, most)
        if self._request.return_token_ids:
            made.token_ids = answer.token_ids
        return made
