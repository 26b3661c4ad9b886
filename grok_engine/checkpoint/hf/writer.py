"""Writes a model as the hub has it: `config.json` and safetensors files, in 8 bits with compressed-tensors' scales."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from grok_engine.checkpoint.base import Checkpoint, TensorInfo
from grok_engine.checkpoint.new_file import NewFile, Part, raw
from grok_engine.checkpoint.rows import ROUNDED, dequantized, expanded, rounded, row_chunks, scale_groups
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.config import ModelConfig, WeightFormat
from grok_engine.models.families.base import Family
from grok_kernels.dtypes import DTYPES

from .compressed import BITS, Scheme, quantization_config
from .files import INDEX, SINGLE
from .values import hf_values

SHARD = 5_000_000_000  # bytes of a file, unless one tensor takes more
_CODES = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "fp16": ("F16", 2), "fp8_e4m3": ("F8_E4M3", 1)}
_TORCH = {**DTYPES, "fp16": torch.float16}
_FLOAT16 = ("fp16", "F16")  # how readers name what they turn into fp32


@dataclass(frozen=True, slots=True)
class _Plane:
    """One tensor of a file."""

    name: str
    code: str
    shape: tuple[int, ...]
    itemsize: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix or vector of the model, in `format`; scheme: of its scales, if it has any."""

    info: TensorInfo
    expert: int | None
    module: str  # its name in the file, without `.weight`
    name: str
    template: str
    format: str
    scheme: Scheme | None

    def planes(self) -> Iterator[_Plane]:
        shape = self.info.shape[-2:] if len(self.info.shape) > 1 else self.info.shape
        if self.scheme is None:
            code, size = _CODES[self.format]
            yield _Plane(self.name, code, shape, size)
            return
        (n, k), (rows, columns) = shape, self.scheme.block
        columns = columns or k
        code, size = _CODES["fp16" if self._scale_dtype == torch.float16 else "fp32"]
        yield _Plane(f"{self.module}.{self.scheme.scale}", code, (-(-n // rows), -(-k // columns)), size)
        if self.format in BITS:
            yield _Plane(f"{self.module}.weight_shape", "I64", (2,), 8)
            yield _Plane(f"{self.module}.weight_packed", "I32", (n, -(-k // (32 // BITS[self.format]))), 4)
        else:
            yield _Plane(self.name, *_code_shape(self.format, shape))

    @property
    def _scale_dtype(self) -> torch.dtype:
        """int4 has scales of fp16, unless they are fp32 already."""
        kept = self.info.format == self.format == "int4" and self.info.scales == "fp32"
        return torch.float16 if self.format == "int4" and not kept else torch.float32

    def parts(self, checkpoint: Checkpoint, starts: Mapping[str, int]) -> Iterator[Part]:
        """Its bytes; starts: of its planes in the file."""
        if self.scheme is None:
            at = starts[self.name]
            for _, values, scales in row_chunks(checkpoint, self.info, self.expert):
                yield (at, part := raw(_floats(values, scales, self.info, self.format)))
                at += len(part)
            return
        packed = self.format in BITS
        values_at = starts[f"{self.module}.weight_packed" if packed else self.name]
        scales_at = starts[f"{self.module}.{self.scheme.scale}"]
        if packed:
            yield starts[f"{self.module}.weight_shape"], raw(torch.tensor(self.info.shape[-2:]))
        for _, values, scales in row_chunks(checkpoint, self.info, self.expert):
            q_NK, scales_NG = self._quantized(values, scales)
            yield (values_at, part := raw(_packed(q_NK, BITS[self.format]) if packed else q_NK))
            values_at += len(part)
            yield (scales_at, part := raw(scales_NG.to(self._scale_dtype)))
            scales_at += len(part)

    def _quantized(self, values: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.scheme is not None
        info = self.info
        if info.format != self.format:
            k = values.shape[1]
            return rounded(dequantized(values, scales, info.block), self.format, k // (self.scheme.block[1] or k))
        assert scales is not None
        assert info.block is not None
        return values, scales.float() if self.scheme.block[0] > 1 else expanded(scales, info.block, len(values))


def _code_shape(format: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], int]:
    code, size = _CODES[format]
    return code, shape, size


def _floats(values: Tensor, scales: Tensor | None, info: TensorInfo, format: str) -> Tensor:
    """Values in a float format."""
    if scales is not None:
        values = dequantized(values, scales, info.block)
    return values.to(_TORCH[format])


def _packed(q_NK: Tensor, bits: int) -> Tensor:
    """Integers as compressed-tensors packs them: plus 2^(bits − 1), 32 / bits to an int32 from its lowest bits on, rows
    padded with zeros."""
    unsigned = (q_NK + (1 << bits - 1)).contiguous().view(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -q_NK.shape[1] % (32 // bits)))
    return padded if bits == 8 else padded[:, ::2] | padded[:, 1::2] << 4


def hf_files(
    checkpoint: Checkpoint,
    config: ModelConfig,
    source: Mapping[str, Any],
    weights: WeightFormat | None,
    shard_bytes: int = SHARD,
) -> tuple[list[NewFile], dict[str, bytes]]:
    """What a folder holds: files of weights, and small ones, `config.json` the last of them.

    source: as for `hf_values`. Without `weights`, each matrix stays as it is stored, or becomes fp32 where
    compressed-tensors cannot say its scales. int8, int4 and fp8 keep scales that fit and round the others (`fill`);
    embedding and output head are bf16 then, since servers do not quantise them. Norms and router stay floats as they
    are. CheckpointError as of `hf_values`.
    """
    family, values = hf_values(config, source)
    infos = [checkpoint.tensors[name] for name in tensor_shapes(config)]
    stored = {info.name: _stored_as(info, weights, _common_block(infos)) for info in infos}
    matrices = [m for info in infos for m in _matrices(info, _spelling(family, config), *stored[info.name])]
    schemes: dict[str, dict[str, Scheme | None]] = {}
    for matrix in matrices:
        if len(matrix.info.shape) > 1 and matrix.info.name != "embed":
            schemes.setdefault(matrix.template, {})[matrix.module] = matrix.scheme
    values["torch_dtype"] = _dtype(matrices)
    if (quantization := quantization_config(schemes)) is not None:
        values["quantization_config"] = quantization
    shards = _shards(matrices, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    files = [_file(name, shard, checkpoint) for name, shard in zip(names, shards, strict=True)]
    small: dict[str, bytes] = {}
    if len(shards) > 1:
        places = {p.name: name for name, shard in zip(names, shards, strict=True) for m in shard for p in m.planes()}
        total = sum(plane.nbytes for matrix in matrices for plane in matrix.planes())
        small[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": places})
    return files, {**small, "config.json": _json(values)}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _spelling(family: Family, config: ModelConfig) -> Mapping[str, Any]:
    """Grok-2 as released, Grok-1 as hpcai-tech names it, others as transformers does."""
    hpcai = config.post_norms and not config.dense_d_ff
    return family.spellings[1 if hpcai else 0]


def _matrices(info: TensorInfo, names: Mapping[str, Any], format: str, scheme: Scheme | None) -> Iterator[_Matrix]:
    match = re.match(r"layers\.(\d+)\.", info.name)
    ours = f"layers.{{i}}.{info.name[match.end() :]}" if match else info.name
    layer, template = int(match[1]) if match else 0, names[ours]
    for e in range(info.shape[0]) if len(info.shape) == 3 else (None,):
        name = template.format(i=layer, e=e)
        module = name.removesuffix(".weight")
        yield _Matrix(info, e, module, name, template.removesuffix(".weight"), format, scheme)


def _common_block(infos: list[TensorInfo]) -> tuple[int, int]:
    """The block of rows and columns of which all e4m3 matrices have scales, smaller ones one of their own size; (0, 0)
    where they have others, or matrices of int8 lie beside them."""
    blocks = {info.shape[-2:]: info.block for info in infos if info.block}
    if not blocks or {info.format for info in infos if info.block} != {"fp8_e4m3"}:
        return 0, 0
    rows, columns = (max(block[i] for block in blocks.values()) for i in (0, 1))
    same = all(block == (min(rows, n), min(columns, k)) for (n, k), block in blocks.items())
    whole = all(block == shape for shape, block in blocks.items())
    return (rows, columns) if same and rows > 1 and not whole else (0, 0)


def _stored_as(info: TensorInfo, weights: WeightFormat | None, block: tuple[int, int]) -> tuple[str, Scheme | None]:
    own = "fp16" if info.stored in _FLOAT16 else info.format
    kept = _scheme(info, block)
    exact = "fp32" if info.block else own
    if len(info.shape) == 1 or info.name.endswith(".router"):
        return exact, None
    if info.name == "embed" or (info.name == "lm_head" and weights in ROUNDED):
        return (exact if weights is None else "fp32" if weights == "fp32" else "bf16"), None
    if weights is None:
        return (own, kept) if kept else (exact, None)
    if weights in ("bf16", "fp32"):
        return weights, None
    format, _ = ROUNDED[weights]
    if kept and own == format:
        return own, kept
    if block[0] and format == "fp8_e4m3":
        return exact, None  # beside matrices in blocks, which keep theirs
    k = info.shape[-1]
    groups = scale_groups(weights, k)
    return format, Scheme(format, (1, k // groups if groups > 1 else 0))


def _scheme(info: TensorInfo, block: tuple[int, int]) -> Scheme | None:
    """That keeps values and scales; None for floats, and for scales that none can say. block: of `_common_block`."""
    if info.block is None:
        return None
    (n, k), (rows, columns) = info.shape[-2:], info.block
    if block[0]:
        return Scheme(info.format, block)
    if columns >= k:  # a scale of the whole matrix is written once for each row
        return Scheme(info.format) if rows == 1 or rows >= n else None
    if info.format in BITS:
        return Scheme(info.format, (1, columns)) if k % columns == 0 else None
    return Scheme(info.format, info.block) if rows == 1 and k % columns == 0 else None


def _dtype(matrices: list[_Matrix]) -> str:
    """The dtype of the computation: that of most numbers in floats, bf16 where matrices are in 8 bits."""
    sizes: dict[str, int] = {}
    for matrix in matrices:
        format = "bf16" if matrix.scheme else matrix.format
        sizes[format] = sizes.get(format, 0) + prod(matrix.info.shape[-2:])
    return str(_TORCH[max(sizes, key=lambda format: sizes[format])]).removeprefix("torch.")


def _shards(matrices: list[_Matrix], shard_bytes: int) -> list[list[_Matrix]]:
    shards: list[list[_Matrix]] = [[]]
    room = shard_bytes
    for matrix in matrices:
        nbytes = sum(plane.nbytes for plane in matrix.planes())
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(matrix)
        room -= nbytes
    return shards


def _file(name: str, matrices: list[_Matrix], checkpoint: Checkpoint) -> NewFile:
    """A safetensors file. The wider numbers come first, so that each tensor is aligned."""
    placed = sorted((plane for matrix in matrices for plane in matrix.planes()), key=lambda plane: -plane.itemsize)
    ends = list(accumulate(plane.nbytes for plane in placed))
    placed = [replace(plane, start=end - plane.nbytes) for plane, end in zip(placed, ends, strict=True)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for plane in placed:
        offsets = [plane.start, plane.start + plane.nbytes]
        header[plane.name] = {"dtype": plane.code, "shape": list(plane.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    starts = {plane.name: len(head) + plane.start for plane in placed}

    def body() -> Iterator[Part]:
        for matrix in matrices:
            yield from matrix.parts(checkpoint, starts)

    return NewFile(name, head, len(head) + ends[-1], body)
