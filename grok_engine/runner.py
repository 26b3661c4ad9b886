"""Runs the decoder over one request's tokens, in pages of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .batch import Batch
from .cache.paged import allocate_pages
from .models.decoder import Decoder

PREFILL_CHUNK = 1024  # bounds the activations of a long prompt


class Session:
    """The pages of one request of at most `capacity` tokens, and how far they are filled."""

    def __init__(self, model: Decoder, capacity: int, page_size: int) -> None:
        self.model, self.device = model, model.cos_sin.device
        pages = -(-capacity // page_size)
        self.capacity = pages * page_size
        self.cache = allocate_pages(model.config, pages, page_size, model.dtype, self.device)
        self.block_table = torch.arange(pages, dtype=torch.int32, device=self.device)[None]
        self.length = 0

    def feed(self, token_ids: Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """x_TD of each chunk of the tokens in turn; their keys and values are kept."""
        for first in range(0, len(token_ids), chunk):
            yield self._step(token_ids[first : first + chunk])

    @torch.inference_mode()
    def _step(self, token_ids: Sequence[int]) -> Tensor:
        start, stop = self.length, self.length + len(token_ids)
        assert stop <= self.capacity, (stop, self.capacity)
        places = torch.arange(start, stop, dtype=torch.int32, device=self.device)
        batch = Batch(
            tokens_T=torch.tensor(token_ids, dtype=torch.int64, device=self.device),
            positions_T=places,
            slots_T=places,
            block_table_BN=self.block_table,
            query_start=torch.tensor([0, stop - start], dtype=torch.int32, device=self.device),
            seq_lens_B=torch.tensor([stop], dtype=torch.int32, device=self.device),
            max_query_len=stop - start,
        )
        self.length = stop
        x_TD: Tensor = self.model(batch, self.cache)
        return x_TD
