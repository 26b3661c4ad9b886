"""The paged tensors of keys and values."""

from __future__ import annotations

import torch

from grok_engine.batch import KVPages
from grok_engine.config import ModelConfig


def allocate_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
) -> list[KVPages]:
    """One `KVPages` a layer, (num_pages, G, page_size, C) of `dtype`, uninitialised."""
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
    return [
        KVPages(k=torch.empty(shape, dtype=dtype, device=device), v=torch.empty(shape, dtype=dtype, device=device))
        for _ in range(config.num_layers)
    ]
