"""The shapes that are measured: published models, one GPU's share of eight, a quarter of each model, and a user's."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

from grok_engine.config import ModelConfig
from grok_engine.models.families import PRESETS

MODELS = ("grok-1", "grok-2", "mixtral-8x7b", "mixtral-8x22b")
SHARD, QUARTER, SMOKE = "-tp8", "-quarter", "-smoke"
_own: dict[str, ModelConfig] = {}


def model(name: str, like: str = "grok-1", **sizes: object) -> None:
    """Add a model to the shapes: that of `like`, with other sizes (members of `ModelConfig`). ConfigError."""
    _own[name] = _sized(shape(like), name, sizes)


def names() -> list[str]:
    return [name + scale for name in MODELS for scale in ("", SHARD, QUARTER)] + list(_own)


@cache
def shape(name: str) -> ModelConfig:
    """The shape of one of `names()`, of MODEL-smoke, a tiny size for tests, or of MODEL:SIZE=VALUE,...

    -tp8 is one GPU's share of eight: an eighth of the heads, the expert width and the vocabulary, with all of D.
    -quarter divides all of them and D by four: the same ratios, a sixteenth of the weights.
    """
    base, sign, sizes = name.partition(":")
    if sign:
        changes = (size.partition("=") for size in sizes.split(","))
        return _sized(shape(base), name, {key: json.loads(value) for key, _, value in changes})
    scale = next((scale for scale in (SHARD, QUARTER, SMOKE) if name.endswith(scale)), "")
    if not scale or name in _own:
        if name not in _own and name not in PRESETS:
            raise ValueError(f"there is no model {name!r}: expected one of {', '.join(names())}")
        return _own.get(name) or PRESETS[name]
    whole = shape(name.removesuffix(scale))
    if scale == SMOKE:
        return replace(whole, name=name, d_model=128, num_heads=4, num_kv_heads=2, d_ff=128, vocab_size=512)
    by = 8 if scale == SHARD else 4
    divided = ("num_heads", "num_kv_heads", "d_ff", "dense_d_ff", "vocab_size", *(("d_model",) if by == 4 else ()))
    return replace(whole, name=name, **{size: getattr(whole, size) // by for size in divided})


def _sized(like: ModelConfig, name: str, sizes: dict[str, object]) -> ModelConfig:
    scale = {"attn_scale": 0} if "head_dim" in sizes else {}  # by the size of a head
    return ModelConfig.from_dict({**like.to_dict(), **scale, **sizes, "name": name})


def smoke(name: str) -> str:
    """The name of the model's tiny size."""
    name = name.partition(":")[0]
    for scale in (SHARD, QUARTER, SMOKE):
        name = name.removesuffix(scale)
    return name and name + SMOKE
