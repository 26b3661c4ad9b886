"""The paged tensors of keys and values: preallocated, sized to the byte, copied page by page."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grok_engine.config import ModelConfig

from .batch import KVPages


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys, values and, in e4m3, an fp32 scale a token and head of each."""
    scale = 4 if dtype == torch.float8_e4m3fn else 0
    a_token = config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)
    return 2 * config.num_layers * page_size * a_token


def allocate_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
) -> list[KVPages]:
    """One `KVPages` a layer, (num_pages, G, page_size, C) of `dtype`, uninitialised."""
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)

    def scales() -> torch.Tensor | None:
        return torch.empty(shape[:3], device=device) if dtype == torch.float8_e4m3fn else None

    return [
        KVPages(
            k=torch.empty(shape, dtype=dtype, device=device),
            v=torch.empty(shape, dtype=dtype, device=device),
            k_scale=scales(),
            v_scale=scales(),
        )
        for _ in range(config.num_layers)
    ]


def copy_pages(cache: Sequence[KVPages], copies: Sequence[tuple[int, int]]) -> None:
    """Each (source, destination) of `copies`, in all layers. No page is both."""
    device = cache[0].k.device
    # not waited for, as a list would be at each use
    source, destination = (torch.tensor(ids).to(device, non_blocking=True) for ids in zip(*copies, strict=True))
    for pages in cache:
        for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale):
            if tensor is not None:
                # e4m3 has no indexed store: the same bytes go as uint8
                raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
                raw[destination] = raw[source]
