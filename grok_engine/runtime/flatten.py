"""From the entries of a plan to the index tensors of a batch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from grok_engine.batch import ALIGNED

from .plan import Entry


def flatten(entries: Sequence[Entry], page_size: int, rows: int = 0, width: int = 0) -> tuple[Tensor, list[int]]:
    """All index tensors of a step in one CPU tensor, for a single transfer, and their sizes, for `Batch.of`.

    rows: pad to this many one-token rows. Padding repeats the row with the fewest keys (activating no extra expert)
    with slot −1 (writing nothing). width: pad the block table to this many columns.
    """
    width = max(width, max([len(e.pages) for e in entries]))
    lists: tuple[list[int], ...] = ([], [], [], [0], [])
    tokens, positions, slots, query_start, seq_lens = lists
    table = array("i")
    for token_ids, start, pages, _, _ in entries:
        stop = start + len(token_ids)
        tokens += token_ids
        positions += range(start, stop)
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(start, stop)]
        query_start.append(len(tokens))
        seq_lens.append(stop)
        table.extend(pages)
        table.frombytes(bytes((width - len(pages)) * table.itemsize))
    if (more := rows - len(entries)) > 0:
        least = seq_lens.index(min(seq_lens))
        tokens += [tokens[least]] * more
        positions += [positions[least]] * more
        slots += [-1] * more
        query_start += range(len(entries) + 1, rows + 1)
        seq_lens += [seq_lens[least]] * more
        table += table[least * width : (least + 1) * width] * more
    sizes = [*map(len, lists), len(table)]
    for part in lists:
        part += [0] * (-len(part) % ALIGNED)
    # one array and one tensor: in a decode step each further tensor costs as much as a small kernel
    numbers = array("i", list(chain.from_iterable(lists)))
    numbers += table
    return torch.frombuffer(numbers, dtype=torch.int32), sizes


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows], as a copy. Indexing with a list would synchronise with the device."""
    return x.index_select(0, torch.tensor(rows, device="cpu").to(x.device, non_blocking=True))
