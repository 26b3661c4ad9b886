"""A folder of the hub as a checkpoint: names of files become the engine's, experts and pieces are put together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo, take
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.config import ModelConfig
from grok_engine.models.families import family_of

from .files import open_files
from .quantization import schemes_of
from .resolver import Matrix, Resolver, best_spelling

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
        quantization = values.get("quantization_config", values.get("compression_config"))  # as old tools wrote it
        schemes = schemes_of(quantization, files.problems)
        shapes = tensor_shapes(config)
        names = best_spelling(family.spellings, shapes, files)
        self._matrices = Resolver(config, files, names, schemes).resolve(shapes)
        if files.problems:
            _fail(folder, config, files.problems)
        self.tensors = {name: _info(name, shapes[name], found) for name, found in self._matrices.items()}

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. A tensor of all experts is a copy, and so is what was fp16 or lay in pieces."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        found, info = self._matrices[name], self.tensors[name]
        planes = [take(info, m.planes(), None, rows) for m in (found if expert is None else [found[expert]])]
        if info.format == "fp32":  # also where experts are stored in several float formats
            planes = [(values.float(),) for (values,) in planes]
        if len(info.shape) == 3 and expert is None:
            return tuple(torch.stack(plane) for plane in zip(*planes, strict=True))
        (whole,) = planes
        return whole


def _fail(folder: Path, config: ModelConfig, problems: list[str]) -> None:
    head = f"{folder} does not hold the model {config.name!r}, {len(problems)} problem(s):"
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    raise CheckpointError("\n  ".join([head, *problems[:SHOWN], *more]), tuple(problems))


def _info(name: str, shape: tuple[int, ...], matrices: tuple[Matrix, ...]) -> TensorInfo:
    first = matrices[0]
    formats = {matrix.format for matrix in matrices}
    nbytes = sum(matrix.nbytes // matrix.parts for matrix in matrices)
    if first.expert is not None:  # each counted the whole stack
        nbytes //= len(matrices)
    return TensorInfo(
        name=name,
        shape=shape,
        format=first.format if len(formats) == 1 else "fp32",
        block=first.block,
        nbytes=nbytes,
        stored="fp16" if any(matrix.pieces[0].tensor.code == "F16" for matrix in matrices) else "",
    )
