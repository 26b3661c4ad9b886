"""Which tensors an architecture has, by the engine's names."""

from __future__ import annotations

from grok_engine.config import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape: (…, N, K), outputs before inputs, experts in front."""
    c = config
    d, q, kv = c.d_model, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "norm.pre_attn": (d,),
        "attn.q": (q, d),
        "attn.k": (kv, d),
        "attn.v": (kv, d),
        "attn.o": (d, q),
        "norm.pre_moe": (d,),
    }
    if c.post_norms:
        layer |= {"norm.post_attn": (d,), "norm.post_moe": (d,)}
    if c.num_experts:
        e, f = c.num_experts, c.d_ff
        layer |= {"moe.router": (e, d), "moe.gate": (e, f, d), "moe.up": (e, f, d), "moe.down": (e, d, f)}
    if c.dense_d_ff:
        f = c.dense_d_ff
        layer |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, d)}
    for i in range(c.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm"] = (d,)
    if not c.tie_embeddings:
        shapes["lm_head"] = (c.vocab_size, d)
    return shapes
