"""SamplingParams of a request, and the parts of answers that completions and chat share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypedDict

from msgspec import UNSET, UnsetType

from grok_engine import AsyncLLM, Logprob, RequestOutput, RequestOutputKind, SamplingParams

from .protocol import (
    ChatLogprobs,
    ChatRequest,
    CompletionLogprobs,
    GenerationRequest,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    StreamOptions,
    TokenizeRequest,
    TokenLogprob,
    TopLogprob,
    Usage,
)

_LEAST = -9999.0  # JSON has no infinity
_SAME_NAMES = tuple({f.name for f in fields(SamplingParams)} & set(GenerationRequest.__struct_fields__))


def sampling_params(request: GenerationRequest, defaults: SamplingParams, **others: Any) -> SamplingParams:
    """What the request asks for, else the model's defaults. others: what is named differently there."""
    given = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return replace(defaults, **{**given, **others}, output_kind=kind)


class ChatOptions(TypedDict, total=False):
    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]


class Counter:
    """Counts the tokens of one request as its outputs come, in whatever order its prompts are answered."""

    def __init__(self, options: StreamOptions | None) -> None:
        self.at_end = options is not None and bool(options.include_usage)
        self.always = options is not None and bool(options.continuous_usage_stats)
        self._prompts: dict[int, tuple[int, int]] = {}
        self._generated = 0

    def add(self, at: int, output: RequestOutput, *, generated: bool = True) -> None:
        """generated: whether tokens of answers count, or were computed for the prompt's sake."""
        if at not in self._prompts:
            self._prompts[at] = len(output.prompt_token_ids), output.cached_tokens
        for answer in output.outputs:
            self._generated += len(answer.token_ids) if generated else 0

    def usage(self) -> Usage:
        prompt, cached = (sum(each) for each in zip(*self._prompts.values(), strict=True)) if self._prompts else (0, 0)
        return Usage(prompt, self._generated, prompt + self._generated, PromptTokensDetails(cached))

    def in_chunk(self) -> Usage | UnsetType | None:
        """What a chunk has: OpenAI writes null in all but the last, if the usage was asked for."""
        return self.usage() if self.always else None if self.at_end else UNSET


class Scores:
    """Log-probabilities as clients read them."""

    def __init__(self, llm: AsyncLLM, *, as_ids: bool | None) -> None:
        self._tokenizer, self._as_ids = llm.tokenizer, as_ids

    def name(self, token: int, found: Logprob) -> str:
        return f"token_id:{token}" if self._as_ids or found.decoded_token is None else found.decoded_token

    def completion(
        self, tokens: Iterable[dict[int, Logprob] | None], ids: list[int], offset: int, *, at_start: bool
    ) -> tuple[CompletionLogprobs, int]:
        """OpenAI's four lists, and the offset behind them. None stands for the first token of a prompt, which has no
        probability. offset: in the text, of the first token. at_start: where some tokenizers drop a leading space."""
        made = CompletionLogprobs([], [], [], [])
        for token, found in zip(ids, tokens, strict=True):
            text = ""
            if self._tokenizer is not None:
                text, data, _, at_start = self._tokenizer.surface(token, at_start)
                text += data.decode(errors="replace")
            made.tokens.append(self.name(token, Logprob(0.0, 1, text) if found is None else found[token]))
            made.token_logprobs.append(None if found is None else max(found[token].logprob, _LEAST))
            made.top_logprobs.append(None if found is None else self._by_name(found))
            made.text_offset.append(offset)
            offset += len(text)
        return made, offset

    def _by_name(self, found: dict[int, Logprob]) -> dict[str, float]:
        """Of tokens with one name the most probable counts."""
        named: dict[str, float] = {}
        for token, each in sorted(found.items(), key=lambda item: item[1].rank):
            named.setdefault(self.name(token, each), max(each.logprob, _LEAST))
        return named

    def chat(self, tokens: Iterable[dict[int, Logprob]], ids: list[int], most: int) -> ChatLogprobs:
        """most: how many of the most probable tokens are listed with each."""
        return ChatLogprobs([self._chat_token(token, found, most) for token, found in zip(ids, tokens, strict=True)])

    def _chat_token(self, token: int, found: dict[int, Logprob], most: int) -> TokenLogprob:
        ranked = sorted(found.items(), key=lambda item: item[1].rank)
        top = [TopLogprob(**self._entry(each, f)) for each, f in ranked if f.rank <= most]
        return TokenLogprob(**self._entry(token, found[token]), top_logprobs=top[:most])

    def _entry(self, token: int, found: Logprob) -> dict[str, Any]:
        return {
            "token": self.name(token, found),
            "logprob": max(found.logprob, _LEAST),
            "bytes": list(self._bytes(token)),
        }

    def _bytes(self, token: int) -> bytes:
        if self._tokenizer is None:
            return b""
        surface = self._tokenizer.surface(token, False)
        return surface.data or surface.text.encode()


def prompt_logprobs(output: RequestOutput) -> PromptLogprobs | UnsetType:
    """vLLM's form, by token id; null for the first token."""
    if output.prompt_logprobs is None:
        return UNSET
    return [
        None if found is None else {t: PromptLogprob(max(f.logprob, _LEAST), f.rank, f.decoded_token)
                                    for t, f in found.items()}
        for found in output.prompt_logprobs
    ]  # fmt: skip


def chat_options(request: ChatRequest | TokenizeRequest, chat_template: str | None) -> ChatOptions:
    """The options of a conversation's template that a request gives."""
    options: ChatOptions = {"chat_template": chat_template}
    if request.add_generation_prompt is not None:
        options["add_generation_prompt"] = request.add_generation_prompt
    if request.continue_final_message is not None:
        options["continue_final_message"] = request.continue_final_message
        if request.continue_final_message and request.add_generation_prompt is None:
            options["add_generation_prompt"] = False
    if request.chat_template_kwargs is not None:
        options["chat_template_kwargs"] = request.chat_template_kwargs
    return options
