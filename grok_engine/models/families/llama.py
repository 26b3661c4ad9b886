"""Llama's architecture: Llama 2 and 3, TinyLlama, SmolLM2 and others that keep its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ModelConfig

from .base import Family
from .hf import DECODER_NAMES, LLAMA_DEFAULTS, MLP_NAMES, HfKeys, llama_fields

DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
}


def parse(values: Mapping[str, Any], name: str) -> ModelConfig:
    keys = HfKeys(values, DEFAULTS)
    return keys.build(name=name, **llama_fields(keys), dense_d_ff=keys.integer("intermediate_size"))


LLAMA = Family(
    presets=(),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    parse=parse,
    spellings=({**DECODER_NAMES, **MLP_NAMES},),
)
