"""The sampling state of one sequence: what its parameters and the tokens so far say about the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .params import Patterns, SamplingParams, uniform

Ints = npt.NDArray[np.int64]
_NOTHING: Ints = np.empty(0, np.int64)


class Matcher(Protocol):
    """Which tokens a structured output allows next. Both methods raise ValueError if the grammar fails."""

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, from the lowest bit of the first byte on; tokens beyond the last byte are not allowed."""

    def accept(self, token_id: int) -> None: ...


class TokenCounts:
    """The distinct tokens of a sequence in order of appearance, and how often each occurs in its output."""

    def __init__(self, prompt: Iterable[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._place = {token: i for i, token in enumerate(ids)}
        self._ids: Ints = np.array(ids, np.int64)
        self._counts = np.zeros(len(ids), np.float32)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):  # grow by half: a token costs amortised O(1)
            more = place // 2 + 16
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self._place)]


class SamplingState:
    """How one sequence samples.

    output_ids: the tokens generated so far, a list that its owner appends to after `accept` and that is only read here.
    seed: the request's; index: which of its n sequences this is. bad_words: token sequences, from `bad_word_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        output_ids: list[int],
        *,
        seed: int,
        index: int = 0,
        prompt: Iterable[int] = (),
        eos_token_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        matcher: Matcher | None = None,
    ) -> None:
        p = self.params = params
        self.output_ids, self.seed, self.index, self.matcher = output_ids, seed, index, matcher
        self.greedy = p.greedy
        bias = p.logit_bias or {}
        self.bias = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        self.allowed = None if p.allowed_token_ids is None else _sorted_ids(set(p.allowed_token_ids))
        self._ends = _sorted_ids(p.end_token_ids(eos_token_ids)) if p.min_tokens else _NOTHING
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        self.counts = TokenCounts(prompt if p.repetition_penalty != 1 else ()) if penalised else None
        words = [tuple(word) for word in bad_words]
        assert all(words), "a bad word without tokens would ban nothing, or everything"
        self._words = Patterns([word[:-1] for word in words]) if words else None
        self._last_tokens = [word[-1] for word in words]
        self._word_state = 0
        # whether logits are changed before the choice
        self.edits = self.allowed is not None or bool(
            p.logits_processors or bias or penalised or words or p.min_tokens or matcher
        )
        for token in output_ids:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Move on by `token`. `sample` does this itself. ValueError if the grammar does not allow it."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.counts is not None:
            self.counts.add(token)
        if self._words is not None:
            self._word_state = self._words.step(self._word_state, token)

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self.seed, self.index, len(self.output_ids))

    def banned(self) -> Ints:
        """Tokens that must not come next: last tokens of bad words, and end tokens before min_tokens."""
        banned = self._ends if len(self.output_ids) < self.params.min_tokens else _NOTHING
        if self._words is not None and (found := self._words.found[self._word_state]):
            banned = np.array([*banned, *(self._last_tokens[i] for i in found)], np.int64)
        return banned


def bad_word_tokens(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """The token sequences of bad words: each as encoded at the start of a text, after a space, and inside a text.

    Inside: after punctuation, since a tokenizer may put a space before any text of its own.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        spellings = [encode(word), encode(" " + word)]
        for before in ("\n", "(", "."):
            alone, joined = encode(before), encode(before + word)
            if joined[: len(alone)] == alone:
                spellings.append(joined[len(alone) :])
        if not any(spellings):
            raise ValueError(f"bad_words has {word!r}, of which the tokenizer makes no token")
        found.update(dict.fromkeys(tuple(s) for s in spellings if s))
    return list(found)


def _sorted_ids(tokens: Collection[int]) -> Ints:
    return np.array(sorted(tokens), np.int64)
