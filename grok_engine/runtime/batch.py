"""What one forward pass reads beside the weights: its tokens, where they stand, and the pages of keys and values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

ALIGNED = 4  # numbers: 16 bytes, by which Triton compiles a kernel anew where a pointer is not at a multiple of them


class Work:
    """The tokens of one sequence that a step computes: positions start.. of it, in its pages, best as an array."""

    __slots__ = ("pages", "start", "token_ids")

    def __init__(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> None:
        self.token_ids, self.start, self.pages = token_ids, start, pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A flat batch: the new tokens of B requests, one request after the other, T in all. Index tensors are int32."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # where each token's key and value go: page · S + place; −1 is nowhere
    block_table_BN: Tensor
    query_start: Tensor  # (B + 1,)
    seq_lens_B: Tensor  # keys of each request, those of its new tokens included
    max_query_len: int

    @classmethod
    def of(cls, numbers: Tensor, sizes: Sequence[int], max_query_len: int) -> Batch:
        """Views of what `flatten` gave, wherever it was copied to."""
        parts, at = [], 0
        for size in sizes:
            parts.append(numbers.narrow(0, at, size))
            at += size + -size % ALIGNED
        tokens_T, positions_T, slots_T, query_start, seq_lens_B, table = parts
        return cls(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slots_T=slots_T,
            block_table_BN=table.view(seq_lens_B.shape[0], -1),
            query_start=query_start,
            seq_lens_B=seq_lens_B,
            max_query_len=max_query_len,
        )


def flatten(work: Sequence[Work], page_size: int, rows: int = 0, width: int = 0) -> tuple[Tensor, list[int]]:
    """All index tensors of a step in one on the CPU, for one transfer, and their sizes, as `Batch.of` has them.

    width: columns of the block table, at least those needed. rows: of one token each, more than there is work: each
    that is added is the one of fewest keys again, written nowhere: attention reads the least, and no further expert is hit.
    """
    width = max(width, max([len(w.pages) for w in work]))
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    seq_lens: list[int] = []
    query_start = [0]
    table = array("i")
    for w in work:
        pages, start, stop = w.pages, w.start, w.start + len(w.token_ids)
        tokens += w.token_ids
        positions += range(start, stop)
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(start, stop)]
        query_start.append(len(tokens))
        seq_lens.append(stop)
        table.extend(pages)
        table.frombytes(bytes((width - len(pages)) * table.itemsize))
    if (more := rows - len(work)) > 0:
        least = seq_lens.index(min(seq_lens))
        tokens += [tokens[least]] * more
        positions += [positions[least]] * more
        slots += [-1] * more
        query_start += range(len(work) + 1, rows + 1)
        seq_lens += [seq_lens[least]] * more
        table += table[least * width : (least + 1) * width] * more
    lists = (tokens, positions, slots, query_start, seq_lens)
    sizes = [*map(len, lists), len(table)]
    for part in lists:
        part += [0] * (-len(part) % ALIGNED)
    # one array, one tensor: in a decode step each more costs as much as a small kernel
    numbers = array("i", list(chain.from_iterable(lists)))
    numbers += table
    return torch.frombuffer(numbers, dtype=torch.int32), sizes


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows], as a copy. A list as an index would wait for the device."""
    return x.index_select(0, torch.tensor(rows).to(x.device, non_blocking=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """One layer's pages, (P, G, S, C) each; e4m3 pages have a scale a token and head beside them, (P, G, S) fp32."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
