"""Grok-1, Grok-2 and Grok-0, and the configuration keys of xAI's reference code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grok_engine.config import ConfigError, ModelConfig, check_keys, is_int, is_number

GROK_1 = ModelConfig(
    name="grok-1",
    vocab_size=131072,
    d_model=6144,
    num_layers=64,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    d_ff=32768,
    attn_softcap=30.0,
    embedding_multiplier=78.38367176906169,
    output_multiplier=0.5773502691896257,
)
GROK_2 = replace(
    GROK_1,
    name="grok-2",
    d_model=8192,
    num_heads=64,
    d_ff=16384,
    dense_d_ff=32768,
    activation="gelu",
    router_softcap=30.0,
    final_softcap=50.0,
    embedding_multiplier=90.50966799187809,
    output_multiplier=0.5,
    rope_theta=208533496.0,
    attn_temperature_len=1024,
    tie_embeddings=False,
    max_position=131072,
)
# Published only as "33 B, dense": Grok-1's attention, and the feed-forward width that gives 33 B parameters.
GROK_0 = replace(GROK_1, name="grok-0", num_experts=0, num_experts_per_tok=0, d_ff=0, dense_d_ff=22528)

# The reference's keys, outside and inside its nested `model`, and what we call them.
_OUTER = {
    "vocab_size": "vocab_size",
    "sequence_len": "max_position",
    "output_multiplier_scale": "output_multiplier",
    "embedding_multiplier_scale": "embedding_multiplier",
}
_INNER = {
    "emb_size": "d_model",
    "key_size": "head_dim",
    "num_q_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "num_layers": "num_layers",
    "attn_output_multiplier": "attn_scale",
    "num_experts": "num_experts",
    "num_selected_experts": "num_experts_per_tok",
}
# What does not change the forward pass, and is ignored; values are those to write.
_OUTER_WRITTEN = {"pad_token": 0, "embedding_init_scale": 1.0}
_OUTER_IGNORED = {
    *_OUTER_WRITTEN, "init_scale_override", "shard_embeddings", "model_size", "model_type", "fprop_dtype", "name",
}  # fmt: skip
_INNER_WRITTEN = {"shard_activations": True, "data_axis": "data", "model_axis": "model"}
_INNER_IGNORED = {*_INNER_WRITTEN, "vocab_size", "name", "capacity_factor", "init_scale"}


def parse_reference(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The architecture in the reference's keys, which have a nested `model`; what they do not say is Grok-1's."""
    outer_keys, inner_keys = {*_OUTER, "model", "eos_token"}, {*_INNER, "widening_factor"}
    check_keys(values, outer_keys | _OUTER_IGNORED, outer_keys, "reference configuration")
    inner = values["model"]
    if not isinstance(inner, dict):
        raise ConfigError(f"model={inner!r} is not an object")
    check_keys(inner, inner_keys | _INNER_IGNORED, inner_keys, "reference configuration, model")
    if "vocab_size" in inner and inner["vocab_size"] != values["vocab_size"]:
        raise ConfigError(f"model.vocab_size={inner['vocab_size']} differs from vocab_size={values['vocab_size']}")
    for key in ("emb_size", "num_experts"):
        if not is_int(inner[key]) or inner[key] < 0:
            raise ConfigError(f"model.{key}={inner[key]!r} is not an integer of 0 or more")
    for key in ("widening_factor", "attn_output_multiplier"):
        if not (is_number(inner[key]) and math.isfinite(inner[key]) and inner[key] > 0):
            raise ConfigError(f"model.{key}={inner[key]!r} is not a finite positive number")
    width = ffn_width(inner["widening_factor"], inner["emb_size"])
    fields = {ours: values[key] for key, ours in _OUTER.items()} | {ours: inner[key] for key, ours in _INNER.items()}
    if inner["num_experts"] > 1:
        fields |= {"d_ff": width}
    else:
        fields |= {"num_experts": 0, "num_experts_per_tok": 0, "d_ff": 0, "dense_d_ff": width}
    return replace(GROK_1, name=name, eos_token_ids=(values["eos_token"],), **fields)


def reference_values(config: ModelConfig) -> dict[str, Any]:
    """`config` in the reference's keys, as `parse_reference` takes them back. ConfigError where they cannot say it."""
    c = config
    inner = {key: getattr(c, ours) for key, ours in _INNER.items()}
    return {
        **{key: getattr(c, ours) for key, ours in _OUTER.items()},
        "eos_token": c.eos_token_ids[0] if c.eos_token_ids else 0,
        **_OUTER_WRITTEN,
        "model": {**inner, "widening_factor": _widening_factor(c.d_ff, c.d_model), **_INNER_WRITTEN},
    }


def ffn_width(widening_factor: float, d_model: int) -> int:
    """F of the reference: two thirds of the widened width, rounded up to a multiple of 8."""
    return -(-(int(widening_factor * d_model) * 2 // 3) // 8) * 8


def _widening_factor(d_ff: int, d_model: int) -> float:
    """A factor for which `ffn_width` gives exactly this width; an integer where one does."""
    widened = -(-d_ff * 3 // 2)
    whole = [widened // d_model, widened // d_model + 1]
    # Half a unit above each product, so that its floating-point error cannot cross an integer.
    for factor in [*whole, *((widened - back + 0.5) / d_model for back in range(12))]:
        if ffn_width(factor, d_model) == d_ff:
            return factor
    raise ConfigError(f"d_ff={d_ff}: expected a multiple of 8, as the reference rounds up to one")
