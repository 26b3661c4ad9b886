"""Single rows of a weight, dequantised: the lookup of an embedding that is held as a quantised matrix."""

from __future__ import annotations

from torch import Tensor, nn

from . import layouts
from .bit_planes import unpack_words
from .formats import FORMATS, WIDTH
from .reference.quantize import dequantize_planes
from .weights import Weight


def weight_rows(weight: Weight, rows_R: Tensor) -> Tensor:
    """Rows (R,), int32, of the one matrix of `weight`, dequantised in fp32: (R, K), bit for bit those of the reference.

    Of a format without scales they keep their dtype.
    """
    format = FORMATS[weight.format]
    if weight.layout == "rows" and len(weight.planes) == 1:
        return nn.functional.embedding(rows_R, weight.values[0])
    if weight.layout == "panels" and len(weight.planes) == 1:  # first: a decode step records no index arithmetic then
        return layouts.packed_rows(weight.values, rows_R)
    rows = rows_R.long()
    panel, output = rows // WIDTH, rows % WIDTH
    panel_major = weight.layout == "panels" and format.in_bit_planes
    planes = {}
    for name, plane in weight.named_planes().items():
        if name != "values":
            planes[name] = plane[0, panel, :, output].t() if panel_major else plane[0].index_select(1, rows)
        elif panel_major and layouts.native is not None and plane.device.type == rows_R.device.type == "cpu":
            planes[name] = layouts.native.packed_code_rows(plane, rows_R, format.zero_point)
        elif panel_major:
            planes[name] = unpack_words(plane[0, panel, :, :, output], format.bits, format.zero_point)
        elif weight.layout == "panels":
            planes[name] = layouts.packed_rows(plane, rows_R)
        else:
            planes[name] = plane[0].index_select(0, rows)
    return dequantize_planes(planes)
