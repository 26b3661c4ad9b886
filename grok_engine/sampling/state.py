"""The sampling state of one sequence: what its parameters and the tokens so far say about the next token."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .params import SamplingParams, uniform

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_NOTHING: Ints = np.empty(0, np.int64)


class Matcher(Protocol):
    """Which tokens a structured output allows next. Both methods raise ValueError if the grammar fails."""

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit a token, from the lowest bit of the first byte on; tokens beyond the last byte are not allowed."""

    def accept(self, token_id: int) -> None: ...


class TokenCounts:
    """The distinct tokens of a sequence in order of appearance, and how often each occurs in its output."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._place = {token: i for i, token in enumerate(dict.fromkeys(prompt))}
        self._ids, self._counts = array("q", self._place), array("f", [0.0] * len(self._place))

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
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
        self._bans: dict[tuple[int, ...], list[int]] = {}  # last tokens of bad words, by the tokens before them
        for *before, last in bad_words:
            self._bans.setdefault(tuple(before), []).append(last)
        self._ban_lengths = sorted({len(before) for before in self._bans})
        # whether logits are changed before the choice
        self.edits = self.allowed is not None or bool(
            p.logits_processors or bias or penalised or bad_words or p.min_tokens or matcher or p.structured
        )
        for token in output_ids:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Move on by `token`. `sample` does this itself. ValueError if the grammar does not allow it."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.counts is not None:
            self.counts.add(token)

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self.seed, self.index, len(self.output_ids))

    def banned(self) -> Ints:
        """Tokens that must not come next: last tokens of bad words, and end tokens before min_tokens."""
        ids = self.output_ids
        banned = self._ends if len(ids) < self.params.min_tokens else _NOTHING
        found = [t for n in self._ban_lengths for t in self._bans.get(tuple(ids[max(len(ids) - n, 0) :]), ())]
        return np.array([*banned, *found], np.int64) if found else banned


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
