"""Single rows of a weight, dequantised: the lookup of an embedding that is held as a quantised matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import layouts, registry
from .bit_planes import unpack_words
from .checks import INT, Checker
from .dtypes import dtype_name
from .formats import FORMATS, WIDTH
from .reference.quantize import dequantize_planes
from .weights import Weight


def weight_rows(weight: Weight, rows_R: Tensor, multiplier: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Rows (R,), int32, of the one matrix of `weight`: (R, K), dequantised and multiplied in fp32 and rounded once to
    `dtype`, bit for bit those of the reference. dtype: by default fp32; of a format without scales its own.

    ValueError for other arguments; ValueError or IndexError for a row that the matrix does not have, on a GPU an
    assertion of the device.
    """
    dtype = dtype or (weight.dtype if len(weight.planes) == 1 else torch.float32)
    native = layouts.native if dtype in (torch.float32, torch.bfloat16) else None
    if native is not None and registry.key((weight, rows_R)) is not None:
        return native.weight_rows(weight, rows_R, multiplier, dtype)
    c = Checker("weight_rows")
    c.tensor("rows", rows_R, "R", INT)
    if weight.shape[0] != 1:
        c.fail(f"weight has {weight.shape[0]} matrices, expected 1")
    if not dtype.is_floating_point:
        c.fail(f"dtype={dtype_name(dtype)}, expected a floating-point type")
    rows_RK = _dequantised(weight, rows_R)
    # where the types agree, torch's product is that: computed in fp32 and rounded once
    return rows_RK * multiplier if rows_RK.dtype == dtype else (rows_RK.float() * multiplier).to(dtype)


def _dequantised(weight: Weight, rows_R: Tensor) -> Tensor:
    """In fp32; of a format without scales in its dtype."""
    format = FORMATS[weight.format]
    if weight.layout == "rows" and len(weight.planes) == 1:
        return nn.functional.embedding(rows_R, weight.values[0])
    rows = rows_R.long()
    # a negative row has a panel that does not exist, since torch would count it from the end
    panel, output = (rows // WIDTH).masked_fill(rows < 0, weight.shape[1] // WIDTH), rows % WIDTH
    panel_major = weight.layout == "panels" and format.in_bit_planes
    planes = {}
    for name, plane in weight.named_planes().items():
        if name != "values":
            planes[name] = plane[0, panel, :, output].t() if panel_major else plane[0].index_select(1, rows)
        elif panel_major:
            planes[name] = unpack_words(plane[0, panel, :, :, output], format.bits, format.zero_point)
        elif weight.layout == "panels":
            planes[name] = plane[0].flatten(2, 3)[panel, :, output].flatten(1)
        else:
            planes[name] = plane[0].index_select(0, rows)
    return dequantize_planes(planes) if len(planes) > 1 else planes["values"]
