"""Mixtral: top-2 of 8 experts, their weights renormalised over the two."""

from __future__ import annotations

from dataclasses import replace

from grok_engine.config import ModelConfig

from .base import Family

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

MIXTRAL = Family(presets=(MIXTRAL_8X7B, MIXTRAL_8X22B))
