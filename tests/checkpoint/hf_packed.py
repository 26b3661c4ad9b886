"""Matrices of small integers packed as GPTQ, AWQ and compressed-tensors have them, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column AWQ_ORDER[i]


@dataclass(frozen=True)
class Integers:
    """w[n, k] = (q[n, k] − z[n, g]) · s[n, g] with g = group_K[k]."""

    q_NK: np.ndarray
    z_NG: np.ndarray
    s_NG: Tensor
    group_K: np.ndarray
    bits: int

    @property
    def meant(self) -> Tensor:
        """Each product rounded once to fp32."""
        exact = (self.q_NK - self.z_NG[:, self.group_K]) * self.s_NG.double().numpy()[:, self.group_K]
        return torch.from_numpy(exact.astype(np.float32))


def integers(
    w: Tensor, bits: int, group: int, *, symmetric: bool = True, ordered: bool = True, dtype: Any = torch.float16
) -> Integers:
    """w (N, K) rounded; not ordered: column k's group is by another order of the columns."""
    (n, k), top, rng = w.shape, 2**bits - 1, np.random.default_rng(w.shape[0])
    group = group if group > 0 else k
    group_K = np.arange(k) // group
    if not ordered:
        group_K = rng.permutation(group_K)
    q, z, scales = np.zeros((n, k), np.int64), [], []
    for g in range(int(group_K.max()) + 1):
        columns = w[:, group_K == g].double().numpy()
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        if symmetric:
            high = np.maximum(np.abs(low), high)
            low = -high
        s = torch.from_numpy((high - low) / top).to(dtype)
        zero = np.full(n, (top + 1) // 2) if symmetric else np.clip(np.rint(-low / s.double().numpy()), 1, top)
        q[:, group_K == g] = np.clip(np.rint(columns / s.double().numpy()[:, None]) + zero[:, None], 0, top)
        z.append(zero.astype(np.int64))
        scales.append(s)
    return Integers(q, np.stack(z, 1), torch.stack(scales, 1), group_K, bits)


def words(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Neighbours along `axis` in one int32, the first in its lowest bits, or in another order."""
    moved, p = np.moveaxis(values, axis, -1), 32 // bits
    moved = np.concatenate([moved, np.zeros((*moved.shape[:-1], -moved.shape[-1] % p), np.int64)], -1)
    runs = moved.reshape(*moved.shape[:-1], -1, p)
    found = np.zeros(runs.shape[:-1], np.int64)
    for i in range(p):
        found |= runs[..., order[i] if order else i] << bits * i
    return torch.from_numpy(np.moveaxis(found, -1, axis).astype(np.uint32).view(np.int32).copy())


def gptq(stem: str, x: Integers, version: int = 1, g_idx: bool = True) -> dict[str, Tensor]:
    z = x.z_NG.T - (version == 1)
    found = {
        "qweight": words(x.q_NK.T, x.bits, 0), "qzeros": words(z, x.bits, 1), "scales": x.s_NG.T.contiguous(),
        "bias": torch.zeros(len(x.q_NK), dtype=torch.float16),  # as AutoGPTQ writes it
    }  # fmt: skip
    found |= {"g_idx": torch.from_numpy(x.group_K.astype(np.int32))} if g_idx else {}
    return {stem + name: tensor for name, tensor in found.items()}


def awq(stem: str, x: Integers) -> dict[str, Tensor]:
    return {
        stem + "qweight": words(x.q_NK.T, 4, 1, AWQ_ORDER),
        stem + "qzeros": words(x.z_NG.T, 4, 1, AWQ_ORDER),
        stem + "scales": x.s_NG.T.contiguous(),
    }


def compressed(stem: str, x: Integers, symmetric: bool) -> dict[str, Tensor]:
    found = {
        "packed": words(x.q_NK, x.bits, 1), "scale": x.s_NG, "shape": torch.tensor(x.q_NK.shape, dtype=torch.int64),
        "g_idx": torch.from_numpy(x.group_K.astype(np.int32)),
    }  # fmt: skip
    found |= {} if symmetric else {"zero_point": words(x.z_NG, x.bits, 0)}
    return {f"{stem}weight_{name}": tensor for name, tensor in found.items()}
