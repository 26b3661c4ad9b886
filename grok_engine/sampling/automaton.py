"""Finds the words of a set in a stream of symbols, at a cost per symbol that does not depend on their number."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Automaton(Generic[Value]):
    """Aho and Corasick's automaton of words, each with a value. Nothing changes once it is built, so any number of
    streams and threads share one.

    A state is a number, 0 at the start of a stream: it stands for the longest suffix of the stream that begins a word.
    A state takes 20 bytes, and some 250 more where words branch or end.
    """

    def __init__(self, words: Iterable[tuple[Sequence[int], Value]]) -> None:
        self.depth = array("i", [0])  # by state: the length of the suffix
        self._next = array("q", [-1])  # by state: the symbol that leads to the state numbered one higher, if one does
        self._branches: dict[tuple[int, int], int] = {}  # (state, symbol) to the state of any other number
        self._values: dict[int, list[Value]] = {}  # by the state in which their words end
        origins = [(0, 0)]  # by state: the state and symbol that lead to it
        for word, value in words:
            state = 0
            for symbol in word:
                child = self._child(state, symbol)
                if child < 0:
                    child = self._add(state, symbol)
                    origins.append((state, symbol))
                state = child
            self._values.setdefault(state, []).append(value)
        # A state's suffix link leads to the longest shorter suffix that begins a word.
        self._links = array("i", [0]) * len(origins)
        self._ends = array("i", [-1]) * len(origins)  # the nearest state with values along the links, −1: none
        for state in sorted(range(len(origins)), key=self.depth.__getitem__):
            parent, symbol = origins[state]
            if parent:
                self._links[state] = self.step(self._links[parent], symbol)
            if state in self._values:
                self._ends[state] = state
            elif state:
                self._ends[state] = self._ends[self._links[state]]

    def step(self, state: int, symbol: int) -> int:
        """The state after one more symbol. Over a whole stream this takes at most two moves a symbol."""
        while (child := self._child(state, symbol)) < 0:
            if state == 0:
                return 0
            state = self._links[state]
        return child

    def found(self, state: int) -> Iterator[Value]:
        """The values of all words that end in this state, those of longer words first."""
        while (state := self._ends[state]) >= 0:
            yield from self._values[state]
            if state == 0:
                return
            state = self._links[state]

    def _child(self, state: int, symbol: int) -> int:
        return state + 1 if self._next[state] == symbol else self._branches.get((state, symbol), -1)

    def _add(self, state: int, symbol: int) -> int:
        child = len(self.depth)
        if child == state + 1:
            self._next[state] = symbol
        else:
            self._branches[state, symbol] = child
        self.depth.append(self.depth[state] + 1)
        self._next.append(-1)
        return child
