"""Which tensors of a folder's files make up each tensor of a model, and everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from grok_engine.config import ModelConfig
from grok_engine.models.families.base import Interleaved, Names, Stacked

from .files import Files, Place, some
from .quantization import IGNORED, Scheme

# fp16 is read as fp32, which holds it exactly; bf16 would lose three bits of its mantissa.
FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp32", "F8_E4M3": "fp8_e4m3", "I8": "int8"}
SCALES = ("F32", "BF16", "F16")
BUFFERS = (".rotary_emb.inv_freq",)  # of old files; computed from the configuration


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


def _template(name: str) -> tuple[str, int]:
    """The engine's name with {i} for the layer, and the layer."""
    match = re.match(r"layers\.(\d+)\.", name)
    return (f"layers.{{i}}.{name[match.end() :]}", int(match[1])) if match else (name, 0)


def best_spelling(spellings: Iterable[Names], shapes: Iterable[str], files: Files) -> Names:
    """The spelling by which most tensors are found, counting those of experts by their first."""

    def hits(names: Names) -> int:
        found = 0
        for name in shapes:
            template, layer = _template(name)
            if (stored := names.get(template)) is not None:
                text = stored if isinstance(stored, str) else stored.name
                found += text.format(i=layer, e=0) in files.places
        return found

    return max(spellings, key=hits)


class Resolver:
    """Finds the tensors of a model among those of its files. What is wrong is added to the files' problems."""

    def __init__(self, config: ModelConfig, files: Files, names: Names, schemes: tuple[Scheme, ...]) -> None:
        self.config, self.files, self.names, self.schemes = config, files, names, schemes
        self.problems = files.problems
        self.missing: list[str] = []
        self.used: set[str] = set()
        self._compared: set[tuple[Path, ...]] = set()
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
        self._repeated(name, pieces)
        n, k = shapes[0]
        return (n, k * self.ranks) if axis else (n * self.ranks, k)

    def _repeated(self, name: str, pieces: tuple[Place, ...]) -> None:
        """A file copied under another rank's name is a problem. One tensor tells, by its first rows."""
        files = tuple(place.file.path for place in pieces)
        if files in self._compared:
            return
        self._compared.add(files)
        first: dict[bytes, str] = {}
        for place in pieces:
            head = bytes(place.file.read(name)[:4].contiguous().view(torch.uint8).flatten().tolist())
            other = first.setdefault(head, place.file.path.name)
            if other != place.file.path.name and len(set(head)) > 1:  # all zeros may be
                self.problems.append(f"{place.file.path.name} and {other} hold the same values of {name}")

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
