"""The rules by which GPU kernels are cut: pure functions from (shape, dtype, chip) to a block configuration.

What `python -m grok_kernels.autotune` measured on a chip is in tuned/<chip>.json and goes before the defaults here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .chips import Chip
from .dtypes import dtype_name

# Products


@dataclass(frozen=True)
class Gemm:
    """How a product is cut: the tile's rows, outputs and columns of K, and the warps that compute it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # blocks of K in flight
    swap: bool  # swapped operands: wᵀ's side is the tensor core's M (64 or more), and the rows of x its N (8 or more)
    group_m: int = 8  # tiles of rows that take turns at one panel of weights, so that both stay in L2


FEW_ROWS = 64
_BYTES = {"e4m3": 1, "int8": 1, "bf16": 2, "fp32": 4}


def gemm(n: int, k: int, dot: str, weight: torch.dtype, chip: Chip, rows: int, *, pair: bool = False) -> Gemm:
    """The tiles of a product (rows, k) x (n, k) in type `dot`; with `pair`, of gate and up at once, n columns each.

    What was measured is in tuned/<chip>.json: {"gemm": {KEY: {"many": GEMM, "few": GEMM, "same_bits": BOOL}}} with
    KEY from `gemm_key` and GEMM the fields of `Gemm`. "few" serves up to 64 rows, but only where "same_bits" was
    measured on the chip; otherwise "many" serves all, so that no result depends on the batch.
    """
    measured = _tuned(chip.name).get("gemm", {}).get(gemm_key(n, k, dot, weight, pair))
    if measured is None:
        return default_gemm(dot, weight, chip, pair=pair)
    return Gemm(**measured["few" if rows <= FEW_ROWS and measured["same_bits"] else "many"])


def gemm_key(n: int, k: int, dot: str, weight: torch.dtype, pair: bool) -> str:
    return f"{n},{k},{dot},{dtype_name(weight)},{'pair' if pair else 'single'}"


def default_gemm(dot: str, weight: torch.dtype, chip: Chip, *, few: bool = False, pair: bool = False) -> Gemm:
    """The tiles where nothing was measured, counted from registers and shared memory; few: the variant for few rows.

    A block of K is 128 bytes of the wider operand: a whole line of the shared memory's swizzle, and never more than
    the 128 columns that share a scale. A tile of 128 x 128 loads 1 byte of shared memory per 64 operations; with 8
    warps a thread has 64 accumulators, and as many again for the partial sums that are promoted. Gate and up at once
    double the accumulators and leave room for half the rows; so do the scales of int8 weights inside the loop.
    Weights that are converted (int8 to bf16) take the swapped side, whose operand may come from registers: the
    converted values never go back to shared memory. Few rows are bound by the bytes of the weights, so a tile of 16
    rows suffices, and more blocks of K are in flight.
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


# Rows per tile of the swapped-operand CUDA kernels, as they are instantiated.
SWAPPED_TILES = {torch.float8_e4m3fn: (16, 64), torch.int8: (16, 64, 128)}


def swapped_tile(weight: torch.dtype, most: int, even: int, chip: Chip) -> int:
    """Rows per tile of the swapped-operand CUDA GEMM; 0 selects the normal kernel, which is for many rows.

    most: the rows that one expert may have; even: the rows of each expert if all have as many. The key
    {"swapped": {WEIGHT DTYPE: {"same_bits": true}}} in tuned/<chip>.json says that on this chip all these kernels gave
    the same bits. Without it e4m3 always gets 0 and int8 always 64, so that no result depends on the batch.

    Measured on an H100, layer of 8 experts: a tile of 16 reads weights at 97 to 100% of the memory bandwidth, which for
    e4m3 is 4% faster than the normal kernel, and 13% at one token. At 64 tokens with random routing it is 10% slower,
    since an expert with more rows than a tile reads its weights again; hence the limit at half of a tile of 16. One
    matrix (`most` equals `even`) has too few tiles of many rows for all multiprocessors: there 64 rows a tile win up to
    64 rows of e4m3, and up to 256 of int8.
    """
    e4m3 = weight == torch.float8_e4m3fn
    if not _tuned(chip.name).get("swapped", {}).get(dtype_name(weight), {}).get("same_bits", False):
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
    """Rows of one program of attention (queries times the heads of a group), and how it loads their keys."""

    rows: int
    warps: int
    stages: int  # of the software pipeline; with ahead "" it loads page ids first, keys and values behind them
    ahead: str = ""  # prefetched into registers for the next block: nothing, its "pages", or the whole "blocks"


@dataclass(frozen=True)
class Attention:
    """How attention is cut. Prefill and decode must add in the same order, so they share the number of keys in a block.
    Rows and warps may differ: on an H100 wgmma (64 rows or more, by whole warpgroups) and mma.sync (by one warp) gave
    the same bits where both multiply the columns of K in their own order, 16 at a time."""

    keys: int  # in a block
    prefill: Tile
    decode: Tile
    resident: int  # decoding programs on a multiprocessor at once; bounds the registers of each
    words: bool = False  # whether e4m3 is loaded and converted four at a time


def attention(dot: str, cache: torch.dtype, chip: Chip) -> Attention:
    """The tiles for queries and keys that multiply in type `dot`.

    Measured on an H100. bf16, one prompt of 2048 queries and 2048 keys: 246 µs with blocks of 64 keys, 299 with 32;
    64 requests of 8192 keys decode at the speed of memory with either. e4m3 is bound by its conversion, to which a
    decoding tile of 64 rows, of which a query fills 6, adds softmax: 16 rows and one warp take 0.50 ms where 64 rows
    took 0.84 (bf16: 0.77). Two or more warps of mma.sync would share the keys of a row, which is another order of
    sums. Nothing was measured on other chips.
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
    """What `python -m grok_kernels.autotune` wrote to this file; empty where there is none. ValueError where it was
    measured on another chip."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if (measured := found.get("with", {}).get("chip", chip)) != chip:
        raise ValueError(f"{file} was measured on {measured}, expected {chip}")
    return found
