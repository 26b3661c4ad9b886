"""Mistral's own files: the keys of `params.json`, and the names of tensors in `consolidated*.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ConfigError, check_keys, shown

from .base import Flat, Interleaved, Names

# Their keys → those of transformers
_REQUIRED = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "use_biases": "attention_bias",
}
_EXPERTS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}  # of `moe`
_IGNORED = {"model_type", "max_batch_size"}


def is_params(values: Mapping[str, Any]) -> bool:
    """Whether these are the values of a `params.json`."""
    return "dim" in values and "n_layers" in values


def has_experts(values: Mapping[str, Any]) -> bool:
    return values.get("moe") is not None


def in_keys_of_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as a `config.json` has them. What they do not say: no window, a context of 32768, and theta 1e6,
    or 1e4 with a window, as of Mistral 7B v0.1. ConfigError for keys whose meaning is not known."""
    known, moe = _REQUIRED | _OPTIONAL, values.get("moe")
    check_keys(values, {*known, *_IGNORED, "moe"}, set(_REQUIRED), "params.json")
    given = {theirs: values[key] for key, theirs in known.items() if values.get(key) is not None}
    if moe is not None:
        if not isinstance(moe, dict):
            raise ConfigError(f"params.json: moe={shown(moe)} is not an object")
        check_keys(moe, set(_EXPERTS), set(_EXPERTS), "params.json: moe")
        given |= {theirs: moe[key] for key, theirs in _EXPERTS.items()}
    theta = 1e4 if given.get("sliding_window") else 1e6
    return {"sliding_window": None, "max_position_embeddings": 32768, "rope_theta": theta, **given}


_DECODER: Names = {
    "embed": "tok_embeddings.weight",
    "layers.{i}.attn.q": Interleaved("layers.{i}.attention.wq.weight"),
    "layers.{i}.attn.k": Interleaved("layers.{i}.attention.wk.weight"),
    "layers.{i}.attn.v": "layers.{i}.attention.wv.weight",
    "layers.{i}.attn.o": "layers.{i}.attention.wo.weight",
    "layers.{i}.norm.pre_attn": "layers.{i}.attention_norm.weight",
    "layers.{i}.norm.pre_moe": "layers.{i}.ffn_norm.weight",
    "final_norm": "norm.weight",
    "lm_head": "output.weight",
}
_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
DENSE: Names = {
    **_DECODER,
    **{f"layers.{{i}}.mlp.{ours}": f"layers.{{i}}.feed_forward.{w}.weight" for ours, w in _MATRICES.items()},
}
EXPERTS: Names = {
    **_DECODER,
    "layers.{i}.moe.router": "layers.{i}.feed_forward.gate.weight",
    **{
        f"layers.{{i}}.moe.{ours}": f"layers.{{i}}.feed_forward.experts.{{e}}.{w}.weight"
        for ours, w in _MATRICES.items()
    },
}
# The first release of Mixtral 8x7B: the experts below one another, and w2 as its transpose.
STACKED_EXPERTS: Names = {
    **_DECODER,
    "layers.{i}.moe.router": "layers.{i}.block_sparse_moe.gate.weight",
    **{
        f"layers.{{i}}.moe.{ours}": Flat(f"layers.{{i}}.block_sparse_moe.{w}", transposed=ours == "down")
        for ours, w in _MATRICES.items()
    },
}
