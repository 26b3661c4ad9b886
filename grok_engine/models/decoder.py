"""The one decoder: every family is this code with another configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grok_engine.batch import Batch, KVPages
from grok_engine.config import ActFormat, ModelConfig, WeightFormat
from grok_engine.layers.attention import Attention
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.linear import Linear, head_product
from grok_engine.layers.moe import feed_forward
from grok_engine.layers.norm import Fp8Reader, Residual, RMSNorm
from grok_engine.layers.rotary import rotary_table


class DecoderLayer(nn.Module):
    """h += post_attn(attn(pre_attn(h))); h += post_moe(feed_forward(pre_moe(h)))."""

    def __init__(self, config: ModelConfig, index: int, activations: ActFormat) -> None:
        super().__init__()
        prefix = f"layers.{index}"

        def norm(name: str, fp8_for: Fp8Reader | None = None) -> RMSNorm:
            fp8 = fp8_for if activations == "fp8" else None
            return RMSNorm(f"{prefix}.norm.{name}", config.d_model, config.norm_eps, fp8)

        self.pre_attn, self.pre_moe = norm("pre_attn", "linear"), norm("pre_moe", "experts")
        self.post_attn = norm("post_attn") if config.post_norms else None
        self.post_moe = norm("post_moe") if config.post_norms else None
        self.attn = Attention(config, f"{prefix}.attn", activations)
        self.feed_forward = feed_forward(config, prefix, activations)

    def forward(self, h: Residual, batch: Batch, pages: KVPages, cos_sin: Tensor, routed: list[Tensor] | None) -> None:
        h.add(self.attn(h.normed(self.pre_attn), batch, pages, cos_sin), self.post_attn)
        h.add(self.feed_forward(h.normed(self.pre_moe), routed), self.post_moe)


class Decoder(nn.Module):
    """From tokens and pages to logits. It is built without weights, which loading fills in.

    activations: the format that the layers quantise their inputs to, as in `EngineConfig`.
    head: the format that the output head is converted to, as in `EngineConfig`. With one, a tied head is a weight of
    its own, filled from the embedding's tensor.
    max_positions: length of the table of rotary angles; 0 is the model's own.
    """

    cos_sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_positions: int = 0,
        activations: ActFormat = "none",
        head: WeightFormat | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.activations, self.head = config, dtype, activations, head
        self.embed = Embedding("embed", config.vocab_size, config.d_model, tied=config.tie_embeddings)
        self.layers = nn.ModuleList(DecoderLayer(config, i, activations) for i in range(config.num_layers))
        self.final_norm = RMSNorm("final_norm", config.d_model, config.norm_eps)
        tied = config.tie_embeddings
        source = "embed" if tied else "lm_head"
        self.lm_head = None if tied and head is None else Linear(config.d_model, {source: config.vocab_size})
        table = rotary_table(config, max_positions or config.max_position, device)
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(self, batch: Batch, cache: Sequence[KVPages], routed: list[Tensor] | None = None) -> Tensor:
        """x_TD, the final norm's output for every token; their keys and values are in the cache afterwards.

        routed: gets the experts (T, A) int32 that each layer's router chooses, in the order of the layers.
        """
        h = Residual(self.embed(batch.tokens_T, self.config.embedding_multiplier, self.dtype))
        for layer, pages in zip(self.layers, cache, strict=True):
            layer(h, batch, pages, self.cos_sin, routed)
        return h.normed(self.final_norm).x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TV in fp32 of rows of `forward`'s result."""
        logits_TV = head_product(x_TD, self.embed if self.lm_head is None else self.lm_head, self.activations)
        if self.config.output_multiplier != 1:
            logits_TV = logits_TV.mul_(self.config.output_multiplier)  # in place: nothing else refers to them
        if cap := self.config.final_softcap:
            logits_TV = cap * torch.tanh(logits_TV / cap)
        return logits_TV
