"""Grok-1, Grok-2 and Grok-0, and the configuration keys of xAI's reference code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grok_engine.config import ConfigError, ModelConfig, check_keys, is_int, is_number

from .base import Family

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

# The reference's keys, outside and inside its nested `model`. The ignored ones do not change the forward pass.
_OUTER = {"model", "vocab_size", "eos_token", "sequence_len", "output_multiplier_scale", "embedding_multiplier_scale"}
_OUTER_IGNORED = {
    "pad_token", "embedding_init_scale", "init_scale_override", "shard_embeddings", "model_size", "model_type",
    "fprop_dtype", "name",
}  # fmt: skip
_INNER = {
    "emb_size", "widening_factor", "key_size", "num_q_heads", "num_kv_heads", "num_layers", "attn_output_multiplier",
    "num_experts", "num_selected_experts",
}  # fmt: skip
_INNER_IGNORED = {
    "vocab_size", "name", "capacity_factor", "init_scale", "shard_activations", "data_axis", "model_axis",
}  # fmt: skip


def parse_reference(values: Mapping[str, Any], name: str) -> ModelConfig | None:
    """The architecture in the reference's keys, known by their nested `model`; what they do not say is Grok-1's."""
    if "model" not in values:
        return None
    check_keys(values, _OUTER | _OUTER_IGNORED, _OUTER, "reference configuration")
    inner = values["model"]
    if not isinstance(inner, dict):
        raise ConfigError(f"model={inner!r} is not an object")
    check_keys(inner, _INNER | _INNER_IGNORED, _INNER, "reference configuration, model")
    if "vocab_size" in inner and inner["vocab_size"] != values["vocab_size"]:
        raise ConfigError(f"model.vocab_size={inner['vocab_size']} differs from vocab_size={values['vocab_size']}")
    for key in ("emb_size", "num_experts"):
        if not is_int(inner[key]) or inner[key] < 0:
            raise ConfigError(f"model.{key}={inner[key]!r} is not an integer of 0 or more")
    for key in ("widening_factor", "attn_output_multiplier"):
        if not (is_number(inner[key]) and math.isfinite(inner[key]) and inner[key] > 0):
            raise ConfigError(f"model.{key}={inner[key]!r} is not a finite positive number")
    width = ffn_width(inner["widening_factor"], inner["emb_size"])
    sparse = inner["num_experts"] > 1
    return replace(
        GROK_1,
        name=name,
        vocab_size=values["vocab_size"],
        d_model=inner["emb_size"],
        num_layers=inner["num_layers"],
        num_heads=inner["num_q_heads"],
        num_kv_heads=inner["num_kv_heads"],
        head_dim=inner["key_size"],
        num_experts=inner["num_experts"] if sparse else 0,
        num_experts_per_tok=inner["num_selected_experts"] if sparse else 0,
        d_ff=width if sparse else 0,
        dense_d_ff=0 if sparse else width,
        embedding_multiplier=values["embedding_multiplier_scale"],
        output_multiplier=values["output_multiplier_scale"],
        attn_scale=inner["attn_output_multiplier"],
        max_position=values["sequence_len"],
        eos_token_ids=(values["eos_token"],),
    )


def reference_values(config: ModelConfig) -> dict[str, Any]:
    """`config` in the reference's keys, as `parse_reference` takes them back. ConfigError where they cannot say it."""
    c = config
    return {
        "vocab_size": c.vocab_size,
        "pad_token": 0,
        "eos_token": c.eos_token_ids[0] if c.eos_token_ids else 0,
        "sequence_len": c.max_position,
        "embedding_init_scale": 1.0,
        "output_multiplier_scale": c.output_multiplier,
        "embedding_multiplier_scale": c.embedding_multiplier,
        "model": {
            "emb_size": c.d_model,
            "widening_factor": _widening_factor(c.d_ff, c.d_model),
            "key_size": c.head_dim,
            "num_q_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads,
            "num_layers": c.num_layers,
            "attn_output_multiplier": c.attn_scale,
            "shard_activations": True,
            "num_experts": c.num_experts,
            "num_selected_experts": c.num_experts_per_tok,
            "data_axis": "data",
            "model_axis": "model",
        },
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


GROK = Family(presets=(GROK_1, GROK_2, GROK_0), parse=parse_reference)
