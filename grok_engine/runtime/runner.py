"""A scheduled batch → tensors → model → rows of hidden states, in pages that it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import grok_kernels
from grok_engine.config import ConfigError, EngineConfig
from grok_engine.models.decoder import Decoder

from .batch import Batch, Work, flatten
from .graphs import CpuCapture, CudaCapture, DecodeGraphs
from .pages import allocate_pages, copy_pages, page_bytes

KV_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}
CPU_KV_BYTES = 2 << 30
GPU_SHARE = 0.9  # of the device, for everything; the rest is the driver's, the allocator's slack and others'


class Runner:
    """Holds the model and its pages."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.device = model.cos_sin.device
        dtype = KV_DTYPES[str(config.kv_dtype)]
        self.page_bytes = page_bytes(config.model, config.page_size, dtype)
        self.graphs: DecodeGraphs | None = None
        self.num_pages = self._num_pages(dtype)
        self.cache = allocate_pages(config.model, self.num_pages, config.page_size, dtype, self.device)
        self.graphs = self._new_graphs()
        if self.device.type == "cuda":
            self._meet_kernels()

    def _meet_kernels(self) -> None:
        """Run a step of each kind that kernels are compiled for, tokens sampled, so that none is compiled while serving."""
        c = self.config
        longest = min(c.max_len, self.num_pages * c.page_size)
        tokens = min(c.max_num_batched_tokens, c.max_num_seqs * longest)
        for queries in grok_kernels.startup_steps(c.max_num_seqs, tokens):
            counts = [min(longest, count - at) for count in queries for at in range(0, count, longest)]
            work = [Work([0] * count, 0, range(-(-count // c.page_size))) for count in counts]
            logits_BV = self.logits(self.run(work)[: c.max_num_seqs])
            grok_kernels.sample_top_p(logits_BV, *torch.full((3, len(logits_BV)), 0.5, device=self.device))

    def _new_graphs(self) -> DecodeGraphs | None:
        """For decode steps over `cache`."""
        if self.config.enforce_eager:
            return None
        capture = CudaCapture(self.device) if self.device.type == "cuda" else CpuCapture()
        return DecodeGraphs(self.model, self.cache, self.config, capture)

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
        """Bytes left once the largest step has run, and all graphs are there: weights, activations and logits at their
        peak, and what graphs keep."""
        c = self.config
        torch.cuda.reset_peak_memory_stats(self.device)
        tokens = min(c.max_num_batched_tokens, c.max_len)
        pages = -(-tokens // c.page_size)
        self.cache = allocate_pages(c.model, pages, c.page_size, KV_DTYPES[str(c.kv_dtype)], self.device)
        x_TD = self.run([Work([0] * tokens, 0, range(pages))])
        self.logits(x_TD[: c.max_num_seqs])
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free - torch.cuda.memory_reserved(self.device) + torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        if graphs := self._new_graphs():
            used += self._bytes_of(graphs)
            del graphs
        self.cache = []
        torch.cuda.empty_cache()
        return int(total * GPU_SHARE) - used

    @torch.inference_mode()
    def _bytes_of(self, graphs: DecodeGraphs) -> int:
        return graphs.bytes_needed(lambda: torch.cuda.mem_get_info(self.device)[0])

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Make the page copies that forks asked for."""
        if copies:
            copy_pages(self.cache, copies)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> Tensor:
        """x_TD of all the tokens, one sequence after the other; the next run may overwrite it. Their keys and values
        are in their pages after."""
        if self.graphs is not None and (replayed_TD := self.graphs.run(work)) is not None:
            return replayed_TD
        x_TD: Tensor = self.model(self._batch(work), self.cache)
        return x_TD

    @torch.inference_mode()
    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TV in fp32 of rows that `run` gave."""
        return self.model.logits(x_TD)

    def _batch(self, work: Sequence[Work]) -> Batch:
        numbers, sizes = flatten(work, self.config.page_size)
        # not waited for: from memory that is not pinned, the bytes are read before the call returns
        numbers = numbers.to(self.device, non_blocking=True)
        return Batch.of(numbers, sizes, max([len(w.token_ids) for w in work]))
