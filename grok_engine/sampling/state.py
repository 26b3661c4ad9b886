"""The sampling state of one sequence: what its request's rules and the tokens so far say about the next token."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from .params import uniform
from .rules import Bits, Floats, Ints, SamplingRules


class Matcher(Protocol):
    """Which tokens a structured output allows next. Both methods raise ValueError if the grammar fails."""

    def allowed(self) -> Bits:
        """One bit a token, from the lowest bit of the first byte on; tokens beyond the last byte are not allowed."""

    def accept(self, token_id: int) -> None: ...


class TokenCounts:
    """The distinct tokens of a sequence in order of appearance, and how often each occurs in its output.

    prompt: the tokens of the prompt that count, each with its place. It is only read, so that sequences can share it.
    """

    def __init__(self, prompt: Mapping[int, int]) -> None:
        self._prompt, self._new = prompt, dict[int, int]()
        self._ids, self._counts = array("q", prompt), array("f", [0.0]) * len(prompt)

    def add(self, token: int) -> None:
        place = self._prompt.get(token)
        if place is None:
            place = self._new.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def ids_and_counts(self) -> tuple[Ints, Floats]:
        """Copies: an `array` cannot grow while numpy refers to its memory."""
        return np.array(self._ids), np.array(self._counts)


class SamplingState:
    """How one sequence samples.

    output_ids: the tokens generated so far, a list that its owner appends to after `accept` and that is only read here.
    seed: the request's; index: which of its n sequences this is. matcher: of its structured output; it may be set until
    the first token is sampled.
    """

    def __init__(
        self, rules: SamplingRules, output_ids: list[int], *, seed: int, index: int = 0, matcher: Matcher | None = None
    ) -> None:
        self.rules, self.params, self.output_ids = rules, rules.params, output_ids
        self.seed, self.index, self.matcher = seed, index, matcher
        self.greedy = rules.params.greedy
        self.edits = rules.edits or matcher is not None  # whether logits are changed before the choice
        self.counts = None if rules.counted is None else TokenCounts(rules.counted)
        self._bad_words = 0  # state of `rules.bad_words`
        for token in output_ids:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Move on by `token`. `sample` does this itself. ValueError if the grammar does not allow it."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.counts is not None:
            self.counts.add(token)
        if self.rules.bad_words is not None:
            self._bad_words = self.rules.bad_words.step(self._bad_words, token)

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self.seed, self.index, len(self.output_ids))

    @property
    def _early(self) -> bool:
        return len(self.output_ids) < self.params.min_tokens

    def banned(self) -> Ints:
        """Tokens that must not come next, as `SamplingRules` has them, and those that would complete a bad word."""
        rules = self.rules
        fixed = rules.banned_early if self._early else rules.banned
        if rules.bad_words is None or not (last := list(rules.bad_words.found(self._bad_words))):
            return fixed
        return np.array([*fixed, *last], np.int64)

    def allowed(self) -> Bits | None:
        """The tokens that may come next but for `banned`, or None for all of them. ValueError if the grammar fails.

        Before min_tokens that excludes the end tokens, unless the grammar's text is complete and nothing else can come.
        """
        rules, early = self.rules, self._early
        fixed = rules.allowed_early if early else rules.allowed
        if self.matcher is None:
            return fixed
        matching = _fitted(self.matcher.allowed(), rules.vocab_size)
        if fixed is None:
            return matching
        both = matching & fixed
        if early and not both.any():
            return matching if rules.allowed is None else matching & rules.allowed
        return both


def _fitted(bits: Bits, vocab_size: int) -> Bits:
    size = (vocab_size + 7) // 8
    return bits[:size] if len(bits) >= size else np.pad(bits, (0, size - len(bits)))
