"""The same model as GGUF: the names and keys under which llama.cpp reads Grok's architecture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grok_engine import ModelConfig

# By our names. A matrix (in, out) is stored as (out, in), with the experts in front.
NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
    "moe.router": "ffn_gate_inp",
    "norm.pre_attn": "attn_norm",
    "norm.post_attn": "attn_output_norm",
    "norm.pre_moe": "ffn_norm",
    "norm.post_moe": "layer_output_norm",
}


def gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return f"{NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def write_gguf(path: Path, config: ModelConfig, tensors: Iterable[tuple[str, tuple[Any, Any]]]) -> None:
    """Write matrices in bf16, norms and the router in fp32. `tensors`: (name, (values, scales)), as for `write_xai`."""
    import gguf

    c = config
    writer = gguf.GGUFWriter(path, "grok")
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_expert_feed_forward_length(c.d_ff)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_embedding_scale(c.embedding_multiplier)
    writer.add_logit_scale(c.output_multiplier)
    writer.add_attn_output_scale(c.attn_scale)
    writer.add_attn_logit_softcapping(c.attn_softcap)
    writer.add_router_logit_softcapping(c.router_softcap)
    writer.add_final_logit_softcapping(c.final_softcap)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    stored = {}
    for name, (weight, scales) in tensors:
        values = weight.astype(np.float32)
        if scales is not None:
            values *= np.repeat(scales.astype(np.float32), weight.shape[-2] // scales.shape[-2], axis=-2)
        if name != "embed" and values.ndim > 1:
            values = np.ascontiguousarray(np.swapaxes(values, -1, -2))
        exact = values.ndim == 1 or name.endswith("router")
        kind = gguf.GGMLQuantizationType.F32 if exact else gguf.GGMLQuantizationType.BF16
        stored[gguf_name(name)] = (gguf.quants.quantize(values, kind), kind)
    for name, (data, kind) in stored.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
