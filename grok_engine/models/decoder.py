"""The one decoder: every family is this code with another configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grok_engine.config import ActFormat, ModelConfig
from grok_engine.layers.attention import Attention
from grok_engine.layers.embedding import Embedding
from grok_engine.layers.linear import Linear
from grok_engine.layers.moe import feed_forward
from grok_engine.layers.norm import Normed, RMSNorm, add_and_norm, fuses_fp8
from grok_engine.layers.rotary import rotary_table
from grok_engine.runtime.batch import Batch, KVPages


class DecoderLayer(nn.Module):
    """h += post(attention(pre h)); h += post(feed_forward(pre h)), each norm run with the addition before it."""

    def __init__(self, config: ModelConfig, index: int, activations: ActFormat) -> None:
        super().__init__()
        prefix = f"layers.{index}"

        def norm(name: str) -> RMSNorm:
            return RMSNorm(f"{prefix}.norm.{name}", config.d_model, config.norm_eps)

        self.pre_attn, self.pre_moe = norm("pre_attn"), norm("pre_moe")
        self.post_attn = norm("post_attn") if config.post_norms else None
        self.post_moe = norm("post_moe") if config.post_norms else None
        self.attn = Attention(config, f"{prefix}.attn", activations)
        self.feed_forward = feed_forward(config, prefix, activations)
        # once more in a tuple: nn.Module finds a submodule by name only after it has looked everywhere else
        self._steps = (self.attn, self.post_attn, self.pre_moe, self.feed_forward, self.post_moe)

    def forward(
        self,
        h_TD: Tensor,
        x: Normed,
        batch: Batch,
        pages: KVPages,
        cos_sin: Tensor,
        next_norm: RMSNorm,
        fp8: tuple[bool, bool],
    ) -> tuple[Tensor, Normed]:
        """From the residual h and x = pre_attn(h) to the next residual and next_norm of it.

        fp8: which of the two norms on the way, pre_moe and next_norm, quantise their output as well.
        """
        attn, post_attn, pre_moe, feed_forward, post_moe = self._steps
        h_TD, x = add_and_norm(h_TD, attn(x, batch, pages, cos_sin), post_attn, pre_moe, fp8[0])
        return add_and_norm(h_TD, feed_forward(x), post_moe, next_norm, fp8[1])


class Decoder(nn.Module):
    """Tokens and pages to logits. Built without weights: `grok_engine.loading.load` fills it. activations: as in `EngineConfig`,
    for the layers; the output head takes rows as they are."""

    cos_sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_positions: int = 0,
        activations: ActFormat = "none",
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.activations = config, dtype, activations
        self.embed = Embedding("embed", config.vocab_size, config.d_model, tied=config.tie_embeddings)
        self.layers = nn.ModuleList(DecoderLayer(config, i, activations) for i in range(config.num_layers))
        self.final_norm = RMSNorm("final_norm", config.d_model, config.norm_eps)
        tied = config.tie_embeddings
        self.lm_head = None if tied else Linear(config.d_model, {"lm_head": config.vocab_size})
        table = rotary_table(config, max_positions or config.max_position, device)
        self.register_buffer("cos_sin", table, persistent=False)
        self._order = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        self._norms = [layer.pre_attn for layer in self._order] + [self.final_norm]

    def forward(self, batch: Batch, cache: Sequence[KVPages]) -> Tensor:
        """The final norm's output for every token of the batch, x_TD; its keys and values are in the cache after."""
        h_TD = self.embed(batch.tokens_T, self.config.embedding_multiplier, self.dtype)
        norms, cos_sin = self._norms, self.cos_sin
        x = Normed(norms[0](h_TD))
        experts_fp8, attn_fp8 = fuses_fp8(h_TD.device) if self.activations == "fp8" else (False, False)
        for layer, pages, next_norm in zip(self._order, cache, norms[1:], strict=True):
            fp8 = experts_fp8, attn_fp8 and next_norm is not norms[-1]
            h_TD, x = layer(h_TD, x, batch, pages, cos_sin, next_norm, fp8)
        return x.x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TV in fp32 of the rows of `forward`'s result."""
        head = self.lm_head
        logits_TV = self.embed.attend(x_TD) if head is None else head(x_TD, torch.float32)
        if self.config.output_multiplier != 1:
            logits_TV = logits_TV.mul_(self.config.output_multiplier)  # nobody else holds them
        if cap := self.config.final_softcap:
            logits_TV = cap * torch.tanh(logits_TV / cap)
        return logits_TV
