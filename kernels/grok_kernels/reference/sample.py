"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("sample_top_p", "reference")
def sample_top_p(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    # stable, so that ties go to the lower index; by logits, since nearly equal ones can have equal exponentials
    logits, tokens = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    greedy = temperature_B == 0
    probs = torch.softmax(logits / torch.where(greedy, 1.0, temperature_B)[:, None], -1)
    sums = probs.cumsum(-1)
    kept = (sums - probs) < top_p_B[:, None]
    kept[:, 0] = True
    total = sums.gather(1, kept.sum(-1, keepdim=True) - 1)
    place = (sums <= uniform_B[:, None] * total).sum(-1).clamp(max=kept.sum(-1) - 1)
    return tokens.gather(1, torch.where(greedy, 0, place)[:, None]).squeeze(1)
