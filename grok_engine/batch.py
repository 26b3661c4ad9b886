"""What one forward pass reads beside the weights: its tokens, where they stand, and the pages of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """One layer's pages, (P, G, S, C) each; e4m3 pages have a scale a token and head beside them, (P, G, S) fp32."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
