"""What the GPU kernels are shaped by: the chip, and pure functions from (shape, dtype, chip) to a block configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Chip:
    """A GPU as the kernels see it."""

    name: str
    arch: str  # sm_90, gfx942
    multiprocessors: int
    shared_bytes: int  # that one block may have

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where the chip is not NVIDIA's."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3."""
        return self.capability >= 89


CHIPS = {  # those that the kernels are compiled for without one at hand
    "h100": Chip("h100", "sm_90", 132, 232448),
    "h200": Chip("h200", "sm_90", 132, 232448),  # to the compiler an H100, with another memory: measured apart
    "a100": Chip("a100", "sm_80", 108, 166912),
    "l40s": Chip("l40s", "sm_89", 142, 101376),
    "b200": Chip("b200", "sm_100", 148, 232448),
    "mi300x": Chip("mi300x", "gfx942", 304, 65536),
}

_assumed: ContextVar[Chip] = ContextVar("grok_kernels_chip", default=CHIPS["h100"])


@contextmanager
def assume_chip(chip: Chip) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU (under the interpreter, or on `meta`) count as on this chip."""
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def chip_name(says: str) -> str:
    """The name in `CHIPS` of a GPU that calls itself `says`; of a chip not listed there, its own with hyphens.

    Whole words decide, so that what was measured on one chip never serves another: a GH200 is no H200.
    """
    words = re.findall("[a-z0-9]+", says.lower())
    return next((name for name in CHIPS if name in words), "-".join(words))


def chip_of(device: torch.device) -> Chip:
    """The chip that this device is, or for a device that is no GPU the one assumed."""
    return _read(device.index or 0) if device.type == "cuda" else _assumed.get()


def multiplies_fp8(device: torch.device) -> bool:
    """Whether this device is a GPU whose tensor cores multiply e4m3."""
    return device.type == "cuda" and chip_of(device).has_fp8


@lru_cache
def _read(index: int) -> Chip:
    p: Any = torch.cuda.get_device_properties(index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return Chip(chip_name(p.name), arch, p.multi_processor_count, p.shared_memory_per_block_optin)


# Products


@dataclass(frozen=True)
class Gemm:
    """How a product is cut: tiles of rows, of outputs and of K; and who computes one."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # blocks of K in flight
    swap: bool  # weights on the tensor core's wide side, of 64 rows; x's rows on the other, of 8 at least
    group_m: int = 8  # tiles of rows that visit a panel of weights in turn


FEW_ROWS = 64
_BYTES = {"e4m3": 1, "int8": 1, "bf16": 2, "fp32": 4}


def gemm(n: int, k: int, dot: str, weight: torch.dtype, chip: Chip, rows: int, *, pair: bool = False) -> Gemm:
    """The tiles of a product (rows, k) x (n, k) in type `dot`; of gate and up at once where `pair`, n columns each.

    What was measured is in tuned/<chip>.json: {"gemm": {KEY: {"many": GEMM, "few": GEMM, "same_bits": BOOL}}} with KEY
    "n,k,dot,weight dtype,pair" (as `gemm_key`) and GEMM the fields of `Gemm`. "few" serves up to 64 rows, but only with
    "same_bits", measured on the chip: else "many" serves all, so that no result depends on the batch.
    """
    measured = _tuned(chip.name).get("gemm", {}).get(gemm_key(n, k, dot, weight, pair))
    if measured is None:
        return default_gemm(dot, weight, chip, pair=pair)
    return Gemm(**measured["few" if rows <= FEW_ROWS and measured["same_bits"] else "many"])


def gemm_key(n: int, k: int, dot: str, weight: torch.dtype, pair: bool) -> str:
    return f"{n},{k},{dot},{str(weight).removeprefix('torch.')},{'pair' if pair else 'single'}"


