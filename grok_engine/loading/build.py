"""A model built and filled, as an engine's configuration has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

import grok_kernels
from grok_engine.checkpoint.base import Checkpoint, CheckpointError
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import PackedCheckpoint
from grok_engine.checkpoint.rows import ROUNDED
from grok_engine.config import ActFormat, ConfigError, EngineConfig, ModelConfig, WeightFormat
from grok_engine.layers.weight import FusedWeight
from grok_engine.models.decoder import Decoder
from grok_engine.tokenizer.base import PaddedTokenizer, Tokenizer
from grok_engine.tokenizer.chat_builtin import GROK_2_ENDS
from grok_engine.tokenizer.load import load_tokenizer
from grok_kernels.dtypes import dtype_of

from .fill import Progress, fill, source_of
from .random import random_checkpoint
from .slots import Slot, slots

# From a configuration, and what loading takes in memory for each format of weights, to a configuration that fits.
Fit = Callable[[EngineConfig, Callable[[WeightFormat | None], tuple[int, int] | None]], EngineConfig]
SLACK = 30 << 20  # bytes that loading takes beside the weights and one tensor


def build_model(
    config: EngineConfig,
    folder: Path | None,
    progress: Progress | None = None,
    fit: Fit = lambda config, loading: config,
) -> tuple[Decoder, EngineConfig]:
    """The model of `config`, filled from `folder` or at random, and `config` with its sizes, by `fit`, and its
    activations resolved."""
    device = _device(config.device)
    checkpoint = None if folder is None else open_checkpoint(folder, config.model)
    if config.mmap and not (isinstance(checkpoint, PackedCheckpoint) and device.type == "cpu"):
        raise ConfigError(
            f"mmap=True with model {config.model.name!r} on {device}: expected a folder that `grok-engine convert` "
            "wrote, on the CPU"
        )
    for name, format in (("weights", config.weights), ("head", config.head)):
        wanted = ROUNDED.get(format or "", ("",))[0]
        if wanted and not grok_kernels.takes_format(wanted, device.type):
            raise ConfigError(f"{name}={format!r} on {device}: its kernels do not multiply by {wanted}")
    config = fit(config, lambda weights: _loading_bytes(config, checkpoint, weights))
    activations = _activations(config, checkpoint, device)
    model = Decoder(config.model, dtype_of(config.dtype), device, config.max_len, activations, config.head)
    if checkpoint is None:
        fill(model, random_checkpoint(model, config.weights), progress=progress)
    else:
        fill(model, checkpoint, weights=config.weights, mapped=config.mmap, progress=progress)
    return model, replace(config, activations=activations)


def _loading_bytes(
    config: EngineConfig, checkpoint: Checkpoint | None, weights: WeightFormat | None
) -> tuple[int, int] | None:
    """Bytes of the weights in this format, and those that loading takes beside them at its peak; None where the
    checkpoint does not become them. CheckpointError, as `slots` raises it, for the format that is wanted."""
    empty = Decoder(config.model, dtype_of(config.dtype), max_positions=1, head=config.head)
    device = _device(config.device)
    try:
        if checkpoint is None:
            found = slots(empty, random_checkpoint(empty, weights), None, device.type)
        else:
            found = slots(empty, source_of(checkpoint, empty, weights, device.type), weights, device.type)
    except CheckpointError:
        if weights == config.weights:
            raise
        return None
    if isinstance(checkpoint, PackedCheckpoint) and device.type == "cpu":  # read in place, or mapped
        head = sum(slot.nbytes(device) for slot in found if slot.converts_head(empty))
        return head + (0 if config.mmap else checkpoint.total_bytes), SLACK
    pieces = (info.nbytes // prod(info.shape[:-2]) for slot in found for info in slot.sources)
    return sum(slot.nbytes(device) for slot in found), max(pieces) + SLACK


@dataclass(frozen=True, slots=True)
class HeldMatrices:
    """The matrices of a model in a CPU's memory: their bytes, scales included, bits of a weight, and formats."""

    nbytes: int
    bits: float
    formats: tuple[str, ...]


def held_matrices(config: ModelConfig, checkpoint: Checkpoint, head: WeightFormat | None = None) -> HeldMatrices:
    """What loading with this head and otherwise the default options makes of them. Raises as `slots` does."""
    held = [slot for slot in _held_on_cpu(config, checkpoint, head) if isinstance(slot.module, FusedWeight)]
    nbytes, count = sum(slot.nbytes("cpu") for slot in held), sum(prod(slot.module.shape) for slot in held)
    return HeldMatrices(nbytes, 8 * nbytes / count, tuple(dict.fromkeys(slot.spec.format for slot in held)))


def memory_bits(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, float]:
    """Bits that a weight of each tensor takes on a CPU, its share of scales included, with the default options. Raises
    as `slots` does for a checkpoint that does not hold the model of `config`."""
    found = _held_on_cpu(config, checkpoint)
    return {info.name: 8 * slot.nbytes("cpu") / prod(slot.module.shape) for slot in found for info in slot.sources}


def _held_on_cpu(config: ModelConfig, checkpoint: Checkpoint, head: WeightFormat | None = None) -> list[Slot]:
    empty = Decoder(config, torch.bfloat16, max_positions=1, head=head)
    return slots(empty, source_of(checkpoint, empty, None, "cpu"))


def build_tokenizer(folder: Path | None, config: EngineConfig) -> tuple[Tokenizer | None, EngineConfig]:
    """The tokenizer of a model's files, as wide as the model, and `config`, in which an answer ends at Grok-2's end of
    a turn too, where the tokenizer has one. None if there is no tokenizer. ConfigError if it is wider."""
    tokenizer = None if folder is None else load_tokenizer(folder)
    if tokenizer is None:
        return None, config
    size = config.model.vocab_size
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocab_size={size}"
        )
    padded = PaddedTokenizer(tokenizer, size) if tokenizer.vocab_size < size else tokenizer
    ends = [tokenizer.control.ids[token] for token in GROK_2_ENDS if token in tokenizer.control.ids]
    if len(ends) < len(GROK_2_ENDS):
        return padded, config
    ids = tuple(dict.fromkeys((*config.model.eos_token_ids, *ends)))
    return padded, replace(config, model=replace(config.model, eos_token_ids=ids))


def _activations(config: EngineConfig, checkpoint: Checkpoint | None, device: torch.device) -> ActFormat:
    """`config.activations`; None becomes "fp8" where weights in e4m3 meet a GPU that multiplies e4m3."""
    if config.activations is not None:
        return config.activations
    stored = () if checkpoint is None else checkpoint.tensors.values()
    rounded = config.weights == "fp8" or any(info.format == "fp8_e4m3" for info in stored)
    return "fp8" if rounded and grok_kernels.multiplies_fp8(device) else "none"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} cannot be used: {reason}") from None
    return device
