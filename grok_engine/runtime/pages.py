"""The tensors of the KV pages: allocated once, with their exact size in bytes, and copied page by page."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import grok_kernels
from grok_engine.batch import KVPages
from grok_engine.config import ModelConfig


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys, values and, for e4m3, one fp32 scale per token and head of each."""
    scale = 4 if dtype == torch.float8_e4m3fn else 0
    a_token = config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)
    return 2 * config.num_layers * page_size * a_token


def allocate_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
) -> list[KVPages]:
    """One `KVPages` a layer, (num_pages, G, page_size, C) of `dtype`, uninitialised; on a CPU in huge pages."""
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)

    def planes(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        return [grok_kernels.weight_memory(shape, dtype, device) for _ in range(2)]

    scaled = dtype == torch.float8_e4m3fn
    return [
        KVPages(*planes(shape, dtype), *planes(shape[:3], torch.float32) if scaled else ())
        for _ in range(config.num_layers)
    ]


def copy_pages(cache: Sequence[KVPages], copies: Sequence[tuple[int, int]]) -> None:
    """Copy each (source, destination) page in all layers. All sources are read before a destination is written."""
    device = cache[0].k.device
    # as tensors: indexing with lists would synchronise with the device at each use
    source, destination = (
        torch.tensor(ids, device="cpu").to(device, non_blocking=True) for ids in zip(*copies, strict=True)
    )
    for pages in cache:
        for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale):
            if tensor is not None:
                # torch has no indexed store for e4m3, so its bytes are copied as uint8
                raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
                raw[destination] = raw[source]