def default_gemm(dot: str, weight: torch.dtype, chip: Chip, *, few: bool = False, pair: bool = False) -> Gemm:
    """The tiles where nothing was measured; `few` the variant for few rows. Not measured itself: counted.

    A block of K is 128 bytes of the wider operand: a whole line of the shared memory's swizzle, and never more than
    the 128 columns that share a scale. A tile 128 x 128 loads 1 byte of shared memory for 64 operations, at 8 warps 64
    accumulators a thread, and as many again for the partial sums that are promoted; gate and up at once double the
    accumulators, and leave room for half the rows; so do the scales of int8 weights inside the loop. Weights that are converted (int8 to bf16) go to the wide side,
    which takes its operand from registers: the converted values never pass through shared memory again.
    Few rows: the bytes of the weights bound it, so 16 rows suffice to a tile, and more blocks of K are in flight.
    """
    if dot == "fp32":
        return Gemm(32, 32 if pair else 64, 32, 4, 2, swap=False)
    block_k = 128 // _BYTES[dot]
    swap = few or (dot == "bf16" and weight.itemsize == 1)
    block_m = 16 if few else 64 if pair or weight == torch.int8 else 128
    if not chip.has_tma and weight.itemsize == 1:  # pointers of the weights take registers too
        block_m = min(block_m, 32 if pair else 64)
    block_n = 128
    stage = (block_m * _BYTES[dot] + (2 if pair else 1) * block_n * weight.itemsize) * block_k
    stages = max(1, min(6 if few else 4, (chip.shared_bytes - 16384) // stage))
    return Gemm(block_m, block_n, block_k, 8 if block_m * block_n >= 8192 else 4, stages, swap)


WIDE_TOKENS = {torch.float8_e4m3fn: (16, 64), torch.int8: (16, 64, 128)}  # that the kernels by hand are compiled for


def wide_tokens(weight: torch.dtype, most: int, even: int, chip: Chip) -> int:
    """How many rows of x a tile has of the cuda backend's products whose weights are on the wide side (`grok/wide.h`);
    0 for its kernel for many rows. `most` rows an expert may have, `even` rows if all have as many.

    {"wide": {WEIGHT DTYPE: {"same_bits": true}}} in tuned/<chip>.json says that a chip gave the same bits for all of
    them. Without it e4m3 has 0 and int8 has 64 for any number of rows, so that no result depends on the batch.

    Measured on an H100. The layer of 8 experts: a tile of 16 reads weights at 97 to 100% of the memory's bandwidth, of e4m3 4%
    faster than the kernel for many rows and at one token 13%; at 64 tokens that fall by chance it is 10% slower, since an
    expert with more rows than a tile reads its weights again: so tiles of 16 end at half of what they hold. One matrix
    (`most` is `even`), which has too few tiles of many rows for all multiprocessors: 64 a tile win to 64 rows of e4m3, and
    to 256 of int8.
    """
    e4m3 = weight == torch.float8_e4m3fn
    if not _tuned(chip.name).get("wide", {}).get(str(weight).removeprefix("torch."), {}).get("same_bits", False):
        return 0 if e4m3 else 64
    if most <= 16 or even <= 8:
        return 16
    one_matrix = most == even
    if e4m3:
        return 64 if one_matrix and even <= 64 else 0
    return 64 if even <= (256 if one_matrix else 64) else 128


# Attention


@dataclass(frozen=True)
class Tile:
    """Rows of one program of attention, queries times the heads of a group, and how it loads their keys."""

    rows: int
    warps: int
    stages: int  # of the pipeline: with ahead "", page ids are loaded first, keys and values behind them
    ahead: str = ""  # held in registers from one block to the next: nothing, its "pages", or the whole "blocks"


@dataclass(frozen=True)
class Attention:
    """How attention is cut. A sum's order is to be the same in prefill and decode, and so is the number of keys in a block.
    Rows and warps may differ: on an H100 wgmma (64 rows or more, by whole warpgroups) and mma.sync (by one warp) gave the
    same bits where both multiply the columns of K in their own order, 16 at a time."""

    keys: int  # in a block
    prefill: Tile
    decode: Tile
    resident: int  # programs of a multiprocessor, where requests decode; bounds the registers of each
    words: bool = False  # e4m3 is read and converted four at a time


def attention(dot: str, cache: torch.dtype, chip: Chip) -> Attention:
    """The tiles for queries and keys that multiply in type `dot`.

    Measured on an H100: 2048 queries of one prompt and 2048 keys, in bf16, 246 µs with 64 keys, 299 with 32; 64 requests of 8192
    keys are decoded at the speed of memory with either. e4m3 is bound by its conversion, which a decoding tile of 64 rows,
    of which a query has 6, adds softmax to: with 16 rows and one warp it takes 0.50 ms in place of 0.84, where bf16 takes 0.77.
    Two warps or more of mma.sync would share the keys of a row, which is another order of sums. On other chips nothing was
    measured.
    """
    if dot == "fp32":
        tile = Tile(64, 8 if chip.capability else 4, 2)
        return Attention(32, tile, tile, 1)
    if chip.capability == 90:
        if cache.itemsize == 1:
            return Attention(32, Tile(64, 4, 1, "blocks"), Tile(16, 1, 3, "pages"), 7, words=True)
        return Attention(64, Tile(64, 4, 3, "pages"), Tile(64, 4, 3, "pages"), 2)
    tile = Tile(64, 8 if chip.capability else 4, 3)
    return Attention(32, tile, tile, 1)


@lru_cache
def _tuned(chip: str) -> dict[str, Any]:
    return read_tuned(Path(__file__).parent / "tuned" / f"{chip}.json", chip)


def read_tuned(file: Path, chip: str) -> dict[str, Any]:
    """What `python -m grok_kernels.tune` wrote to this file, or nothing yet. ValueError where that was another chip's."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if (measured := found.get("with", {}).get("chip", chip)) != chip:
        raise ValueError(f"{file} was measured on {measured}, expected {chip}")
    return found
