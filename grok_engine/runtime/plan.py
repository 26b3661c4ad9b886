"""What one forward pass computes: token ids, positions, pages, and which rows want logits. Plain data; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Entry(NamedTuple):
    """One sequence's tokens in a step: positions start … start + len(token_ids) − 1, kept in `pages`.

    num_logits: how many of them, counted from the last, want logits: 0 inside a prompt, 1 to sample the next token, all
    for `prompt_logprobs`, several to verify drafted tokens. seq_id: −1 outside of a scheduler.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]  # page i holds positions i · page_size …; an array is fastest
    num_logits: int = 0
    seq_id: int = -1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, entries in the order of urgency. A forward pass needs nothing else beside weights and pages.

    The plan shares no object with scheduler or sequences, so that it can be pickled, sent to other ranks, or computed
    while the next one is made. copies: (source, destination) pages, copied before anything is written, either in order
    or all read and then all written.
    """

    entries: tuple[Entry, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    def logit_rows(self) -> list[int]:
        """Rows of the flat batch that want logits, ascending."""
        rows: list[int] = []
        end = 0
        for entry in self.entries:
            end += len(entry.token_ids)
            rows += range(end - entry.num_logits, end)
        return rows
