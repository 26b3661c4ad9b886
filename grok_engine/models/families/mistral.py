"""Mistral: dense, with a sliding window."""

from __future__ import annotations

from grok_engine.config import ModelConfig

from .base import Family

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

MISTRAL = Family(presets=(MISTRAL_7B,))
