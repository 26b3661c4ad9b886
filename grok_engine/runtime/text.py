"""Tokens of one sequence to the text that is handed out, and the decision that it is finished."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from grok_engine.sampling.params import Patterns, SamplingParams
from grok_engine.tokenizer.base import IncrementalDetokenizer, Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]
_CONTEXT = 16  # tokens of a prompt that are read again: a character's bytes are at most 4 of them


class Emitted(NamedTuple):
    """Text that became final, and why the sequence is finished, if it is."""

    text: str
    finish_reason: FinishReason | None


class StopStrings:
    """Cuts a text, as it comes in pieces, where a stop string is first complete.

    Of several that end at the same character the longest counts. So the result does not depend on how the text was
    divided. A character costs one step of an automaton, however many and long the stop strings are. Where the match is
    to be included nothing is held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.stops, self._include = tuple(stops), include
        self._patterns = Patterns(self.stops)
        self._state = 0
        self._held = ""  # the longest suffix that begins a stop string: until it cannot become one
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be handed out now that `text` has come. After a match, nothing more."""
        if self.matched is not None or not text:
            return ""
        if not self.stops:
            return text
        patterns, state = self._patterns, self._state
        joined = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            state = patterns.step(state, character)
            if found := patterns.found[state]:
                self.matched = self.stops[found[0]]
                self._held = ""
                return joined[: place if self._include else place - len(self.matched)]
        self._state = state
        keep = len(joined) - (0 if self._include else patterns.depth[state])
        out, self._held = joined[:keep], joined[keep:]
        return out

    def finish(self) -> str:
        """The rest, when no more text will come."""
        out, self._held = self._held, ""
        return out


class SequenceOutput:
    """The text of one sequence as its tokens come, with `token_ids`, all of them, and `finish_reason`.

    `push` and `finish` return what is new; it concatenates to the decoded text, cut at the first stop string. The
    text of an end token is left out; that of a stop token is not if include_stop_str_in_output is set.

    `stop_reason` is the stop string or the token of `stop_token_ids` that ended it, None for the model's own end
    token. context: the prompt, if the output goes on in its text, keeping a leading space that a tokenizer drops at a
    start. Without a tokenizer the text is empty. max_tokens: fewer than the request's, where there is no room.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Collection[int] = (),
        context: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> None:
        check_tokenizer(params, tokenizer)
        self.params = params
        self.max_tokens = params.max_tokens if max_tokens is None else min(max_tokens, params.max_tokens)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._ends = params.end_token_ids(eos_token_ids)
        self._parts: list[str] = []
        self._detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer else None
        if self._detokenizer:
            for token in context[-_CONTEXT:]:
                self._detokenizer.push(token)
        self._stops = StopStrings(params.stop_strings(), include=params.include_stop_str_in_output)

    @property
    def text(self) -> str:
        """All that was handed out so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token: int) -> Emitted:
        """Take a new token."""
        assert self.finish_reason is None, f"finished by {self.finish_reason}"
        self.token_ids.append(token)
        if token in self._ends:
            keeps = self.params.include_stop_str_in_output
            text = self._take(token) if keeps else ""
            if self._stops.matched is None:  # which the stop token's own text may have completed
                self.stop_reason = token if token in self.params.stop_token_ids else None
            return Emitted(self._emit(text) + self.finish("stop"), "stop")
        text = self._emit(self._take(token))
        if self._stops.matched is not None:
            self.stop_reason, self.finish_reason = self._stops.matched, "stop"
        elif len(self.token_ids) >= self.max_tokens:
            text += self.finish("length")
        return Emitted(text, self.finish_reason)

    def finish(self, reason: FinishReason = "abort") -> str:
        """End it here: the text that was held back. A stop string that it completes still cuts it."""
        if self.finish_reason is not None:
            return ""
        text = ""
        if self._detokenizer and self._stops.matched is None:
            text = self._search(self._detokenizer.finish()) + self._stops.finish()
        self.finish_reason = reason
        if self._stops.matched is not None:
            self.stop_reason, self.finish_reason = self._stops.matched, "stop"
        return self._emit(text)

    def _take(self, token: int) -> str:
        return self._search(self._detokenizer.push(token)) if self._detokenizer else ""

    def _search(self, text: str) -> str:
        return self._stops.push(text) if len(self.token_ids) > self.params.min_tokens else text

    def _emit(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


def check_tokenizer(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    """ValueError if the request needs a tokenizer and there is none."""
    if tokenizer is None:
        for name in ("stop", "bad_words", "structured"):
            if value := getattr(params, name):
                raise ValueError(f"{name}={value!r} needs text, but the model has no tokenizer: expected none")


def begins_text(tokenizer: Tokenizer, context: Sequence[int]) -> bool:
    """Whether an output after this context stands at the start of a text: `at_start` of a structured output's matcher.

    That is, whether no token of the context has any text.
    """
    at_start = True
    for token in context[-_CONTEXT:]:
        at_start = tokenizer.surface(token, at_start).at_start
    return at_start
