"""From an architecture to the `config.json` that says it: `parse_config` the other way round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from grok_engine.checkpoint.base import CheckpointError
from grok_engine.config import ConfigError, ModelConfig
from grok_engine.models.families import family_of, parse_config
from grok_engine.models.families.base import Family

# Of a file's own values, what no longer holds: how it was quantised, and code that does not come along.
_DROPPED = ("quantization_config", "compression_config", "auto_map", "torch_dtype", "dtype")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def hf_values(config: ModelConfig, source: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a model, and its `config.json` in the keys of transformers without dtype and quantisation.

    source: the `config.json` that it was read from, kept where it is in those keys already; empty for other files.
    CheckpointError names every field that no family can say.
    """
    family = family_of(source)
    if family is not None:
        return family, {key: value for key, value in source.items() if key not in _DROPPED}
    least: list[str] | None = None
    for values in _candidates(config):
        try:
            lost = _lost(config, parse_config(values, config.name))
        except ConfigError as error:
            lost = [str(error)]
        if not lost:
            family = family_of(values)
            assert family is not None
            return family, values
        least = lost if least is None or len(lost) < len(least) else least
    assert least is not None
    raise CheckpointError(
        f"model {config.name!r}: no architecture of the hub that is written here has it: {'; '.join(least)}",
        tuple(least),
    )


def _lost(config: ModelConfig, back: ModelConfig) -> list[str]:
    """What would not come back as it is."""
    pairs = [(f.name, getattr(config, f.name), getattr(back, f.name)) for f in fields(config) if f.name != "name"]
    return [f"{name}={ours!r} would be read as {theirs!r}" for name, ours, theirs in pairs if not _same(ours, theirs)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):  # factors of a GGUF file are fp32 numbers
        return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _candidates(config: ModelConfig) -> Iterator[dict[str, Any]]:
    if config.post_norms or config.attn_softcap or (config.dense_d_ff and config.num_experts):
        yield _grok(config)
        return
    kinds = ("Mixtral",) if config.num_experts else ("Mistral",) if config.sliding_window else ("Llama", "Mistral")
    for kind in kinds:
        for rope in _ropes(config):
            yield {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), **_llama(config, kind, rope)}


def _ropes(config: ModelConfig) -> Iterator[dict[str, Any] | None]:
    """The rotary scalings whose factors may be the model's."""
    if not (factors := config.rope_factors):
        yield None
        return
    yield {"rope_type": "linear", "factor": factors[0]}
    for original in (8192, config.max_position):
        yield {**_LLAMA_3, "factor": factors[-1], "original_max_position_embeddings": original}


def _llama(config: ModelConfig, kind: str, rope: dict[str, Any] | None) -> dict[str, Any]:
    c = config
    values = {
        **_common(c),
        "intermediate_size": c.d_ff if c.num_experts else c.dense_d_ff,
        "hidden_act": _ACTIVATIONS[c.activation],
        "rope_scaling": rope,
    }
    if kind != "Llama":
        values["sliding_window"] = c.sliding_window or None
    if kind == "Mixtral":
        values |= {"num_local_experts": c.num_experts, "num_experts_per_tok": c.num_experts_per_tok}
    return values


def _grok(config: ModelConfig) -> dict[str, Any]:
    """In the keys of Grok-2's release, which the ports of Grok-1 share."""
    c, dense = config, config.dense_d_ff > 0
    return {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "grok-2" if dense else "grok-1",
        **_common(c),
        "intermediate_size": c.dense_d_ff or c.d_ff,
        **({"moe_intermediate_size": c.d_ff, "residual_moe": True} if dense else {}),
        "hidden_act": "gelu" if dense else "gelu_pytorch_tanh",
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "attn_output_multiplier": c.attn_scale,
        "attn_logit_softcapping": c.attn_softcap,
        "router_logit_softcapping": c.router_softcap,
        "final_logit_softcapping": c.final_softcap,
        "embedding_multiplier_scale": c.embedding_multiplier,
        "output_multiplier_scale": c.output_multiplier,
        "attn_temperature_len": c.attn_temperature_len,
        "load_presharded_moe": False,  # SGLang would look for a file for each rank
    }


def _common(config: ModelConfig) -> dict[str, Any]:
    c, eos = config, config.eos_token_ids
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
