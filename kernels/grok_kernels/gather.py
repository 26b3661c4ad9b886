"""Single rows of a weight, dequantised: the lookup of an embedding that is held as a quantised matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import layouts
from .bit_planes import unpack_words
from .formats import FORMATS, WIDTH
from .reference.quantize import dequantize_planes
from .weights import Weight


def weight_rows(weight: Weight, rows_R: Tensor, multiplier: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Rows (R,), int32, of the one matrix of `weight`: (R, K), dequantised and multiplied in fp32 and rounded once to
    `dtype`, bit for bit those of the reference. dtype: by default fp32; of a format without scales its own.

    ValueError or IndexError for a row that the matrix does not have.
    """
    dtype = dtype or (weight.dtype if len(weight.planes) == 1 else torch.float32)
    on_cpu = weight.values.device.type == rows_R.device.type == "cpu"
    if (
        layouts.native is not None
        and on_cpu
        and dtype in (torch.float32, torch.bfloat16)
        and weight.signature is not None
    ):
        return layouts.native.weight_rows(weight, rows_R, multiplier, dtype)
    rows_RK = _dequantised(weight, rows_R)
    # where the types agree, torch's product is that: computed in fp32 and rounded once
    return rows_RK * multiplier if rows_RK.dtype == dtype else (rows_RK.float() * multiplier).to(dtype)


def _dequantised(weight: Weight, rows_R: Tensor) -> Tensor:
    """In fp32; of a format without scales in its dtype."""
    format = FORMATS[weight.format]
    if weight.layout == "rows" and len(weight.planes) == 1:
        return nn.functional.embedding(rows_R, weight.values[0])
    rows = rows_R.long()
    panel, output = rows // WIDTH, rows % WIDTH
    panel_major = weight.layout == "panels" and format.in_bit_planes
    planes = {}
    for name, plane in weight.named_planes().items():
        if name != "values":
            planes[name] = plane[0, panel, :, output].t() if panel_major else plane[0].index_select(1, rows)
        elif panel_major:
            planes[name] = unpack_words(plane[0, panel, :, :, output], format.bits, format.zero_point)
        elif weight.layout == "panels":
            planes[name] = layouts.packed_rows(plane, rows)
        else:
            planes[name] = plane[0].index_select(0, rows)
    return dequantize_planes(planes) if len(planes) > 1 else planes["values"]
