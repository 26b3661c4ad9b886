"""The text of one sequence as its tokens come, stop strings, and the decision that the sequence is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from grok_engine.sampling.automaton import Automaton
from grok_engine.sampling.rules import SamplingRules
from grok_engine.tokenizer.base import IncrementalDetokenizer, Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]
_CONTEXT = 16  # prompt tokens to decode again before the output: a character has at most 4 byte tokens


class StopStrings:
    """Cuts a text that comes in pieces where a stop string is first complete.

    Of several that end at the same character the longest counts, so the result does not depend on how the text was
    divided. With `include` the match stays in the text, and nothing is held back. stops: None if there are none.
    """

    def __init__(self, stops: Automaton[str] | None, *, include: bool = False) -> None:
        self._stops, self._include = stops, include
        self._state = 0
        self._tail = ""  # the longest suffix that begins a stop string; held back, unless with `include`
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that became final with `text`; nothing after a match."""
        stops, state = self._stops, self._state
        if stops is None:
            return text
        if self.matched is not None:
            return ""
        joined = self._tail + text
        for end, character in enumerate(text, len(self._tail) + 1):
            state = stops.step(state, ord(character))
            self.matched = next(stops.found(state), None)
            if self.matched is not None:
                self._tail = ""
                return joined[: end if self._include else end - len(self.matched)]
        self._state = state
        if self._include:
            return text
        final = len(joined) - stops.depth[state]
        self._tail = joined[final:]
        return joined[:final]

    def finish(self) -> str:
        """The text held back, when no more will come."""
        out, self._tail = self._tail, ""
        return out


class SequenceText:
    """The text of one sequence as its tokens come, and its `finish_reason`.

    `text` is what is final of the decoded text, cut at the first stop string. The text of an end token is left out,
    unless include_stop_str_in_output is set. `stop_reason` is the stop string or the token of `stop_token_ids` that
    ended the sequence, None for the model's own end token.

    output_ids: the tokens generated so far, a list that its owner appends to before `push` and that is only read here.
    context: the prompt that the output continues, so that it keeps a leading space, which a tokenizer drops at the
    start of a text. max_tokens: fewer than the request's, if the context leaves no room. spelled: the text of control
    tokens, by id, which are left out otherwise. Without a tokenizer the text is empty.
    """

    def __init__(
        self,
        rules: SamplingRules,
        tokenizer: Tokenizer | None,
        output_ids: Sequence[int],
        *,
        context: Sequence[int] = (),
        max_tokens: int | None = None,
        spelled: Mapping[int, str] | None = None,
    ) -> None:
        params = self.params = rules.params
        self.max_tokens = min((n for n in (max_tokens, params.max_tokens) if n is not None), default=None)
        self.output_ids = output_ids
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._ends = rules.ends
        self._detokenizer = IncrementalDetokenizer(tokenizer, spelled) if tokenizer else None
        if self._detokenizer:
            for token in context[-_CONTEXT:]:
                self._detokenizer.push(token)
        self._stops = StopStrings(rules.stops, include=params.include_stop_str_in_output)

    def push(self, token: int) -> None:
        """Decode a new token, the last of `output_ids`."""
        assert self.finish_reason is None, f"finished by {self.finish_reason}"
        ends = token in self._ends
        if self._detokenizer and (not ends or self.params.include_stop_str_in_output):
            self._add(self._detokenizer.push(token))
        if self.finish_reason is None:  # an end token's own text may have completed a stop string
            if ends:
                self.stop_reason = token if token in self.params.stop_token_ids else None
                self.finish("stop")
            elif self.max_tokens is not None and len(self.output_ids) >= self.max_tokens:
                self.finish("length")

    def finish(self, reason: FinishReason = "abort") -> None:
        """End the sequence here. The text held back becomes final, but a stop string that it completes still cuts."""
        if self.finish_reason is None and self._detokenizer:
            self._add(self._detokenizer.finish())
            if self.finish_reason is None:
                self.text += self._stops.finish()
        self.finish_reason = self.finish_reason or reason

    def _add(self, text: str) -> None:
        self.text += self._stops.push(text) if len(self.output_ids) > self.params.min_tokens else text
        if self._stops.matched is not None:
            self.stop_reason, self.finish_reason = self._stops.matched, "stop"


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text that has begun: a leading space is kept, and a part of a character is U+FFFD."""
    text, data, *_ = tokenizer.surface(token, False)
    return text + data.decode(errors="replace")


def begins_text(tokenizer: Tokenizer, context: Sequence[int]) -> bool:
    """Whether an output after this context begins a text, because no token of the context has any."""
    at_start = True
    for token in context[-_CONTEXT:]:
        at_start = tokenizer.surface(token, at_start).at_start
    return at_start
