"""/v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET

from grok_engine import AsyncLLM, CompletionOutput, Prompt, RequestOutput

from .answers import Completion, CompletionChoice
from .errors import ApiError, rename
from .params import Counter, Scores, prompt_logprobs, sampling_params
from .protocol import CompletionRequest
from .service import Endpoint, Job
from .streams import event
from .structured import structured_output


class Completions(Endpoint[CompletionRequest]):
    """Continues each prompt of a request: a text, token ids, or a list of either."""

    kind = CompletionRequest

    def prepare(self, request: CompletionRequest) -> Job[CompletionRequest]:
        service = self.service
        name = service.check_model(request.model)
        prompts = _prompts(request)
        field, structured = structured_output(msgspec.structs.asdict(request))
        own: dict[str, Any] = {"logprobs": request.logprobs, "structured": structured}
        if request.echo and request.max_tokens == 0:  # the prompt alone, for its log-probabilities
            own["max_tokens"] = 1
        if request.echo and request.logprobs is not None:
            own["prompt_logprobs"] = request.logprobs
        params = sampling_params(request, service.llm.get_default_sampling_params(), **own)
        explain = partial(rename, names={"structured": field, "token id": "prompt has token id"})
        return Job(request, prompts, params, _View(request, name, service.llm), explain)


def _prompts(request: CompletionRequest) -> list[Prompt]:
    given = request.prompt
    if isinstance(given, list):
        kinds = {type(item) for item in given}
        if len(kinds) != 1:
            raise ApiError(
                400, f"prompt={given!r:.80}: expected texts, token ids, or lists of token ids", param="prompt"
            )
        prompts: list[Any] = [given] if kinds == {int} else given
    else:
        prompts = [given]
    if request.add_special_tokens is None:
        return prompts
    return [{"prompt": p, "add_special_tokens": request.add_special_tokens} if isinstance(p, str) else p
            for p in prompts]  # fmt: skip


class _View:
    def __init__(self, request: CompletionRequest, name: str, llm: AsyncLLM) -> None:
        self._request, self._name, self._llm = request, name, llm
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._counter = Counter(request.stream_options)
        self._scores = Scores(llm, as_ids=request.return_tokens_as_token_ids)
        self._offsets: dict[int, int] = {}  # by choice: characters that its tokens have taken so far

    def chunks(self, at: int, output: RequestOutput) -> bytes:
        self._count(at, output)
        made = [self._choice(at, output, answer) for answer in output.outputs]
        return b"".join(event(self._made([choice])) for choice in made if _shows(choice))

    def last(self) -> bytes:
        return event(self._made([], whole=True)) if self._counter.at_end else b""

    def whole(self, outputs: Sequence[RequestOutput]) -> Completion:
        for at, output in enumerate(outputs):
            self._count(at, output)
        return self._made([self._choice(at, o, answer) for at, o in enumerate(outputs) for answer in o.outputs],
                          whole=True)  # fmt: skip

    def _count(self, at: int, output: RequestOutput) -> None:
        self._counter.add(at, output, generated=self._request.max_tokens != 0)

    def _made(self, choices: list[CompletionChoice], *, whole: bool = False) -> Completion:
        usage = self._counter.usage() if whole else self._counter.in_chunk()
        return Completion(id=self._id, created=self._created, model=self._name, choices=choices, usage=usage)

    def _choice(self, at: int, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        request = self._request
        index = at * request.answers + answer.index
        first = index not in self._offsets
        made = CompletionChoice(
            index=index, text=answer.text, finish_reason=answer.finish_reason, stop_reason=answer.stop_reason
        )
        if request.return_token_ids:
            made.token_ids = answer.token_ids
            made.prompt_token_ids = output.prompt_token_ids if first else UNSET
        if request.prompt_logprobs is not None:
            made.prompt_logprobs = prompt_logprobs(output)
        ids, found = answer.token_ids, list(answer.logprobs or ())
        if request.echo and first:
            self._echo(made, output, ids, found)
        elif request.logprobs is not None:
            self._score(made, found, ids)
        self._offsets.setdefault(index, 0)
        return made

    def _echo(self, made: CompletionChoice, output: RequestOutput, ids: list[int], found: list[Any]) -> None:
        """Put the prompt before the answer, or in its place where no token was asked for."""
        prompt = output.prompt
        if prompt is None:
            prompt = self._llm.tokenizer.decode(output.prompt_token_ids) if self._llm.tokenizer else ""
        if self._request.max_tokens == 0:
            made.text, made.finish_reason, ids, found = "", "length", [], []
        made.text = prompt + made.text
        if self._request.logprobs is not None:
            self._score(made, [*(output.prompt_logprobs or ()), *found], [*output.prompt_token_ids, *ids])

    def _score(self, made: CompletionChoice, found: list[Any], ids: list[int]) -> None:
        start = self._offsets.get(made.index)
        at_start = start is None and bool(self._request.echo)
        made.logprobs, self._offsets[made.index] = self._scores.completion(found, ids, start or 0, at_start=at_start)


def _shows(choice: CompletionChoice) -> bool:
    """Whether a chunk has anything new: a token may hold a part of a character alone."""
    return bool(choice.text or choice.finish_reason or choice.logprobs or choice.token_ids)
