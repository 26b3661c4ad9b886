"""Random weights for any architecture, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from grok_engine.checkpoint.base import TensorInfo
from grok_engine.checkpoint.random import RandomCheckpoint
from grok_engine.checkpoint.xai.layout import release_groups
from grok_engine.config import DType, ModelConfig, WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder
from grok_kernels.dtypes import DTYPES, NAMES, dtype_of

from .slots import FORMATS, SCALED, slots


def random_checkpoint(model: Decoder, weights: WeightFormat | None = None, seed: int = 0) -> RandomCheckpoint:
    """A checkpoint for `model`, made on its device. weights: None is int8 with the release's groups of scales."""
    return RandomCheckpoint(_tensors(model, FORMATS[weights or "int8"]), seed, model.cos_sin.device)


def random_bytes(model: Decoder, weights: WeightFormat | None = None) -> int:
    """Bytes in memory of `model` filled from `random_checkpoint`."""
    return sum(slot.nbytes for slot in slots(model, random_checkpoint(model, weights)))


def weight_bytes(config: ModelConfig, dtype: DType, weights: WeightFormat | None = None) -> int:
    """`random_bytes` of the model that `config` describes, without its tables of positions."""
    return random_bytes(Decoder(config, dtype_of(dtype), max_positions=1), weights)


def _tensors(model: Decoder, fmt: str) -> Iterator[TensorInfo]:
    for module in model.modules():
        if isinstance(module, NamedTensor):
            dtype = model.dtype if isinstance(module, Embedding) else torch.float32
            size = prod(module.shape) * dtype.itemsize
            yield TensorInfo(name=module.name, shape=module.shape, format=NAMES[dtype], nbytes=size)
        elif isinstance(module, FusedWeight):
            for part in module.parts:
                shape, groups = (module.experts, part.stop - part.start, module.k), 0
                if fmt in SCALED:
                    groups = release_groups(part.name) if fmt == "int8" else 1
                    groups = groups if module.k % groups == 0 else 1
                yield TensorInfo(
                    name=part.name,
                    shape=shape,
                    format=fmt,
                    block=(1, module.k // groups) if groups else None,
                    nbytes=prod(shape) * DTYPES[fmt].itemsize + 4 * groups * prod(shape[:2]),
                )
