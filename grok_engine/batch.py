"""The tensors that a forward pass reads beside the weights: tokens, positions, pages of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's pages, (P, G, S, C) each. e4m3 pages have one fp32 scale per token and head, (P, G, S)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
