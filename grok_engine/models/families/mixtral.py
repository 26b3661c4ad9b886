"""Mixtral: top-2 of 8 experts, their weights renormalised over the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grok_engine.config import ConfigError, ModelConfig

from . import params
from .base import Family, Names, Stacked
from .hf import DECODER_NAMES, LLAMA_DEFAULTS, HfKeys, llama_fields

MIXTRAL_8X7B = ModelConfig(
    name="mixtral-8x7b",
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    d_ff=14336,
    activation="silu",
    post_norms=False,
    renormalize=True,
    rope_theta=1e6,
    tie_embeddings=False,
    max_position=32768,
)
MIXTRAL_8X22B = replace(
    MIXTRAL_8X7B,
    name="mixtral-8x22b",
    d_model=6144,
    num_layers=56,
    num_heads=48,
    d_ff=16384,
    max_position=65536,
)

DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def parse(values: Mapping[str, Any], name: str) -> ModelConfig:
    keys = HfKeys(one_name(values, "num_experts", "num_local_experts"), DEFAULTS)
    return keys.build(
        name=name,
        **llama_fields(keys),
        num_experts=keys.integer("num_local_experts"),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        d_ff=keys.integer("intermediate_size"),
        renormalize=True,
    )


def one_name(values: Mapping[str, Any], alias: str, key: str) -> Mapping[str, Any]:
    """`values` with what stands under `alias` under `key`."""
    if alias not in values:
        return values
    if values.get(key, values[alias]) != values[alias]:
        raise ConfigError(f"{key}={values[key]!r} and {alias}={values[alias]!r}: expected one number")
    return {key: value for key, value in values.items() if key != alias} | {key: values[alias]}


EXPERT_NAMES = {
    "layers.{i}.moe.router": "model.layers.{i}.block_sparse_moe.gate.weight",
    "layers.{i}.moe.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
    "layers.{i}.moe.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
    "layers.{i}.moe.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
}


def stacked_names(block: str) -> Names:
    """As transformers 5 has the experts in memory, and writes them if asked."""
    return {
        "layers.{i}.moe.router": f"model.layers.{{i}}.{block}.gate.weight",
        "layers.{i}.moe.gate": Stacked(f"model.layers.{{i}}.{block}.experts.gate_up_proj", 0, 2),
        "layers.{i}.moe.up": Stacked(f"model.layers.{{i}}.{block}.experts.gate_up_proj", 1, 2),
        "layers.{i}.moe.down": f"model.layers.{{i}}.{block}.experts.down_proj",
    }


def unstacked_names(gate: str, up: str, down: str) -> Names:
    """As tools that quantise transformers 5's experts one by one write them."""
    experts = "model.layers.{i}.mlp.experts.{e}"
    return {
        "layers.{i}.moe.router": "model.layers.{i}.mlp.gate.weight",
        "layers.{i}.moe.gate": f"{experts}.{gate}.weight",
        "layers.{i}.moe.up": f"{experts}.{up}.weight",
        "layers.{i}.moe.down": f"{experts}.{down}.weight",
    }


_EXPERTS = (
    EXPERT_NAMES,
    stacked_names("mlp"),
    stacked_names("block_sparse_moe"),
    unstacked_names("w1", "w3", "w2"),
    unstacked_names("gate_proj", "up_proj", "down_proj"),
)

MIXTRAL = Family(
    presets=(MIXTRAL_8X7B, MIXTRAL_8X22B),
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    parse=parse,
    spellings=(
        *({**DECODER_NAMES, **experts} for experts in _EXPERTS),
        params.EXPERTS,
        params.STACKED_EXPERTS,
    ),
)
