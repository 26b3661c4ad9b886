"""Mistral: dense, with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ModelConfig

from . import params
from .base import Family
from .hf import DECODER_NAMES, LLAMA_DEFAULTS, MLP_NAMES, HfKeys, llama_fields

MISTRAL_7B = ModelConfig(
    name="mistral-7b",
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    dense_d_ff=14336,
    activation="silu",
    post_norms=False,
    sliding_window=4096,
    tie_embeddings=False,
    max_position=32768,
)

DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def parse(values: Mapping[str, Any], name: str) -> ModelConfig:
    keys = HfKeys(values, DEFAULTS)
    return keys.build(name=name, **llama_fields(keys), dense_d_ff=keys.integer("intermediate_size"))


MISTRAL = Family(
    presets=(MISTRAL_7B,),
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    parse=parse,
    spellings=({**DECODER_NAMES, **MLP_NAMES}, params.DENSE),
)
