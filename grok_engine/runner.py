"""A scheduled batch → tensors → model → rows of hidden states, in pages that it owns."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .batch import Batch
from .cache.paged import allocate_pages, copy_pages, page_bytes
from .config import ConfigError, EngineConfig
from .models.decoder import Decoder

KV_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}
CPU_KV_BYTES = 2 << 30
GPU_SHARE = 0.9  # of the device, for everything; the rest is the driver's, the allocator's slack and others'


class Work:
    """The tokens of one sequence that a step computes: positions start.. of it, in its pages."""

    __slots__ = ("pages", "start", "token_ids")

    def __init__(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> None:
        self.token_ids, self.start, self.pages = token_ids, start, pages


class Runner:
    """Holds the model and its pages."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.device = model.cos_sin.device
        dtype = KV_DTYPES[str(config.kv_dtype)]
        self.page_bytes = page_bytes(config.model, config.page_size, dtype)
        self.num_pages = self._num_pages(dtype)
        self.cache = allocate_pages(config.model, self.num_pages, config.page_size, dtype, self.device)

    def _num_pages(self, dtype: torch.dtype) -> int:
        c = self.config
        longest = -(-c.max_len // c.page_size)
        if c.num_pages is not None:
            return c.num_pages
        budget = c.kv_memory
        if budget is None:
            budget = self._left_on_device() if self.device.type == "cuda" else CPU_KV_BYTES
            if self.device.type != "cuda":
                budget = max(budget, longest * self.page_bytes)
        pages = budget // self.page_bytes
        if pages < 1:
            raise ConfigError(f"kv_memory: {budget} bytes hold no page, expected {self.page_bytes} or more for one")
        # more than every sequence could fill at once would lie idle
        return min(pages, c.max_num_seqs * (longest + 1))

    def _left_on_device(self) -> int:
        """Bytes left once the largest step has run: weights, activations and logits at their peak."""
        c = self.config
        torch.cuda.reset_peak_memory_stats(self.device)
        tokens = min(c.max_num_batched_tokens, c.max_len)
        pages = -(-tokens // c.page_size)
        self.cache = allocate_pages(c.model, pages, c.page_size, KV_DTYPES[str(c.kv_dtype)], self.device)
        x_TD = self.run([Work([0] * tokens, 0, range(pages))])
        self.logits(x_TD[: c.max_num_seqs])
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free - torch.cuda.memory_reserved(self.device) + torch.cuda.max_memory_allocated(self.device)
        self.cache = []
        torch.cuda.empty_cache()
        return int(total * GPU_SHARE) - used

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Make the page copies that forks asked for."""
        if copies:
            copy_pages(self.cache, copies)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> Tensor:
        """x_TD of all the tokens, one sequence after the other. Their keys and values are in their pages after."""
        x_TD: Tensor = self.model(self._batch(work), self.cache)
        return x_TD

    @torch.inference_mode()
    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TV in fp32 of rows that `run` gave."""
        return self.model.logits(x_TD)

    def _batch(self, work: Sequence[Work]) -> Batch:
        size, widest = self.config.page_size, max([len(w.pages) for w in work])
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        seq_lens: list[int] = []
        table: list[int] = []
        query_start = [0]
        for w in work:
            pages, start, stop = w.pages, w.start, w.start + len(w.token_ids)
            tokens += w.token_ids
            positions += range(start, stop)
            slots += [pages[p // size] * size + p % size for p in range(start, stop)]
            query_start.append(len(tokens))
            seq_lens.append(stop)
            table += pages
            table += [0] * (widest - len(pages))
        # one array, one tensor, one transfer: in a decode step each more costs as much as a small kernel
        parts = (tokens, positions, slots, query_start, seq_lens, table)
        numbers = torch.frombuffer(array("i", chain.from_iterable(parts)), dtype=torch.int32).to(self.device)
        tokens_T, positions_T, slots_T, query_start_, seq_lens_B, table_ = numbers.split_with_sizes(
            [len(part) for part in parts]
        )
        return Batch(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slots_T=slots_T,
            block_table_BN=table_.view(len(work), widest),
            query_start=query_start_,
            seq_lens_B=seq_lens_B,
            max_query_len=max([len(w.token_ids) for w in work]),
        )
