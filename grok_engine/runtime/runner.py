"""The forward pass: a step's plan to hidden states, over the model and the KV pages that it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import grok_kernels
from grok_engine.batch import Batch
from grok_engine.config import EngineConfig
from grok_engine.models.decoder import Decoder
from grok_kernels.dtypes import dtype_of

from .flatten import flatten, take_rows
from .graphs import CpuCapture, CudaCapture, DecodeGraphs
from .memory import CPU_KV_BYTES, GPU_SHARE, wanted_pages
from .pages import allocate_pages, copy_pages, page_bytes
from .plan import Entry, StepPlan


class Runner:
    """Runs plans. It holds the model and the pages, and knows no scheduler and no request."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model, self.config = model, config
        self.device = model.cos_sin.device
        dtype = dtype_of(str(config.kv_dtype))
        self.page_bytes = page_bytes(config.model, config.page_size, dtype)
        self.graphs: DecodeGraphs | None = None
        measured = self.device.type == "cuda" and config.num_pages is None and config.kv_memory is None
        self.num_pages = wanted_pages(config, self._left_on_device() if measured else CPU_KV_BYTES)
        self.cache = allocate_pages(config.model, self.num_pages, config.page_size, dtype, self.device)
        self.graphs = self._new_graphs()
        if self.device.type == "cuda":
            self._warm_up()
        else:
            grok_kernels.cpu.bind_threads()

    def _warm_up(self) -> None:
        """Run one step of each shape that kernels are compiled for, sampling included: none compiles while serving."""
        c = self.config
        longest = min(c.max_len, self.num_pages * c.page_size)
        tokens = min(c.max_num_batched_tokens, c.max_num_seqs * longest)
        for queries in grok_kernels.startup_steps(c.max_num_seqs, tokens):
            counts = [min(longest, count - at) for count in queries for at in range(0, count, longest)]
            entries = [Entry([0] * count, 0, range(-(-count // c.page_size))) for count in counts]
            logits_BV = self.logits(self.run(entries)[: c.max_num_seqs])
            grok_kernels.sample_top_p(logits_BV, *torch.full((3, len(logits_BV)), 0.5, device=self.device))

    def _new_graphs(self) -> DecodeGraphs | None:
        """Graphs of decode steps over `cache`."""
        if self.config.enforce_eager:
            return None
        capture = CudaCapture(self.device) if self.device.type == "cuda" else CpuCapture()
        return DecodeGraphs(self.model, self.cache, self.config, capture)

    def _left_on_device(self) -> int:
        """Bytes left for pages beside weights, all graphs, and the activations and logits of the largest step."""
        c = self.config
        torch.cuda.reset_peak_memory_stats(self.device)
        tokens = min(c.max_num_batched_tokens, c.max_len)
        pages = -(-tokens // c.page_size)
        self.cache = allocate_pages(c.model, pages, c.page_size, dtype_of(str(c.kv_dtype)), self.device)
        x_TD = self.run([Entry([0] * tokens, 0, range(pages))])
        self.logits(x_TD[: c.max_num_seqs])
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free - torch.cuda.memory_reserved(self.device) + torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        if graphs := self._new_graphs():
            used += graphs.bytes_needed(lambda: torch.cuda.mem_get_info(self.device)[0])
            del graphs
        self.cache = []
        torch.cuda.empty_cache()
        return int(total * GPU_SHARE) - used

    @torch.inference_mode()
    def forward(self, plan: StepPlan, routed: list[Tensor] | None = None) -> Tensor:
        """x_RD: the hidden states of the rows that want logits, in the order of the plan. The next call may overwrite
        them. The keys and values of all of the plan's tokens are in their pages afterwards. routed: as for `run`."""
        if plan.copies:
            copy_pages(self.cache, plan.copies)
        x_TD = self.run(plan.entries, routed)
        if sum([e.num_logits for e in plan.entries]) == len(x_TD):
            return x_TD
        rows = plan.logit_rows()
        return take_rows(x_TD, rows) if rows else x_TD[:0]

    @torch.inference_mode()
    def run(self, entries: Sequence[Entry], routed: list[Tensor] | None = None) -> Tensor:
        """x_TD: the hidden states of all tokens, one entry after the other. The next call may overwrite them.

        routed, of an engine with `expert_load`: gets each layer's experts (T, A), which the next call may overwrite.
        """
        if self.graphs is not None and (replayed_TD := self.graphs.run(entries, routed)) is not None:
            return replayed_TD
        x_TD: Tensor = self.model(self._batch(entries), self.cache, routed)
        return x_TD

    @torch.inference_mode()
    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TV in fp32 of hidden states."""
        return self.model.logits(x_TD)

    def recover(self) -> bool:
        """After a step that failed: drop what was captured, and say whether the device still computes. An error on a
        GPU can end its every use."""
        if self.graphs is not None:
            self.graphs.clear()
        try:
            return bool(torch.ones((), device=self.device) == 1)
        except RuntimeError:
            return False

    def _batch(self, entries: Sequence[Entry]) -> Batch:
        numbers, sizes = flatten(entries, self.config.page_size)
        # non_blocking is safe: from memory that is not pinned, the bytes are read before the call returns
        numbers = numbers.to(self.device, non_blocking=True)
        return Batch.of(numbers, sizes, max([len(e.token_ids) for e in entries]))
