"""How a request samples its tokens."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

import grok_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Temperature 0 is greedy. `seed` None draws a fresh one; a given seed repeats the tokens, whatever else runs."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens!r} is not a positive integer")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature!r} is not a finite number of 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} is not in (0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} is not in 0..2**63 - 1")


class Sampler:
    """The random stream of one request: one uniform number a token, so that no other request moves it."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token."""
        p = self.params
        uniform = torch.rand(1, generator=self.generator)
        row = torch.tensor([[p.temperature], [p.top_p]])
        temperature, top_p, uniform = (x.to(logits_V.device) for x in (*row, uniform))
        return int(grok_kernels.sample_top_p(logits_V[None], temperature, top_p, uniform))
