"""A synthetic Grok-1 release of the real size: real headers and trailers, and sparse files with a hole for the data."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from grok_engine.checkpoint.xai.layout import TensorSpec, layout
from grok_engine.checkpoint.xai.pickle_writer import Data, Described, pickle_pieces
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
    weight = Described(spec.shape, np.dtype(np.int8 if spec.quantizable else np.float32))
    scales = None
    if spec.quantizable:
        groups = 8 if spec.name.endswith((".attn.o", ".moe.down")) else 1
        scales = Described(spec.scales_shape(groups), np.dtype(ml_dtypes.bfloat16))
    with path.open("wb") as file:
        for piece in pickle_pieces(weight, scales):
            if isinstance(piece, Data):
                file.seek(piece.nbytes, 1)
            else:
                file.write(piece)
        return file.tell()
