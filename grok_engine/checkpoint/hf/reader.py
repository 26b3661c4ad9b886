"""A folder of the hub as a checkpoint: names of files become the engine's, experts and pieces are put together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.config import ModelConfig
from grok_engine.log import QuietLogger
from grok_engine.models.families import family_of

from .files import open_files
from .quantization import quantization_of
from .resolver import AnyMatrix, Resolver, best_spelling

log = QuietLogger("grok_engine")
SHOWN = 40  # problems in a message; all of them are in `CheckpointError.problems`


class HfCheckpoint:
    """An opened folder: every tensor found and checked against the configuration, none of them read yet.

    values: of its `config.json`. Raises one CheckpointError that lists everything missing, superfluous, truncated,
    mis-shaped, of the wrong type or in a quantisation that is not served. That the pieces of two ranks have changed
    places cannot be seen.
    """

    def __init__(self, folder: Path, config: ModelConfig, values: Mapping[str, Any]) -> None:
        self.source = str(folder)
        family = family_of(values)
        assert family is not None
        files = open_files(folder)
        quantization = quantization_of(values, folder, files.problems)
        shapes = tensor_shapes(config)
        names = best_spelling(family.spellings, shapes, files)
        self._matrices = Resolver(config, files, names, quantization).resolve(shapes)
        if files.problems:
            _fail(folder, config, files.problems)
        if quantization.ignored:
            log.warning(
                "%s of %s ignored: `activations` and `kv_dtype` choose whether and how those are rounded",
                " and ".join(quantization.ignored), folder / "config.json",
            )  # fmt: skip
        self.tensors = {name: _info(name, shapes[name], found) for name, found in self._matrices.items()}

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. A tensor of all experts is a copy, and so is what was fp16, packed or in pieces."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        found, info = self._matrices[name], self.tensors[name]
        planes = [
            matrix.read(rows, dequantised=info.format == "fp32")
            for matrix in (found if expert is None else [found[expert]])
        ]
        if len(info.shape) == 3 and expert is None:
            return tuple(torch.stack(plane) for plane in zip(*planes, strict=True))
        (whole,) = planes
        return whole


def _fail(folder: Path, config: ModelConfig, problems: list[str]) -> None:
    head = f"{folder} does not hold the model {config.name!r}, {len(problems)} problem(s):"
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    raise CheckpointError("\n  ".join([head, *problems[:SHOWN], *more]), tuple(problems))


def _info(name: str, shape: tuple[int, ...], matrices: tuple[AnyMatrix, ...]) -> TensorInfo:
    """Where experts differ in format or scales, all are dequantised."""
    alike = len({(matrix.format, matrix.block, matrix.scale_dtype) for matrix in matrices}) == 1
    stored = {matrix.stored if alike else matrix.stored or matrix.format for matrix in matrices} - {""}
    return TensorInfo(
        name=name,
        shape=shape,
        format=matrices[0].format if alike else "fp32",
        block=matrices[0].block if alike else None,
        scales=matrices[0].scale_dtype if alike else "fp32",
        nbytes=sum(matrix.nbytes for matrix in matrices),
        stored=", ".join(sorted(stored)),
    )
