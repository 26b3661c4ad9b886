"""A random model of Grok's architecture at 1.30 B parameters, small enough to decode on two cores of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grok_engine import ModelConfig
from grok_engine.checkpoint.xai.layout import layout
from grok_engine.checkpoint.xai.writer import write_xai
from grok_engine.models.families import preset


def configuration(layers: int = 8) -> ModelConfig:
    """D 1536, 12 query and 2 key heads of 128, F 4096, 8 experts, V 32000: 1.30 B parameters in 8 layers."""
    return replace(
        preset("grok-1"),
        name="grok-1.30b",
        vocab_size=32000,
        d_model=1536,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=2,
        d_ff=4096,
        max_position=2048,
    )


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (values, scales)) of every tensor in the release's layout: int8 matrices, the rest fp32 without scales."""
    rng = np.random.default_rng(0)
    for spec in layout(config):
        if spec.quantizable:
            weight = rng.integers(-127, 128, spec.shape, np.int8)
            yield spec.name, (weight, np.full(spec.scales_shape(1), 0.02 / 127, ml_dtypes.bfloat16))
        elif len(spec.shape) == 1:
            yield spec.name, (np.ones(spec.shape, np.float32), None)
        else:
            values = rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5
            yield spec.name, (values.astype(np.float32), None)


def write(folder: Path, config: ModelConfig) -> None:
    """Write the model to `folder` in the release's format."""
    write_xai(folder, config, random_tensors(config), overwrite=True)
