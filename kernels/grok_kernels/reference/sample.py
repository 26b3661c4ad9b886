"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("sample_top_p", "reference")
def sample_top_p(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    logits = logits_BV.double()
    greedy = temperature_B == 0
    logits = logits / torch.where(greedy, 1.0, temperature_B)[:, None]
    # stable, so that ties go to the lower index, and so that place 0 is the greedy choice
    probs, tokens = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
    sums = probs.cumsum(-1)
    kept = (sums - probs) < top_p_B[:, None]
    kept[:, 0] = True
    total = (probs * kept).sum(-1, keepdim=True)
    place = (sums <= uniform_B[:, None] * total).sum(-1).clamp(max=kept.sum(-1) - 1)
    return tokens.gather(1, torch.where(greedy, 0, place)[:, None]).squeeze(1)
