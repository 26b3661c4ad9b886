"""Which tensors of a folder's files make up each tensor of a model, and everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from grok_engine.config import ModelConfig
from grok_engine.models.families.base import Flat, Interleaved, Names, Stacked

from .files import Files, Place, some
from .integers import SCALES, VALUES, PackedMatrix, find_packed
from .matrix import FORMATS, Matrix
from .quantization import Quantization, Scheme

AnyMatrix = Matrix | PackedMatrix
SUFFIXES = ("weight", *dict.fromkeys(VALUES.values()))
# Of activations, keys and values.
IGNORED = (
    ".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale",
    ".input_zero_point", ".output_zero_point", ".k_zero_point", ".v_zero_point",
)  # fmt: skip
BUFFERS = (".rotary_emb.inv_freq",)  # of old files; computed from the configuration


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
                stem = text.format(i=layer, e=0).removesuffix("weight")
                found += any(stem + suffix in files.places for suffix in ("", *SUFFIXES))
        return found

    return max(spellings, key=hits)


class Resolver:
    """Finds the tensors of a model among those of its files. What is wrong is added to the files' problems."""

    def __init__(self, config: ModelConfig, files: Files, names: Names, quantization: Quantization) -> None:
        self.config, self.files, self.names, self.quantization = config, files, names, quantization
        self.problems = files.problems
        self.missing: list[str] = []
        self.used: set[str] = set()
        self._compared: set[tuple[Path, ...]] = set()
        ranks = {place.rank for places in files.places.values() for place in places if place.rank is not None}
        self.ranks = max(ranks, default=-1) + 1

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[AnyMatrix, ...]]:
        if not self.files.places:
            return {}
        found = {name: tuple(self._matrices(name, shape)) for name, shape in shapes.items()}
        self._tied(found)
        self._experts()
        if self.missing:
            self.problems.append(f"missing {len(self.missing)} tensor(s): {some(self.missing)}")
        if unused := {name for name in self.files.places.keys() - self.used if not self._ignored(name)}:
            self.problems.append(f"{len(unused)} tensor(s) without a place: {some(unused)}")
        return found

    def _ignored(self, name: str) -> bool:
        """Whether a tensor without a place changes nothing: zeros are what AutoGPTQ writes where there is no bias."""
        if name.endswith(BUFFERS) or (self.quantization and name.endswith(IGNORED)):
            return True
        if not name.endswith(".bias") or name.removesuffix("bias") + "qweight" not in self.used:
            return False
        return not any(place.file.read(name).float().any() for place in self.files.places[name])

    def _matrices(self, name: str, shape: tuple[int, ...]) -> Iterator[AnyMatrix]:
        template, layer = _template(name)
        stored, axis = self.names[template], int(name.endswith((".down", ".o")))
        text = stored if isinstance(stored, str) else stored.name
        part, parts = (stored.part, stored.parts) if isinstance(stored, Stacked) else (0, 1)
        if len(shape) == 3 and isinstance(stored, Flat):
            e, n, k = shape
            for matrix in self._matrix(text.format(i=layer), (e * k, n) if stored.transposed else (e * n, k), axis):
                if isinstance(matrix, Matrix) and matrix.scale is None:
                    stack = replace(matrix, experts=e, flat=True, transposed=stored.transposed)
                    yield from (replace(stack, expert=i) for i in range(e))
                else:
                    self.problems.append(f"{text.format(i=layer)} is quantised: expected floats in stacked experts")
            return
        if len(shape) == 3 and "{e}" not in text:
            whole = (shape[0], parts * shape[1], shape[2])
            for matrix in self._matrix(text.format(i=layer), whole, axis):
                if isinstance(matrix, Matrix):
                    for e in range(shape[0]):
                        yield Matrix(matrix.pieces, axis, expert=e, experts=shape[0], part=part, parts=parts)
            return
        for e in range(shape[0] if len(shape) == 3 else 1):
            for matrix in self._matrix(text.format(i=layer, e=e), shape[-2:], axis):
                if not isinstance(stored, Interleaved):
                    yield matrix
                elif isinstance(matrix, Matrix) and matrix.scale is None:
                    yield replace(matrix, head_dim=self.config.head_dim)
                else:
                    self.problems.append(f"{text.format(i=layer)} is quantised: expected floats in Mistral's own files")

    def _matrix(self, name: str, shape: tuple[int, ...], axis: int) -> Iterator[AnyMatrix]:
        if name == self.names["embed"] and name not in self.files.places and self.config.tie_embeddings:
            name = str(self.names["lm_head"])  # the same matrix, under its other name
        if name not in self.files.places:
            stem = name.removesuffix("weight")
            packed, used = find_packed(stem, shape, self.quantization.packings, self.files, self.problems)
            self.used |= used
            if packed is not None:
                yield packed
            elif not used:
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
        if (code := pieces[0].tensor.code) not in ("F8_E4M3", "I8"):
            yield Matrix(pieces, axis)
        elif (found := self._scales(name, code, shape)) is not None:
            yield Matrix(pieces, axis, *found)

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

    def _scales(
        self, name: str, code: str, shape: tuple[int, ...]
    ) -> tuple[Place, tuple[int, int], Place | None] | None:
        """Where the scales of a matrix lie, its block, and where its zero points lie if it has some."""
        if len(shape) != 2:
            self.problems.append(f"{name} is {code} of shape {shape}, expected a matrix")
            return None
        own, stem = [s for s in self.quantization.schemes if s.code == code], name.removesuffix("weight")
        for scheme in own:
            places = self.files.places.get(stem + scheme.scale)
            if places is None or len(places) > 1 or places[0].tensor.code not in SCALES:
                continue
            if (block := scheme.block_of(shape, places[0].tensor.shape)) is not None:
                self.used.add(stem + scheme.scale)
                return places[0], block, self._zero_points(stem + "weight_zero_point", scheme, places[0])
        for kind in ("weight_scale", "weight_scale_inv", "weight_zero_point"):  # said already
            self.used.update({stem + kind} & self.files.places.keys())
        expected = " or ".join(f"{scheme.scale} in blocks of {scheme.block}" for scheme in own)
        self.problems.append(f"{name} is {code} {shape}: expected {expected or 'bf16, fp16 or fp32 (no quantisation)'}")
        return None

    def _zero_points(self, name: str, scheme: Scheme, scale: Place) -> Place | None:
        """Old tools write zeros, though the scheme is symmetric."""
        (place,) = self.files.places.get(name, [None])[:1]
        if place is None:
            if not scheme.symmetric:
                self.problems.append(f"missing {name}: the quantisation is not symmetric")
            return None
        self.used.add(name)
        if scheme.symmetric:
            if place.file.read(name).float().any():
                self.problems.append(f"{name} is not zero, though the quantisation is symmetric")
            return None
        if place.tensor.code != "I8" or place.tensor.shape != scale.tensor.shape:
            found = f"{place.tensor.code} {place.tensor.shape}"
            self.problems.append(f"{name} is {found}: expected I8 {scale.tensor.shape}, as its scales")
        return place

    def _tied(self, found: Mapping[str, tuple[AnyMatrix, ...]]) -> None:
        """A tied model may carry its matrix twice."""
        head = str(self.names["lm_head"])
        if not self.config.tie_embeddings or head not in self.files.places or head in self.used:
            return
        self.used.add(head)
        (place,) = self.files.places[head]
        embed = found["embed"][0] if found["embed"] else None
        if embed and not self.problems and not (isinstance(embed, Matrix) and _equal(embed.pieces[0], place)):
            self.problems.append(f"{head} differs from {self.names['embed']}, though tie_word_embeddings is true")

    def _experts(self) -> None:
        """The number of experts in the files, where it is not the configuration's."""
        text = self.names.get("layers.{i}.moe.gate")
        if isinstance(text, str) and "{e}" in text and self.config.num_experts:
            pattern = re.escape(text.removesuffix("weight")).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"(\d+)")
            pattern += f"({'|'.join(SUFFIXES)})"
            ids = {int(m[1]) for name in self.files.places if (m := re.fullmatch(pattern, name))}
            if ids and ids != set(range(self.config.num_experts)):
                absent = [e for e in range(min(max(ids), self.config.num_experts)) if e not in ids][:8]
                apart = f" without {', '.join(map(str, absent))}" if absent else ""
                self.problems.append(
                    f"the files hold experts {min(ids)}..{max(ids)}{apart}, expected {self.config.num_experts} "
                    "by config.json"
                )


def _equal(a: Place, b: Place) -> bool:
    x, y = (place.file.read(place.tensor.name) for place in (a, b))
    if x.shape != y.shape:
        return False
    return all(torch.equal(p.float(), q.float()) for p, q in zip(x.split(4096), y.split(4096), strict=True))
