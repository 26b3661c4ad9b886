"""A synthetic Grok-1 release of the real size: real headers and trailers, and sparse files with a hole for the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from grok_engine.checkpoint.xai.layout import TensorSpec, layout
from grok_engine.checkpoint.xai.pickle_writer import pickle_pieces
from grok_engine.models.families import preset

RELEASE_BYTES = 318_239_886_140


def write_sparse_release(folder: Path) -> int:
    """Writes `ckpt-0/` in `folder`, a few MB on disk. Returns the length of all files together.

    Data and scales read as zeros, so only the headers are those of a valid checkpoint.
    """
    target = folder / "ckpt-0"
    target.mkdir(parents=True)
    return sum(_write_sparse(target / spec.file, spec) for spec in layout(preset("grok-1")))


def _write_sparse(path: Path, spec: TensorSpec) -> int:
    weight = hollow(spec.shape, np.int8 if spec.quantizable else np.float32)
    scales = None
    if spec.quantizable:
        groups = 8 if spec.name.endswith((".attn.o", ".moe.down")) else 1
        scales = hollow(spec.scales_shape(groups), ml_dtypes.bfloat16)
    with path.open("wb") as file:
        write_hollow(file, pickle_pieces(weight, scales))
        return file.tell()


def hollow(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def write_hollow(file: BinaryIO, pieces: list[Any]) -> None:
    """The opcodes, and holes for the data."""
    for piece in pieces:
        if isinstance(piece, bytes):
            file.write(piece)
        else:
            file.seek(piece.nbytes, 1)
