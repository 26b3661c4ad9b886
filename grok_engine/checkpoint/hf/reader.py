"""A folder of the hub as a checkpoint: names of files become the engine's, experts and pieces are put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo, take
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.config import ModelConfig
from grok_engine.models.families import family_of
from grok_engine.models.families.base import Interleaved, Names, Stacked

from .files import Files, Place, open_files, some
from .quantization import IGNORED, Scheme, schemes_of

# fp16 is read as fp32, which holds it exactly; bf16 would lose three bits of its mantissa.
FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp32", "F8_E4M3": "fp8_e4m3", "I8": "int8"}
SCALES = ("F32", "BF16", "F16")
BUFFERS = (".rotary_emb.inv_freq",)  # of old files; computed from the configuration
SHOWN = 40  # problems in a message; all of them are in `CheckpointError.problems`


@dataclass(frozen=True, slots=True)
class Matrix:
    """One expert's matrix, or a tensor without experts. part, parts: which of how many equal ranges of its rows."""

    pieces: tuple[Place, ...]  # in the order of ranks, along `axis`
    axis: int
    scale: Place | None
    block: tuple[int, int] | None
    expert: int | None = None  # of a stack
    part: int = 0
    parts: int = 1
    head_dim: int = 0  # where the rows of each head are interleaved

    @property
    def format(self) -> str:
        return FORMATS[self.pieces[0].tensor.code]

    @property
    def nbytes(self) -> int:
        places = self.pieces if self.scale is None else (*self.pieces, self.scale)
        return sum(place.tensor.nbytes for place in places)

    def planes(self) -> tuple[Tensor, ...]:
        """Values, and scales (⌈N/rows⌉, ⌈K/columns⌉) where there are any; views unless pieces are joined."""
        pieces = [place.file.read(place.tensor.name) for place in self.pieces]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
        if self.expert is not None:
            values = values[self.expert]
        values = values.chunk(self.parts)[self.part]
        if self.head_dim:
            values = values.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        if self.scale is None or self.block is None:
            return (values,)
        (n, k), (rows, columns) = values.shape, self.block
        scales = self.scale.file.read(self.scale.tensor.name).float()
        return values, scales.reshape(-(-n // rows), -(-k // columns))


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
        names = max(family.spellings, key=lambda names: _hits(names, shapes, files))
        self._matrices = _Resolver(config, files, names, schemes).resolve(shapes)
        if files.problems:
            _fail(folder, config, files.problems)
        self.tensors = {name: _info(name, shapes[name], found) for name, found in self._matrices.items()}

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. A tensor of all experts is a copy, and so is what was fp16 or lay in pieces."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        found, info = self._matrices[name], self.tensors[name]
        planes = [take(info, m.planes(), None, rows) for m in (found if expert is None else [found[expert]])]
        if len(info.shape) == 3 and expert is None:
            whole = tuple(torch.stack(plane) for plane in zip(*planes, strict=True))
        else:
            (whole,) = planes
        return tuple(plane.float() if plane.dtype == torch.float16 else plane for plane in whole)


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


def _template(name: str) -> tuple[str, int]:
    """The engine's name with {i} for the layer, and the layer."""
    match = re.match(r"layers\.(\d+)\.", name)
    return (f"layers.{{i}}.{name[match.end() :]}", int(match[1])) if match else (name, 0)


def _hits(names: Names, shapes: Iterable[str], files: Files) -> int:
    """How many tensors, of each its first expert, a spelling finds."""
    found = 0
    for name in shapes:
        template, layer = _template(name)
        if (stored := names.get(template)) is not None:
            text = stored if isinstance(stored, str) else stored.name
            found += text.format(i=layer, e=0) in files.places
    return found


class _Resolver:
    """Finds the tensors of a model among those of its files. What is wrong is added to the files' problems."""

    def __init__(self, config: ModelConfig, files: Files, names: Names, schemes: tuple[Scheme, ...]) -> None:
        self.config, self.files, self.names, self.schemes = config, files, names, schemes
        self.problems = files.problems
        self.missing: list[str] = []
        self.used: set[str] = set()
        ranks = {place.rank for places in files.places.values() for place in places if place.rank is not None}
        self.ranks = max(ranks, default=-1) + 1

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Matrix, ...]]:
        if not self.files.places:
            return {}
        found = {name: tuple(self._matrices(name, shape)) for name, shape in shapes.items()}
        self._tied(found)
        for name, matrices in found.items():
            kinds = {(matrix.format if matrix.block else "", matrix.block) for matrix in matrices}
            if len(kinds) > 1:
                self.problems.append(f"the experts of {name} differ in format or scales: {sorted(map(str, kinds))}")
        self._experts()
        if self.missing:
            self.problems.append(f"missing {len(self.missing)} tensor(s): {some(self.missing)}")
        if unused := {name for name in self.files.places.keys() - self.used if not self._ignored(name)}:
            self.problems.append(f"{len(unused)} tensor(s) without a place: {some(unused)}")
        return found

    def _ignored(self, name: str) -> bool:
        return name.endswith(BUFFERS) or (bool(self.schemes) and name.endswith(IGNORED))

    def _matrices(self, name: str, shape: tuple[int, ...]) -> Iterator[Matrix]:
        template, layer = _template(name)
        stored, axis = self.names[template], int(name.endswith((".down", ".o")))
        text = stored if isinstance(stored, str) else stored.name
        part, parts = (stored.part, stored.parts) if isinstance(stored, Stacked) else (0, 1)
        if len(shape) == 3 and "{e}" not in text:
            whole = (shape[0], parts * shape[1], shape[2])
            for matrix in self._matrix(text.format(i=layer), whole, axis):
                for e in range(shape[0]):
                    yield Matrix(matrix.pieces, axis, None, None, e, part, parts)
            return
        for e in range(shape[0] if len(shape) == 3 else 1):
            for matrix in self._matrix(text.format(i=layer, e=e), shape[-2:], axis):
                if not isinstance(stored, Interleaved):
                    yield matrix
                elif matrix.scale is None:
                    yield replace(matrix, head_dim=self.config.head_dim)
                else:
                    self.problems.append(f"{text.format(i=layer)} is quantised: expected floats in Mistral's own files")

    def _matrix(self, name: str, shape: tuple[int, ...], axis: int) -> Iterator[Matrix]:
        if name == self.names["embed"] and name not in self.files.places and self.config.tie_embeddings:
            name = str(self.names["lm_head"])  # the same matrix, under its other name
        if name not in self.files.places:
            self.missing.append(name)
            return
        self.used.add(name)
        pieces = tuple(self.files.places[name])
        if (joined := self._joined(name, pieces, axis)) is None:
            return
        if joined != shape:
            self.problems.append(f"{name} has shape {joined}, expected {shape}")
            return
        codes = {place.tensor.code for place in pieces}
        if len(codes) > 1 or not codes <= FORMATS.keys():
            self.problems.append(f"{name} is {' and '.join(sorted(codes))}, expected one of {', '.join(FORMATS)}")
            return
        scale, block = None, None
        if (code := pieces[0].tensor.code) in ("F8_E4M3", "I8"):
            if (found := self._scales(name, code, shape)) is None:
                return
            scale, block = found
        yield Matrix(pieces, axis, scale, block)

    def _joined(self, name: str, pieces: tuple[Place, ...], axis: int) -> tuple[int, ...] | None:
        """The shape of the pieces of all ranks side by side, or of the one tensor."""
        shapes = [place.tensor.shape for place in pieces]
        if pieces[0].rank is None:
            return shapes[0]
        if [place.rank for place in pieces] != list(range(self.ranks)) or len(set(shapes)) > 1 or len(shapes[0]) != 2:
            what = ", ".join(f"rank {place.rank} {place.tensor.shape}" for place in pieces)
            self.problems.append(f"{name} has {what}: expected a matrix of one shape in each of {self.ranks} ranks")
            return None
        n, k = shapes[0]
        return (n, k * self.ranks) if axis else (n * self.ranks, k)

    def _scales(self, name: str, code: str, shape: tuple[int, ...]) -> tuple[Place, tuple[int, int]] | None:
        if len(shape) != 2:
            self.problems.append(f"{name} is {code} of shape {shape}, expected a matrix")
            return None
        own = [scheme for scheme in self.schemes if scheme.code == code]
        for scheme in own:
            places = self.files.places.get(stem := name.removesuffix("weight") + scheme.scale)
            if places is None or len(places) > 1 or places[0].tensor.code not in SCALES:
                continue
            self.used.add(stem)
            self._zero_points(name.removesuffix("weight") + "weight_zero_point")
            if (block := scheme.block_of(shape, places[0].tensor.shape)) is not None:
                return places[0], block
        expected = " or ".join(f"{scheme.scale} in blocks of {scheme.block}" for scheme in own)
        self.problems.append(f"{name} is {code} {shape}: expected {expected or 'bf16, fp16 or fp32 (no quantisation)'}")
        return None

    def _zero_points(self, name: str) -> None:
        """Old tools write zeros, though the scheme is symmetric."""
        for place in self.files.places.get(name, ()):
            self.used.add(name)
            if place.file.read(name).float().any():
                self.problems.append(f"{name} is not zero, though the quantisation is symmetric")

    def _tied(self, found: Mapping[str, tuple[Matrix, ...]]) -> None:
        """A tied model may carry its matrix twice."""
        head = str(self.names["lm_head"])
        if not self.config.tie_embeddings or head not in self.files.places or head in self.used:
            return
        self.used.add(head)
        (place,) = self.files.places[head]
        if found["embed"] and not self.problems and not _equal(found["embed"][0].pieces[0], place):
            self.problems.append(f"{head} differs from {self.names['embed']}, though tie_word_embeddings is true")

    def _experts(self) -> None:
        """The number of experts in the files, where it is not the configuration's."""
        text = self.names.get("layers.{i}.moe.gate")
        if isinstance(text, str) and "{e}" in text and self.config.num_experts:
            pattern = re.escape(text).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"(\d+)")
            ids = {int(m[1]) for name in self.files.places if (m := re.fullmatch(pattern, name))}
            if ids and ids != set(range(self.config.num_experts)):
                self.problems.append(
                    f"the files hold experts {min(ids)}..{max(ids)}, expected {self.config.num_experts} by config.json"
                )


def _equal(a: Place, b: Place) -> bool:
    x, y = (place.file.read(place.tensor.name) for place in (a, b))
    if x.shape != y.shape:
        return False
    return all(torch.equal(p.float(), q.float()) for p, q in zip(x.split(4096), y.split(4096), strict=True))
