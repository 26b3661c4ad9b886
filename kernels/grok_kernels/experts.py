"""The arguments that the two ops of the expert layer share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .weights import Weight


class ExpertLayer(NamedTuple):
    """The arguments of `moe` after its rows, in their order."""

    topk_weights: Tensor  # (T, A) fp32
    experts: Tensor  # (T, A) int32
    w13: Weight  # (E, 2F, D)
    w2: Weight  # (E, D, F)
    activation: str
    act_format: str
    order: Tensor | None = None  # (T·A,) int32 and
    offsets: Tensor | None = (
        None  # (E + 1,) int32, as `group_tokens` gives them; None where the backend groups the rows
    )

    @staticmethod
    def of_fp8(*args: Any) -> tuple[ExpertLayer, torch.dtype]:
        """From the arguments of `moe_fp8` after its rows and their scales, which have `out_dtype` for `act_format`."""
        return ExpertLayer(*(*args[:5], "fp8", *args[6:])), args[5]
