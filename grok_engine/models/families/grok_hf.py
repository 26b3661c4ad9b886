"""Grok-1 and Grok-2 in the keys and the tensor names of their files for transformers and SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grok_engine.config import ModelConfig

from .base import Family, Names
from .grok import GROK_0, GROK_1, GROK_2
from .hf import ATTENTION_NAMES, MLP_NAMES, HfKeys
from .mixtral import EXPERT_NAMES, one_name

# Constants that old files do not carry are Grok-1's; Grok-2's files carry its own.
DEFAULTS: dict[str, Any] = {
    "vocab_size": GROK_1.vocab_size,
    "hidden_size": GROK_1.d_model,
    "intermediate_size": GROK_1.d_ff,
    "moe_intermediate_size": None,
    "num_hidden_layers": GROK_1.num_layers,
    "num_attention_heads": GROK_1.num_heads,
    "num_key_value_heads": GROK_1.num_kv_heads,
    "head_dim": None,
    "num_local_experts": GROK_1.num_experts,
    "num_experts_per_tok": GROK_1.num_experts_per_tok,
    "max_position_embeddings": GROK_1.max_position,
    "attn_output_multiplier": None,
    "attn_logit_softcapping": GROK_1.attn_softcap,
    "router_logit_softcapping": GROK_1.router_softcap,
    "final_logit_softcapping": GROK_1.final_softcap,
    "embedding_multiplier_scale": GROK_1.embedding_multiplier,
    "output_multiplier_scale": GROK_1.output_multiplier,
    "residual_moe": False,
    "rope_theta": GROK_1.rope_theta,
    "attn_temperature_len": 0,
    "rms_norm_eps": GROK_1.norm_eps,
    "tie_word_embeddings": None,  # Grok-1 is tied, Grok-2 is not, and its file does not say so
    "bos_token_id": GROK_1.bos_token_id,
    "eos_token_id": 2,
    "sliding_window_size": None,
}


def parse(values: Mapping[str, Any], name: str) -> ModelConfig:
    values = one_name(values, "num_experts", "num_local_experts")
    keys = HfKeys(one_name(values, "max_attn_value", "attn_logit_softcapping"), DEFAULTS)
    keys.unserved("rope_type", "original", "default")  # the scaling factors beside "original" change no frequency
    keys.unserved("rope_scaling")
    keys.unserved("attn_logit_softcapping_method", "tanh")
    keys.unserved("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    if values.get("global_attn_every_n", 1) != 1:  # with 1, no layer has the window
        keys.unserved("sliding_window_size", -1, 0)
    dense = keys.flag("residual_moe")
    d, heads, width = (keys.integer(key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head_dim = keys.integer("head_dim", null=d // max(heads, 1))
    scale = 0.0 if keys.get("attn_output_multiplier") is None else keys.number("attn_output_multiplier")
    tied = not dense if keys.get("tie_word_embeddings") is None else keys.flag("tie_word_embeddings")
    return keys.build(
        name=name,
        vocab_size=keys.integer("vocab_size"),
        d_model=d,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", null=heads),
        head_dim=head_dim,
        num_experts=keys.integer("num_local_experts"),
        num_experts_per_tok=keys.integer("num_experts_per_tok"),
        d_ff=keys.integer("moe_intermediate_size", null=width),
        dense_d_ff=width if dense else 0,
        # whatever `hidden_act` says: ports of Grok-1 say "gelu", which is erf elsewhere, and the model has tanh
        activation=GROK_2.activation if dense else GROK_1.activation,
        attn_softcap=keys.number("attn_logit_softcapping"),
        router_softcap=keys.number("router_logit_softcapping"),
        final_softcap=keys.number("final_logit_softcapping"),
        embedding_multiplier=keys.number("embedding_multiplier_scale"),
        output_multiplier=keys.number("output_multiplier_scale"),
        attn_scale=scale,
        rope_theta=keys.number("rope_theta"),
        attn_temperature_len=keys.integer("attn_temperature_len", null=0),
        tie_embeddings=tied,
        norm_eps=keys.number("rms_norm_eps"),
        max_position=keys.integer("max_position_embeddings"),
        bos_token_id=keys.token("bos_token_id"),
        eos_token_ids=keys.tokens("eos_token_id"),
    )


def _norms(layer: str, *names: str) -> dict[str, str]:
    ours = ("pre_attn", "post_attn", "pre_moe", "post_moe")
    return {f"layers.{{i}}.norm.{our}": f"{layer}.{name}" for our, name in zip(ours, names, strict=True)}


_NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
_EXPERT = {"gate": "linear", "up": "linear_v", "down": "linear_1"}

RELEASED: Names = {
    "embed": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    **_norms("model.layers.{i}", *(f"{name}.weight" for name in _NORMS)),
    **ATTENTION_NAMES,
    **MLP_NAMES,
    **EXPERT_NAMES,
}


def _hpcai(norm: str) -> Names:
    """As hpcai-tech converted Grok-1; a norm's tensor is called `weight` or `scale`."""
    layer = "model.layers.{i}"
    return {
        "embed": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
        "final_norm": f"model.norm.{norm}",
        **_norms(layer, *(f"{name}.{norm}" for name in _NORMS)),
        **{f"layers.{{i}}.attn.{name}": f"{layer}.attn.{name}_proj.weight" for name in ("q", "k", "v", "o")},
        "layers.{i}.moe.router": f"{layer}.moe_block.gate.weight",
        **{f"layers.{{i}}.moe.{k}": f"{layer}.moe_block.experts.{{e}}.{v}.weight" for k, v in _EXPERT.items()},
    }


def _keyfan(norm: str) -> Names:
    """As keyfan converted Grok-1, in the names of xAI's reference."""
    layer, attention = "transformer.decoder_layer.{i}", {"q": "query", "k": "key", "v": "value", "o": "linear"}
    return {
        "embed": "transformer.in_out_embed.weight",
        "lm_head": "lm_head.weight",
        "final_norm": f"transformer.rms_norm.{norm}",
        **_norms(layer, *(f"rms_norm{suffix}.{norm}" for suffix in ("", "_1", "_2", "_3"))),
        **{f"layers.{{i}}.attn.{k}": f"{layer}.multi_head_attention.{v}.weight" for k, v in attention.items()},
        "layers.{i}.moe.router": f"{layer}.router.weight",
        **{f"layers.{{i}}.moe.{k}": f"{layer}.moe.{{e}}.{v}.weight" for k, v in _EXPERT.items()},
    }


GROK = Family(
    presets=(GROK_1, GROK_2, GROK_0),
    architectures=("Grok1ForCausalLM", "Grok1ModelForCausalLM"),
    model_types=("grok-1", "grok-2", "git"),
    parse=parse,
    spellings=(RELEASED, *(style(norm) for style in (_hpcai, _keyfan) for norm in ("weight", "scale"))),
)
