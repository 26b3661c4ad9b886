"""Writes a model as a GGUF file: Q8_0, BF16, F16 or F32, with its metadata and tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grok_engine.checkpoint.base import Checkpoint, CheckpointError, TensorInfo
from grok_engine.checkpoint.new_file import NewFile, Part, raw
from grok_engine.checkpoint.rows import dequantized, expanded, rounded, row_chunks
from grok_engine.checkpoint.shapes import tensor_shapes
from grok_engine.config import ModelConfig, WeightFormat

from .blocks import TYPES, TensorType
from .header import Place
from .metadata import gguf_metadata
from .names import FACTORS, file_name

ALIGNMENT = 32
_IDS = {kind.name: number for number, kind in TYPES.items()}
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BLOCK = 32  # columns of a Q8_0 block


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file, and what of the model it is. offset: counted from where the data begins."""

    name: str
    info: TensorInfo
    kind: TensorType
    offset: int
    heads: int  # of q or k, whose rows are interleaved; 0 for others

    @property
    def place(self) -> Place:
        return Place(self.name, self.kind, self.info.shape, self.offset)

    def parts(self, checkpoint: Checkpoint, start: int) -> Iterator[Part]:
        info = self.info
        head_dim = info.shape[-2] // self.heads if self.heads else 1
        for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
            for _, values, scales in row_chunks(checkpoint, info, expert, head_dim):
                if scales is not None and info.block is not None:
                    scales = expanded(scales, info.block, len(values))
                if self.heads:
                    values = _interleaved(values, head_dim)
                    scales = None if scales is None else _interleaved(scales, head_dim)
                yield (start, part := _stored(self.kind, values, scales, info))
                start += len(part)


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads, from halves that rotate against each other to neighbouring pairs."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _stored(kind: TensorType, values: Tensor, scales: Tensor | None, info: TensorInfo) -> memoryview:
    """The bytes of rows; scales: a row for each."""
    columns = info.block[1] if info.block else 0
    if kind.name == "Q4_0":
        if scales is None or info.format != "int4" or columns % _BLOCK:
            block = None if scales is None else (1, columns)
            q_NK, d_NG = rounded(dequantized(values, scales, block), "int4", values.shape[1] // _BLOCK)
        else:
            q_NK, d_NG = values, scales.repeat_interleave(columns // _BLOCK, 1)
        return _q4_0(q_NK.numpy(), d_NG.half().numpy())
    if kind.name != "Q8_0":
        block = None if scales is None else (1, columns)
        return raw(dequantized(values, scales, block).to(_TORCH[kind.name]))
    if scales is not None and info.format in ("int8", "int4") and columns % _BLOCK == 0:
        d_NG = scales.repeat_interleave(columns // _BLOCK, 1)
        if bool((d_NG.half().float() == d_NG).all()):  # a block says them: values and scales stay
            return _blocks(values.numpy(), d_NG.half().numpy())
    return q8_0(dequantized(values, scales, None if scales is None else (1, columns)))


def q8_0(x_NK: Tensor) -> memoryview:
    """Blocks by ggml's rule: d = amax / 127, q = round(x · (1 / d)), halves away from zero; d is stored in fp16."""
    x = x_NK.numpy().reshape(len(x_NK), -1, _BLOCK)
    d = np.abs(x).max(-1) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    scaled = x * inverse[..., None]
    whole = np.floor(np.abs(scaled))
    q = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
    with np.errstate(over="ignore"):
        return _blocks(q.astype(np.int8), d.astype(np.float16))


def _q4_0(q: NDArray[np.int8], d: NDArray[np.float16]) -> memoryview:
    """q (N, K), d (N, blocks)."""
    code = (q + np.int8(8)).view(np.uint8).reshape(*d.shape, 2, _BLOCK // 2)
    found = np.empty((*d.shape, 2 + _BLOCK // 2), np.uint8)
    found[..., :2] = np.ascontiguousarray(d)[..., None].view(np.uint8)
    found[..., 2:] = code[..., 0, :] | code[..., 1, :] << 4
    return found.reshape(-1).data


def _blocks(q: NDArray[np.int8], d: NDArray[np.float16]) -> memoryview:
    """q (N, K) or (N, blocks, 32), d (N, blocks)."""
    found = np.empty((*d.shape, 2 + _BLOCK), np.uint8)
    found[..., :2] = np.ascontiguousarray(d)[..., None].view(np.uint8)
    found[..., 2:] = np.ascontiguousarray(q).reshape(*d.shape, _BLOCK).view(np.uint8)
    return found.reshape(-1).data


def gguf_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer: Mapping[str, Any],
    weights: WeightFormat | None,
    name: str = "model.gguf",
) -> NewFile:
    """The file of a model, which llama.cpp runs.

    Without `weights`, floats stay as they are and int8 becomes Q8_0: bit for bit where a scale is that of 32 columns or
    a multiple and an fp16 number, else rounded anew from the exact values; int4 becomes Q4_0 under the same conditions,
    else Q8_0. int8 is Q8_0, int4 Q4_0, whatever the groups. Norms and router are F32.
    CheckpointError as of `gguf_metadata`, and for fp8, which GGUF has not.
    """
    c = config
    if weights == "fp8":
        raise CheckpointError("weights='fp8': GGUF has no 8-bit floats, expected int8, bf16 or fp32")
    tensors: list[_Tensor] = []
    at = 0
    for info in (checkpoint.tensors[name] for name in tensor_shapes(c)):
        heads = 0
        if not c.post_norms and info.name.endswith((".attn.q", ".attn.k")):
            heads = c.num_heads if info.name.endswith("q") else c.num_kv_heads
        tensors.append(_Tensor(file_name(info.name), info, _kind(info, weights), at, heads))
        at += _padded(tensors[-1].place.nbytes)
    factors = np.array(c.rope_factors, "<f4").tobytes()
    metadata = gguf_metadata(c, tokenizer, {tensor.name: tensor.place for tensor in tensors})
    entries = [(tensor.name, tensor.info.shape, tensor.kind, tensor.offset) for tensor in tensors]
    if factors:
        entries.append((FACTORS, (len(c.rope_factors),), TYPES[_IDS["F32"]], at))
    head = _head(metadata, entries)

    def body() -> Iterator[Part]:
        for tensor in tensors:
            start = len(head) + tensor.offset
            yield from tensor.parts(checkpoint, start)
            yield start + tensor.place.nbytes, memoryview(bytes(-tensor.place.nbytes % ALIGNMENT))
        yield len(head) + at, memoryview(factors + bytes(-len(factors) % ALIGNMENT))

    return NewFile(name, head, len(head) + at + _padded(len(factors)), body)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _kind(info: TensorInfo, weights: WeightFormat | None) -> TensorType:
    if len(info.shape) == 1 or info.name.endswith(".router"):
        name = "F32"
    elif weights is None and info.format == "fp8_e4m3":
        raise CheckpointError(f"{info.name} is fp8_e4m3, which GGUF has not: expected weights of int8, bf16 or fp32")
    elif (weights or info.format).startswith(("int8", "int4")):  # whatever the groups, which are a block's here
        name = "F32" if info.shape[-1] % _BLOCK else "Q8_0" if _is_8_bits(info, weights) else "Q4_0"
    elif weights is None and info.stored in ("fp16", "F16"):
        name = "F16"
    else:
        name = {"bf16": "BF16", "fp32": "F32"}[weights or info.format]
    return TYPES[_IDS[name]]


def _is_8_bits(info: TensorInfo, weights: WeightFormat | None) -> bool:
    """Q4_0 holds int4 whose groups are whole blocks with scales of fp16."""
    if weights is not None:
        return weights.startswith("int8")
    return info.format != "int4" or info.scales != "fp16" or info.block is None or info.block[1] % _BLOCK > 0


def _head(metadata: Mapping[str, Any], entries: list[tuple[str, tuple[int, ...], TensorType, int]]) -> bytes:
    """As `header.py` describes it, padded to where the data begins."""
    found = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    found += [_string(key) + _value(value) for key, value in metadata.items()]
    for name, shape, kind, offset in entries:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        found.append(_string(name) + sizes + struct.pack("<IQ", _IDS[kind.name], offset))
    text = b"".join(found)
    return text + bytes(-len(text) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Its type and the value; an array by its first element."""
    if isinstance(value, tuple):
        number, code = _type(value[0]) if value else (8, "")
        if number == 4:
            number, code = 5, "i"  # llama.cpp reads arrays of integers as int32
        items = struct.pack(f"<{len(value)}{code}", *value) if code else b"".join(map(_string, value))
        return struct.pack("<IIQ", 9, number, len(value)) + items
    number, code = _type(value)
    return struct.pack("<I", number) + (_string(value) if isinstance(value, str) else struct.pack(f"<{code}", value))


def _type(value: Any) -> tuple[int, str]:
    if isinstance(value, bool):
        return 7, "?"
    if isinstance(value, str):
        return 8, ""
    if isinstance(value, float):
        return 6, "f"
    return (5, "i") if value < 0 else (4, "I") if value < 1 << 32 else (10, "Q")
