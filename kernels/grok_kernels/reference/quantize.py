"""Quantised activations, and activations and weights dequantised to fp32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import GROUP
from ..dtypes import FP8_MAX, TINY
from ..registry import register
from ..weights import Weight
from .invariant import wants_grad


def _groups(x_TD: Tensor, group_size: int) -> Tensor:
    """(T, groups, columns), the last group padded with zeros."""
    t, d = x_TD.shape
    width, groups = (group_size, -(-d // group_size)) if group_size else (d, 1)
    return torch.nn.functional.pad(x_TD.float(), (0, groups * width - d)).view(t, groups, width)


def _scales(x_TNK: Tensor, largest: float) -> Tensor:
    amax = x_TNK.abs().amax(-1) if x_TNK.shape[2] else x_TNK.new_zeros(x_TNK.shape[:2])
    # by a tensor: on a GPU torch would multiply by a number's reciprocal instead
    return amax.clamp(min=TINY) / amax.new_full((), largest)


@register("quantize_fp8", "reference")
@torch.no_grad()
def quantize_fp8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    x = _groups(x_TD, group_size)
    scale = _scales(x, FP8_MAX)
    q = (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.flatten(1)[:, : x_TD.shape[1]].contiguous(), scale


@register("quantize_int8", "reference")
@torch.no_grad()
def quantize_int8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    x = _groups(x_TD, group_size)
    scale = _scales(x, 127.0)
    q = (x / scale[..., None]).round().clamp(-127.0, 127.0).to(torch.int8)
    return q.flatten(1)[:, : x_TD.shape[1]].contiguous(), scale


def dequantize_rows(q_TD: Tensor, scale_TN: Tensor | None) -> Tensor:
    """Activations in fp32."""
    x = q_TD.float()
    if scale_TN is None:
        return x
    if scale_TN.shape[1] > 1:
        scale_TN = scale_TN.repeat_interleave(GROUP, dim=1)[:, : x.shape[1]]
    return x * scale_TN


def dequantize_weight(weight: Weight, expert: int) -> Tensor:
    """One matrix (N, K) in fp32 of a weight in rows: S[g, n] · values[n, k] − M[g, n], g the group of column k."""
    return dequantize_planes({name: plane[expert] for name, plane in weight.named_planes().items()})


def dequantize_planes(planes: Mapping[str, Tensor]) -> Tensor:
    """The same from planes in rows: values (…, N, K), others (…, groups, N). `formats` says what S and M are."""
    w_NK = planes["values"].float()
    if "scales" not in planes:
        return w_NK
    scale_GN, minimum_GN = group_scales(planes)
    groups_NGK: Tensor = w_NK.unflatten(-1, (scale_GN.shape[-2], -1)) * scale_GN.mT[..., None]
    if minimum_GN is not None:
        groups_NGK = groups_NGK - minimum_GN.mT[..., None]
    w_NK = groups_NGK.flatten(-2)
    return w_NK


def group_scales(planes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """S and, of formats that have one, M, (…, groups, N) in fp32."""
    scale, minimum = planes["scales"].float(), None
    if "minima" in planes:
        minimum = -planes["minima"].float()
    elif "zeros" in planes:
        minimum = scale * planes["zeros"].float()
    if "subscales" not in planes:
        return scale, minimum
    each = planes["subscales"].shape[-2] // scale.shape[-2]
    if "subminima" in planes:
        minimum = planes["minima"].float().repeat_interleave(each, -2) * planes["subminima"].float()
    return scale.repeat_interleave(each, -2) * planes["subscales"].float(), minimum


def quantized_as(x_TD: Tensor, act_format: str) -> Tensor:
    """x in fp32, rounded to `act_format` per token and group of 128. The gradient passes straight through."""
    x = x_TD.float()
    if act_format == "none":
        return x
    quantize = quantize_fp8 if act_format == "fp8" else quantize_int8
    rounded = dequantize_rows(*quantize(x_TD, GROUP))
    return x + (rounded - x).detach() if wants_grad(x) else rounded
