from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from grok_engine.sampling.automaton import Automaton

symbols = st.lists(st.integers(0, 2), max_size=40)
words = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=8)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(words=words, stream=symbols)
def test_it_finds_what_a_search_finds(words: list[tuple[int, ...]], stream: list[int]) -> None:
    automaton = Automaton([(word, (len(word), i)) for i, word in enumerate(words)])
    state = 0
    for end in range(len(stream) + 1):
        seen = tuple(stream[:end])
        if end:
            state = automaton.step(state, stream[end - 1])
        ends = {(len(w), i) for i, w in enumerate(words) if seen[end - len(w) :] == w and len(w) <= end}
        found = list(automaton.found(state))
        assert set(found) == ends
        assert len(found) == len(ends)
        assert [length for length, _ in found] == sorted((length for length, _ in found), reverse=True)
        begun = [k for k in range(end + 1) if any(w[:k] == seen[end - k :] for w in words)]
        assert automaton.depth[state] == max(begun, default=0)


class Counting(Automaton[int]):
    moves = 0

    def _child(self, state: int, symbol: int) -> int:
        self.moves += 1
        return super()._child(state, symbol)


def test_the_cost_of_a_symbol_is_that_of_any_other_set() -> None:
    """The stream almost completes a long word again and again, which costs a search its length each time."""
    word: Sequence[int] = [0] * 4000 + [1]
    automaton = Counting([(word, 0), *(([0] * n + [2], n) for n in range(1, 300))])
    automaton.moves, state = 0, 0
    stream = ([0] * 3999 + [3]) * 5
    for symbol in stream:
        state = automaton.step(state, symbol)
    assert automaton.moves <= 2 * len(stream) + 1
