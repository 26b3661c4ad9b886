"""The tensors that a forward pass reads beside the weights: tokens, positions, pages of keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .plan import Entry

ALIGNED = 4  # int32s, 16 bytes: Triton compiles another kernel for a pointer that is not at a multiple of that


@dataclass(frozen=True, slots=True)
class Batch:
    """A flat batch: the T new tokens of B requests, one request after the other. All index tensors are int32."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # where each token's key and value are written: page · S + slot; −1 writes nothing
    query_start: Tensor  # (B + 1,)
    seq_lens_B: Tensor  # keys of each request, including those of its new tokens
    block_table_BN: Tensor
    max_query_len: int

    @classmethod
    def of(cls, numbers: Tensor, sizes: Sequence[int], max_query_len: int) -> Batch:
        """Views into the tensor that `flatten` made, or into a copy of it on a device."""
        parts, at = [], 0
        for size in sizes:
            parts.append(numbers.narrow(0, at, size))
            at += size + -size % ALIGNED
        tokens_T, positions_T, slots_T, query_start, seq_lens_B, table = parts
        table_BN = table.view(len(seq_lens_B), -1)
        return cls(tokens_T, positions_T, slots_T, query_start, seq_lens_B, table_BN, max_query_len)


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
    return x.index_select(0, torch.tensor(rows).to(x.device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's pages, (P, G, S, C) each. e4m3 pages have one fp32 scale per token and head, (P, G, S)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
