"""Grouped-query attention over paged keys and values."""

from __future__ import annotations

from torch import Tensor, nn

import grok_kernels
from grok_engine.batch import Batch, KVPages
from grok_engine.config import ActFormat, ModelConfig

from .linear import Linear
from .norm import Normed


class Attention(nn.Module):
    """Projections, rotary embedding, attention, output projection."""

    def __init__(self, config: ModelConfig, prefix: str, activations: ActFormat = "none") -> None:
        super().__init__()
        self.config = config
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {f"{prefix}.q": query, f"{prefix}.k": kv, f"{prefix}.v": kv}
        self.qkv = Linear(config.d_model, parts, activations)
        self.o = Linear(query, {f"{prefix}.o": config.d_model}, activations)

    def forward(self, x: Normed, batch: Batch, pages: KVPages, cos_sin: Tensor) -> Tensor:
        """x_TD normed → (T, D). The keys and values of the batch's tokens are in their pages afterwards."""
        c, tokens = self.config, x.x_TD.shape[0]
        q_THC, k_TGC, v_TGC = (y_TN.view(tokens, -1, c.head_dim) for y_TN in self.qkv.split(x.x_TD, x.quantized))
        q_THC = grok_kernels.rope_store_kv(
            q_THC, k_TGC, v_TGC, pages.k, pages.v, batch.positions_T, batch.slots_T, cos_sin,
            pages.k_scale, pages.v_scale,
        )  # fmt: skip
        o_THC = grok_kernels.paged_attention(
            q_THC, pages.k, pages.v, batch.block_table_BN, batch.query_start, batch.seq_lens_B, batch.max_query_len,
            scale=c.attn_scale, softcap=c.attn_softcap, window=c.sliding_window, temperature_len=c.attn_temperature_len,
            k_scale=pages.k_scale, v_scale=pages.v_scale,
        )  # fmt: skip
        out_TD: Tensor = self.o(o_THC.view(tokens, -1))
        return out_TD
