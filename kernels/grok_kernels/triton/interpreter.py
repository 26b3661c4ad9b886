"""Corrections to Triton's interpreter, which is silently wrong on bf16 and fp8 (seen in 3.6 to 3.9).

It truncates fp32 to bf16, rounds wrongly to e4m3 and wraps where a GPU saturates, casts integers to the bits of a bf16,
and multiplies bf16 as integers. Here each cast rounds to nearest even, to e4m3 with saturation like the hardware's
`cvt.rn.satfinite`. A dot rounds once, from an exact sum, so that its bits do not depend on the shape of the tile.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_STORED_AS = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}  # the interpreter holds bits
_E4M3_MAX = 448.0


def _values(handle: Any) -> Any:
    """The values of a handle, in a type that numpy computes with."""
    as_bits = _STORED_AS.get(handle.dtype.scalar)
    return handle.data if as_bits is None else handle.data.view(as_bits).astype(np.float32)


def _handle(values: Any, dtype: Any) -> Any:
    as_bits = _STORED_AS.get(dtype.scalar)
    if as_bits is None:
        with np.errstate(invalid="ignore"):  # an infinity as an integer is undefined on hardware too
            data = values.astype(interpreter._get_np_dtype(dtype.scalar))
    else:
        if dtype.scalar == tl.float8e4nv:
            values = np.clip(values, -_E4M3_MAX, _E4M3_MAX)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are cast as such
            # integers and fp64 go by way of fp32, in which all that the kernels cast so are exact
            data = values.astype(np.float32).astype(as_bits).view(interpreter._get_np_dtype(dtype.scalar))
    return interpreter.TensorHandle(data, dtype.scalar)


def _cast(builder: Any, src: Any, dst_type: Any) -> Any:
    return _handle(_values(src), dst_type)


def _round(builder: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    return _handle(_values(src), dst_type)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.matmul(_values(a).astype(np.float64), _values(b).astype(np.float64))
    return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def correct() -> None:
    """Install the corrections, for all kernels that this process interprets."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _round
    interpreter.InterpreterBuilder.create_dot = _dot
