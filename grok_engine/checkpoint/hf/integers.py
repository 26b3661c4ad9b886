"""Matrices of 4- or 8-bit integers that are packed into words of 32 bits: w[n, k] = (q[n, k] − z[g, n]) · s[g, n].

g is the group of column k. A word holds 32 / bits integers, the first in its lowest bits. What the tools store:

    tool                 q                  z                      s         g
    GPTQ                 qweight (K/p, N)   qzeros (G, N/p)        (G, N)    g_idx (K,), else k // group
    AWQ                  qweight (K, N/p)   qzeros (G, N/p)        (G, N)    k // group
    compressed-tensors   (N, K/p)           (N/p, G) or (N, G)     (N, G)    weight_g_idx (K,), else k // group

with p = 32 / bits: K/p, rounded up, says that a word's integers are neighbours along K, N/p along N. AWQ's words hold
rows n in the order 0, 2, 4, 6, 1, 3, 5, 7. GPTQ's first version stores z − 1. compressed-tensors adds 2^(bits − 1) to q
and z before it packs them, and has 8-bit q (`Matrix`) and any z in int8 too.

The layouts follow AutoGPTQ 0.7, GPTQModel 7.7, AutoAWQ 0.2.9 and compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError

from .files import Files, Place

CHUNK = 1 << 18  # values that are dequantised at once
SCALES = ("F32", "BF16", "F16")
VALUES = {"GPTQ": "qweight", "AWQ": "qweight", "compressed-tensors": "weight_packed"}  # stand for `weight`
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word column 0, 1, … is


@dataclass(frozen=True, slots=True)
class Packing:
    """What a configuration says of packed matrices. group: columns that share a scale, 0 is all.

    symmetric: every zero point is 2^(bits − 1). shift: what is added to the zero points that a file has.
    """

    tool: str  # a key of VALUES
    bits: int
    group: int
    symmetric: bool
    shift: int = 0

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def per_word(self) -> int:
        return 32 // self.bits


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix (N, K). group_K: the group of each column, None for groups of neighbours, all of one size.

    4 bits are int4 where every zero point is 8, and else int4_zero, or int8 with scales of fp32, whose product with
    q − z is not exact; 8 bits are int8. It is fp32 where groups are not of neighbours, or q − z needs nine bits.
    """

    packing: Packing
    shape: tuple[int, int]
    group: int
    values: Place
    scales: Place
    zeros: Place | None
    group_K: Tensor | None
    places: tuple[Place, ...]  # all of the above

    @property
    def block(self) -> tuple[int, int] | None:
        whole = self.group_K is None and (self.packing.bits == 4 or self.packing.symmetric)
        return (1, self.group) if whole else None

    @cached_property
    def format(self) -> str:
        if self.block is None:
            return "fp32"
        if self.packing.bits == 8:
            return "int8"
        if self.zeros is None or (self.packing.symmetric and not self.has_zero_points()):
            return "int4"
        return "int4_zero" if self.scales.tensor.code != "F32" else "int8"

    @property
    def scale_dtype(self) -> Literal["fp32", "fp16"]:
        return "fp16" if self.block and self.scales.tensor.code == "F16" else "fp32"

    @property
    def stored(self) -> str:
        ordered = "" if self.group_K is None else " with columns out of order"
        return f"{self.packing.tool}, {self.packing.bits} bits{ordered}"

    @property
    def nbytes(self) -> int:
        return sum(place.tensor.nbytes for place in self.places)

    def has_zero_points(self) -> bool:
        """Whether the files have zero points, others than those of a symmetric quantisation."""
        return self.zeros is not None and bool((self._zeros(0, self.shape[0]) != self.packing.middle).any())

    def read(self, rows: slice | None, *, dequantised: bool) -> tuple[Tensor, ...]:
        """The planes of `format` of these rows, values (N, K) in int8, scales (N, G) and zeros (N, G), or their
        products in fp32."""
        first, stop = (rows.start, rows.stop) if rows else (0, self.shape[0])
        if dequantised:
            return (self._products(first, stop),)
        assert self.block is not None, self
        q_NK, z_NG = self._values(first, stop), self._zeros(first, stop)
        if self.packing.bits == 8 and (z_NG != self.packing.middle).any():  # q − z would need nine bits
            raise CheckpointError(
                f"{self.values.file.path}: {self.values.tensor.name} has zero points other than "
                f"{self.packing.middle}, though the quantisation is symmetric"
            )
        scales = self._scales(first, stop)
        if self.format == "int4_zero":
            return q_NK.view(torch.int8), scales, z_NG
        groups = q_NK.unflatten(1, (-1, self.group))
        return groups.sub_(z_NG[..., None]).view(torch.int8).flatten(1), scales

    def _products(self, first: int, stop: int) -> Tensor:
        """(q − z) · s in fp32, a few rows at a time."""
        k = self.shape[1]
        group_K = torch.arange(k) // self.group if self.group_K is None else self.group_K
        w_NK, step = torch.empty(stop - first, k), max(CHUNK // k, 1)
        for at in range(first, stop, step):
            end = min(at + step, stop)
            part = w_NK[at - first : end - first].copy_(self._values(at, end))
            part.sub_(self._zeros(at, end).float()[:, group_K]).mul_(self._scales(at, end).float()[:, group_K])
        return w_NK

    def _values(self, first: int, stop: int) -> Tensor:
        """q in uint8 (N, K)."""
        words = _read(self.values)
        if self.packing.tool == "AWQ":
            return _unpacked_rows(words, self.packing, first, stop)
        words = words[:, first:stop].t() if self.packing.tool == "GPTQ" else words[first:stop]
        return _unpacked(words, self.packing.bits)[:, : self.shape[1]].contiguous()

    def _scales(self, first: int, stop: int) -> Tensor:
        """(N, G) in `scale_dtype`."""
        scales = _read(self.scales)
        dtype = torch.float16 if self.scale_dtype == "fp16" else torch.float32
        if self.packing.tool == "compressed-tensors":
            return scales.reshape(-1, scales.shape[-1])[first:stop].to(dtype)
        return scales[:, first:stop].t().to(dtype).contiguous()

    def _zeros(self, first: int, stop: int) -> Tensor:
        """z (N, G) in uint8, or in int16 where 255 + shift may be there."""
        packing = self.packing
        if self.zeros is None:
            groups = self.scales.tensor.shape[1 if packing.tool == "compressed-tensors" else 0]
            return torch.full((stop - first, groups), packing.middle, dtype=torch.uint8)
        zeros = _read(self.zeros)
        if zeros.dtype == torch.int8:
            return (zeros[first:stop].view(torch.uint8) + packing.middle).contiguous()
        words = zeros.t() if packing.tool == "compressed-tensors" else zeros
        rows = _unpacked_rows(words, packing, first, stop)
        return (rows if packing.bits == 4 else rows.short()) + packing.shift


def _read(place: Place) -> Tensor:
    return place.file.read(place.tensor.name)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 (R, W) → uint8 (R, 32 / bits · W), neighbours along a row from one word."""
    # a clone, since for a single word `contiguous` would keep its stride; little-endian: the lowest bits come first
    run = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return run
    pairs = run.short()
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def _unpacked_rows(words: Tensor, packing: Packing, first: int, stop: int) -> Tensor:
    """int32 (R, W) → uint8: columns first..stop − 1 of (R, 32 / bits · W), as rows (stop − first, R)."""
    p, bits = packing.per_word, packing.bits
    run = words[:, first // p : -(-stop // p)].t().clone(memory_format=torch.contiguous_format)
    bytes_WR4 = run.view(torch.uint8).unflatten(1, (-1, 4))
    rows = torch.empty(len(run), p, run.shape[1], dtype=torch.uint8)
    for i in range(p):
        at = bits * (_AWQ_ORDER[i] if packing.tool == "AWQ" else i)
        torch.bitwise_right_shift(bytes_WR4[..., at // 8], at % 8, out=rows[:, i])
    if bits == 4:
        rows &= 15
    at = first // p * p
    return rows.flatten(0, 1)[first - at : stop - at]


def find_packed(
    stem: str, shape: tuple[int, ...], packings: tuple[Packing, ...], files: Files, problems: list[str]
) -> tuple[PackedMatrix | None, set[str]]:
    """The matrix whose tensors' names begin with `stem`, by the first packing that fits, and the names that it takes;
    None and no names where the files have no such tensors. What does not fit is added to `problems`."""
    misfits: list[str] = []
    for packing in packings:
        if (values := stem + VALUES[packing.tool]) not in files.places:
            continue
        packed = packing.tool == "compressed-tensors"
        prefix = f"{stem}weight_" if packed else stem
        names = {
            "values": values,
            "scales": prefix + ("scale" if packed else "scales"),
            "zeros": prefix + ("zero_point" if packed else "qzeros"),
            "order": prefix + "g_idx",
            "shape": prefix + "shape",
        }
        if not packed:
            del names["shape"]
        found = {role: files.places[name][0] for role, name in names.items() if name in files.places}
        if wrong := _misfits(packing, names, found, shape):
            misfits = misfits or wrong
            continue
        matrix = _matrix(packing, (shape[0], shape[1]), found)
        if packed and packing.symmetric and matrix.has_zero_points():  # old tools write zeros
            problems.append(f"{names['zeros']} is not zero, though the quantisation is symmetric")
        return matrix, {names[role] for role in found}
    problems += misfits
    return None, {name for name in files.places if misfits and name.startswith(stem)}


def _misfits(packing: Packing, names: dict[str, str], found: dict[str, Place], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the tensors of one matrix."""
    if len(shape) != 2:
        return [f"{names['values']} is packed, expected a tensor of shape {shape}"]
    (n, k), p = shape, packing.per_word
    groups = -(-k // (packing.group or k))
    fits: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
        "GPTQ": {"values": ((-(-k // p), n),), "zeros": ((groups, -(-n // p)),), "scales": ((groups, n),)},
        "AWQ": {"values": ((k, -(-n // p)),), "zeros": ((groups, -(-n // p)),), "scales": ((groups, n),)},
        "compressed-tensors": {
            "values": ((n, -(-k // p)),),
            "zeros": ((-(-n // p), groups), (n, groups)),
            "scales": ((n, groups),),
        },
    }
    expected = fits[packing.tool] | {"order": ((k,),), "shape": ((2,),)}
    codes = dict.fromkeys(("values", "zeros", "order"), ("I32",)) | {"scales": SCALES, "shape": ("I64", "I32")}
    what = f"{packing.bits} bits of ({n}, {k}) in groups of {packing.group or k}"
    wrong = []
    for role, place in found.items():
        tensor = place.tensor
        allowed = ("I8",) if role == "zeros" and tensor.shape == (n, groups) and tensor.code == "I8" else codes[role]
        if packing.group == 0 and role == "scales" and tensor.shape == (n,):
            continue
        if tensor.shape not in expected[role] or tensor.code not in allowed:
            shapes = " or ".join(f"{code} {expected[role][0]}" for code in allowed)
            wrong.append(f"{tensor.name} is {tensor.code} {tensor.shape}: expected {shapes} for {what}")
    needed = {"values", "scales"} | ({"zeros"} if packing.tool == "GPTQ" or not packing.symmetric else set())
    wrong += [f"missing {names[role]}, which {names['values']} needs" for role in sorted(needed - found.keys())]
    if not wrong and (stated := found.get("shape")) and _read(stated).tolist() != [n, k]:
        wrong.append(f"{names['shape']} says {_read(stated).tolist()}, expected {[n, k]}")
    if not wrong and (order := found.get("order")):
        group_K = _read(order)
        if int(group_K.min()) < 0 or int(group_K.max()) >= groups:
            wrong.append(f"{names['order']} has groups {int(group_K.min())}..{int(group_K.max())}: expected {groups}")
    return wrong


def _matrix(packing: Packing, shape: tuple[int, int], found: dict[str, Place]) -> PackedMatrix:
    k = shape[1]
    group = packing.group or k
    group_K = _read(found["order"]).long() if "order" in found else None
    if group_K is None and k % group:
        group_K = torch.arange(k) // group  # the last group has fewer columns
    elif group_K is not None and k % group == 0 and torch.equal(group_K, torch.arange(k) // group):
        group_K = None
    places = tuple(found.values())
    return PackedMatrix(packing, shape, group, found["values"], found["scales"], found.get("zeros"), group_K, places)
