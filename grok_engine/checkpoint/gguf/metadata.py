"""From an architecture to the metadata of a GGUF file: `parse_metadata` the other way round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.config import ModelConfig

from .config import parse_metadata
from .header import Header, Place

EXACT = 1e-6  # numbers are fp32 in a file


def gguf_metadata(config: ModelConfig, tokenizer: Mapping[str, Any], tensors: Mapping[str, Place]) -> dict[str, Any]:
    """The metadata of a model that llama.cpp runs, in its architecture llama or grok.

    tokenizer: the keys of its tokenizer. tensors: of the file. CheckpointError names every field that neither
    architecture can say, or that llama.cpp would not follow.
    """
    arch = "grok" if config.post_norms else "llama"
    config = _with_tokens_of(tokenizer, config)
    values = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": config.name,
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in _keys(config, arch).items()},
        **tokenizer,
        **_special_tokens(config),
    }
    problems = [*_unfollowed(config, arch)]
    if not problems:
        header = Header(Path(config.name), values, tensors, 0, 0, 0)
        back = parse_metadata(header, tensors, config.rope_factors)
        problems = [
            f"{f.name}={getattr(config, f.name)!r} would be read as {getattr(back, f.name)!r}"
            for f in fields(config)
            if f.name != "name" and not _same(getattr(config, f.name), getattr(back, f.name))
        ]
    if problems:
        head = f"model {config.name!r}: GGUF's architecture {arch} cannot say it, or llama.cpp would not follow it:"
        raise CheckpointError("\n  ".join([head, *problems]), tuple(problems))
    return values


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=EXACT)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _unfollowed(config: ModelConfig, arch: str) -> Iterator[str]:
    """What our reader would take, and llama.cpp's code of the architecture does not compute."""
    c = config
    if 0 < c.sliding_window < c.max_position:
        yield f"sliding_window={c.sliding_window}: attention is over all of max_position={c.max_position} there"
    if arch == "llama" and not math.isclose(c.attn_scale, c.head_dim**-0.5, rel_tol=EXACT):
        yield f"attn_scale={c.attn_scale}: expected head_dim ** -0.5"
    if arch == "llama" and c.num_experts and not c.renormalize:
        yield "renormalize=False: the weights of the chosen experts add up to 1 there"
    if arch == "grok":
        if c.num_heads * c.head_dim != c.d_model:
            yield f"num_heads * head_dim = {c.num_heads * c.head_dim}: expected d_model={c.d_model}"
        if not c.num_experts:
            yield "num_experts=0: expected experts"
        if c.rope_factors:
            yield "rope_factors are not read"


def _keys(config: ModelConfig, arch: str) -> dict[str, Any]:
    c = config
    keys: dict[str, Any] = {
        "block_count": c.num_layers,
        "context_length": c.max_position,
        "embedding_length": c.d_model,
        "feed_forward_length": c.dense_d_ff or c.d_ff,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": _fp32(c.norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": _fp32(c.rope_theta),
    }
    if c.num_experts:
        keys |= {
            "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.d_ff,
            "expert_weights_norm": c.renormalize,
        }
    if arch == "grok":
        keys |= {
            "embedding_scale": _fp32(c.embedding_multiplier),
            "logit_scale": _fp32(c.output_multiplier),
            "attention.output_scale": _fp32(c.attn_scale),
            "attn_logit_softcapping": _fp32(c.attn_softcap),
            "router_logit_softcapping": _fp32(c.router_softcap),
            "final_logit_softcapping": _fp32(c.final_softcap),
        }
        if c.attn_temperature_len:
            keys["attention.temperature_length"] = c.attn_temperature_len
    return keys


def _fp32(value: float) -> float:
    return float(np.float32(value))


def _with_tokens_of(tokenizer: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The tokens that begin and end a text, the tokenizer's own before those of the configuration: readers put them
    around prompts, and templates name them."""
    eos = tokenizer.get("tokenizer.ggml.eos_token_id")
    ends = dict.fromkeys((*(() if eos is None else (eos,)), *config.eos_token_ids))
    bos = tokenizer.get("tokenizer.ggml.bos_token_id", config.bos_token_id)
    return replace(config, bos_token_id=bos, eos_token_ids=tuple(ends))


def _special_tokens(config: ModelConfig) -> dict[str, int]:
    """The tokens that begin and end a text; llama.cpp has three keys for those that end one."""
    found = {} if config.bos_token_id is None else {"bos": config.bos_token_id}
    found |= dict(zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False))
    return {f"tokenizer.ggml.{kind}_token_id": token for kind, token in found.items()}
