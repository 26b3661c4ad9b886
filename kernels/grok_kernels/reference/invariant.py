"""Batch-invariant arithmetic: a row's bits do not depend on how many rows there are.

torch picks a matrix product's kernel, and so the order of its additions, by shape, and a vectorised function may round
differently in the scalar tail. So products run in blocks of one fixed shape, with the rows as the second operand (as
the first, the bits could depend on the place within the block), and functions whose tail differs are composed of
functions whose tail does not. In training, where gradients are wanted, torch's own functions run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 16


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd would differentiate an operation on these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def matmul_t(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """x · wᵀ, (M, N)."""
    if wants_grad(x_MK, w_NK):
        return x_MK @ w_NK.t()
    m = x_MK.shape[0]
    padded = functional.pad(x_MK, (0, 0, 0, -m % ROWS))
    blocks = [torch.mm(w_NK, block.t()) for block in padded.split(ROWS)] if m else []
    return torch.cat(blocks, dim=1)[:, :m].t().contiguous() if blocks else x_MK.new_empty((0, w_NK.shape[0]))


def activate(x: Tensor, activation: str) -> Tensor:
    """gelu by tanh, gelu by erf, or silu, in fp32."""
    if wants_grad(x):
        if activation == "silu":
            return functional.silu(x)
        return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
