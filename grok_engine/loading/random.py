"""Random weights: any architecture without a checkpoint, to measure its speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grok_engine.config import DType, ModelConfig, WeightFormat
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.norm import RMSNorm
from grok_engine.layers.weight import FusedWeight, NamedTensor
from grok_engine.models.decoder import Decoder

PERIOD = 4_194_301  # numbers drawn, then repeated; a prime, so that no two rows of a matrix are the same
SPREAD = 100.0  # the 8-bit values' standard deviation, about
DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}
_Modules = Iterator[tuple[NamedTensor | FusedWeight, torch.dtype, int]]


def dummy_weights(
    model: Decoder,
    weights: WeightFormat | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `model` with weights that depend on `seed` alone, of standard deviation K^-½, so that activations stay of
    the order of 1. weights: None is int8, with scales in the release's groups. `progress` as for `load_weights`."""
    device = model.cos_sin.device
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(PERIOD, generator=generator)
    limit = LIMITS.get(DTYPES[weights or "int8"])
    values = (normal * SPREAD).clamp_(-limit, limit).to(DTYPES[weights or "int8"]) if limit else normal
    total = dummy_bytes(model, weights)
    done = 0
    for module, dtype, groups in _modules(model, weights):
        if isinstance(module, FusedWeight):
            module.allocate(dtype, groups, device)
            std = module.k**-0.5
        else:
            module.allocate(dtype, device)
            std = module.shape[-1] ** -0.5
        start = int(torch.randint(PERIOD, (), generator=generator))
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, FusedWeight) and module.weight.scales is not None:
            _repeat(values, module.weight.values, start)
            module.weight.scales.fill_(std / SPREAD)
        else:
            weight = module.weight if isinstance(module, NamedTensor) else module.weight.values
            _repeat((normal * std).to(dtype), weight, start)
        done += sum(p.nbytes for p in module.parameters())
        if progress:
            progress(done, total)


def dummy_bytes(model: Decoder, weights: WeightFormat | None = None) -> int:
    """Bytes that the weights of `model` take in such a format."""
    total = 0
    for module, dtype, groups in _modules(model, weights):
        if isinstance(module, FusedWeight):
            total += module.experts * module.n * (module.k * dtype.itemsize + 4 * groups)
        else:
            total += math.prod(module.shape) * dtype.itemsize
    return total


def weight_bytes(config: ModelConfig, dtype: DType, weights: WeightFormat | None = None) -> int:
    """`dummy_bytes` of the model that `config` describes, without building its tables."""
    return dummy_bytes(Decoder(config, getattr(torch, dtype), max_positions=1), weights)


def _modules(model: Decoder, weights: WeightFormat | None) -> _Modules:
    """What holds weights, of what type, in how many groups of scales; 0 is none."""
    dtype = DTYPES[weights or "int8"]
    for module in model.modules():
        if isinstance(module, FusedWeight):
            groups = 0 if weights in ("bf16", "fp32") else 1
            if dtype == torch.int8 and module.k % 8 == 0 and module.parts[0].name.endswith((".o", ".down")):
                groups = 8  # as in the release
            yield module, dtype, groups
        elif isinstance(module, NamedTensor):
            yield module, model.dtype if isinstance(module, Embedding) else torch.float32, 0


def _repeat(block: Tensor, out: Tensor, start: int) -> None:
    """Fill `out`, in the order of memory, with `block` over and over, from its element `start` on."""
    flat, block = out.detach().view(-1), block.to(out.device)
    for at in range(-start, flat.numel(), block.numel()):
        first, stop = max(at, 0), min(at + block.numel(), flat.numel())
        flat[first:stop] = block[first - at : stop - at]
