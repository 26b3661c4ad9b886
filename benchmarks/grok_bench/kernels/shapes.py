"""The shapes that are measured: published models, one GPU's share of eight, and a quarter of each model for a CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from grok_engine.config import ModelConfig
from grok_engine.models.families import PRESETS

MODELS = ("grok-1", "grok-2", "mixtral-8x7b", "mixtral-8x22b")
SHARD, QUARTER, SMOKE = "-tp8", "-quarter", "-smoke"
NAMES = tuple(model + scale for model in MODELS for scale in ("", SHARD, QUARTER))


@cache
def shape(name: str) -> ModelConfig:
    """The shape of one of NAMES, or of MODEL-smoke, a tiny size for tests.

    -tp8 is one GPU's share of eight: an eighth of the heads, the expert width and the vocabulary, with all of D.
    -quarter divides all of them and D by four: the same ratios, a sixteenth of the weights.
    """
    for scale in (SHARD, QUARTER, SMOKE):
        if name.endswith(scale):
            whole = PRESETS[name.removesuffix(scale)]
            if scale == SMOKE:
                return replace(whole, name=name, d_model=128, num_heads=4, num_kv_heads=2, d_ff=128, vocab_size=512)
            by = 8 if scale == SHARD else 4
            return replace(
                whole,
                name=name,
                d_model=whole.d_model // (1 if scale == SHARD else by),
                num_heads=whole.num_heads // by,
                num_kv_heads=whole.num_kv_heads // by,
                d_ff=whole.d_ff // by,
                dense_d_ff=whole.dense_d_ff // by,
                vocab_size=whole.vocab_size // by,
            )
    return PRESETS[name]


def smoke(name: str) -> str:
    """The name of the model's tiny size."""
    for scale in (SHARD, QUARTER, SMOKE):
        name = name.removesuffix(scale)
    return name + SMOKE
