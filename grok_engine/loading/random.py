"""Random weights for any architecture, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from grok_engine.checkpoint.base import TensorInfo
from grok_engine.checkpoint.random import RandomCheckpoint
from grok_engine.checkpoint.rows import ROUNDED, rounded_spec
from grok_engine.checkpoint.xai.layout import release_groups
from grok_engine.config import DType, ModelConfig, WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.weight import NamedTensor, holders
from grok_engine.models.decoder import Decoder
from grok_kernels import Spec
from grok_kernels.dtypes import NAMES, dtype_of

from .slots import slots


def random_checkpoint(model: Decoder, weights: WeightFormat | None = None, seed: int = 0) -> RandomCheckpoint:
    """A checkpoint for `model`, made on its device. weights: None is int8 with the release's groups of scales."""
    return RandomCheckpoint(_tensors(model, weights or "int8"), seed, model.cos_sin.device)


def random_bytes(model: Decoder, weights: WeightFormat | None = None) -> int:
    """Bytes in memory of `model` filled from `random_checkpoint`."""
    device = model.cos_sin.device
    return sum(slot.nbytes(device) for slot in slots(model, random_checkpoint(model, weights), None, device.type))


def weight_bytes(config: ModelConfig, dtype: DType, weights: WeightFormat | None = None) -> int:
    """`random_bytes` of the model that `config` describes, without its tables of positions."""
    return random_bytes(Decoder(config, dtype_of(dtype), max_positions=1), weights)


def _tensors(model: Decoder, weights: str) -> Iterator[TensorInfo]:
    for _, module in holders(model):
        if module is model.lm_head and model.config.tie_embeddings:
            continue  # made of the embedding
        if isinstance(module, (NamedTensor, Embedding)):
            dtype = torch.float32
            if isinstance(module, NamedTensor):
                name, shape = module.name, tuple(module.shape)
            else:
                name, shape, dtype = module.parts[0].name, module.shape[1:], model.dtype
            yield TensorInfo(name=name, shape=shape, format=NAMES[dtype], nbytes=prod(shape) * dtype.itemsize)
            continue
        for part in module.parts:
            size = (module.experts, part.stop - part.start, module.k)
            spec = rounded_spec(weights, module.k) if weights in ROUNDED else Spec(weights)
            if weights == "int8" and module.k % release_groups(part.name) == 0:
                spec = Spec("int8", release_groups(part.name))
            yield TensorInfo(
                name=part.name,
                shape=size,
                format=spec.format,
                block=(1, module.k // spec.groups) if spec.groups else None,
                scales="fp16" if spec.scales == torch.float16 else "fp32",
                nbytes=spec.nbytes("rows", size),
            )
