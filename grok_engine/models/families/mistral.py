"""Mistral: dense, with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ModelConfig, check_keys

from .base import Family, Interleaved, Names
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


# Mistral's own files, `params.json` and `consolidated.safetensors`: keys, and names of tensors.
_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_PARAMS_MORE = {
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
_PARAMS_IGNORED = {"model_type", "max_batch_size"}


def is_params(values: Mapping[str, Any]) -> bool:
    """Whether these are the values of a `params.json`."""
    return "dim" in values and "n_layers" in values


def parse_params(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The architecture of a `params.json`. What it does not say: no window, a context of 32768, and theta 1e6, or 1e4
    with a window, as of v0.1."""
    known = _PARAMS | _PARAMS_MORE
    check_keys(values, {*known, *_PARAMS_IGNORED}, set(_PARAMS), "params.json")
    given = {theirs: values[key] for key, theirs in known.items() if values.get(key) is not None}
    theta = 1e4 if given.get("sliding_window") else 1e6
    return parse({"sliding_window": None, "max_position_embeddings": 32768, "rope_theta": theta, **given}, name)


CONSOLIDATED: Names = {
    "embed": "tok_embeddings.weight",
    "layers.{i}.attn.q": Interleaved("layers.{i}.attention.wq.weight"),
    "layers.{i}.attn.k": Interleaved("layers.{i}.attention.wk.weight"),
    "layers.{i}.attn.v": "layers.{i}.attention.wv.weight",
    "layers.{i}.attn.o": "layers.{i}.attention.wo.weight",
    "layers.{i}.norm.pre_attn": "layers.{i}.attention_norm.weight",
    "layers.{i}.norm.pre_moe": "layers.{i}.ffn_norm.weight",
    "layers.{i}.mlp.gate": "layers.{i}.feed_forward.w1.weight",
    "layers.{i}.mlp.up": "layers.{i}.feed_forward.w3.weight",
    "layers.{i}.mlp.down": "layers.{i}.feed_forward.w2.weight",
    "final_norm": "norm.weight",
    "lm_head": "output.weight",
}

MISTRAL = Family(
    presets=(MISTRAL_7B,),
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    parse=parse,
    spellings=({**DECODER_NAMES, **MLP_NAMES}, CONSOLIDATED),
)
