"""Values of 4, 5 or 6 bits in panels, in plain torch: what the CPU kernels read, 64 outputs by 32 columns a block.

A block is `bits` runs of 256 bytes, in each of which every output has a little-endian word of 32 bits. A value q is
stored as u = q + zero_point. Run r of the first four holds the low 4 bits of columns 8r … 8r + 7:

    bit      0–3   4–7   8–11   12–15   16–19   20–23   24–27   28–31
    column   0     2     4      6       1       3       5       7       of the run's 8

so that `word >> 4j & 0x000F000F` is the pair of columns 2j and 2j + 1 in two halves of 16 bits, and the even and the
odd nibbles are bytes of columns 0 4 1 5 and 2 6 3 7. The bits above follow in the fifth run (5 bits), or in the fifth
and sixth (6 bits, 16 columns each). Byte b of such a word belongs to the columns of byte b in the runs above; its
lowest bits are those of the first 8 columns' low nibble, then of their high nibble, then of the next 8 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import WIDTH

STEP = 1 << 22  # values that are converted at once


def pack_codes(values_ENK: Tensor, packed: Tensor, row: int, zero_point: int) -> None:
    """Write int8 values (E, N, K), of any strides, to rows row..row+N−1 of bit planes (E, N/64, K/32, bits, 64, 4)."""
    panels, k = values_ENK.shape[1] // WIDTH, values_ENK.shape[2]
    step = max(STEP // max(WIDTH * k, 1), 1)
    for e in range(values_ENK.shape[0]):
        for p in range(0, panels, step):
            part = values_ENK[e, p * WIDTH : (p + step) * WIDTH]
            at = row // WIDTH + p
            packed[e, at : at + len(part) // WIDTH].copy_(_packed(part, packed.shape[3], zero_point))


def _packed(values_NK: Tensor, bits: int, zero_point: int) -> Tensor:
    code = (values_NK + zero_point).contiguous().view(torch.uint8)
    # (P, 64, B, run, half, nibble, side): column 8 · run + 4 · half + 2 · nibble + side of a block
    low = (code & 15).view(-1, WIDTH, values_NK.shape[1] // 32, 4, 2, 2, 2)
    runs = [(low[..., 0, :] | low[..., 1, :] << 4).permute(0, 2, 3, 1, 5, 4)]
    if (high := bits - 4) > 0:
        # (P, 64, B, run, eight, half, nibble, side)
        rest = (code >> 4).view(*low.shape[:3], high, 4 // high, 2, 2, 2)
        places = [(eight, nibble) for eight in range(4 // high) for nibble in range(2)]
        word = torch.zeros_like(rest[:, :, :, :, 0, :, 0])
        for i, (eight, nibble) in enumerate(places):
            word |= rest[:, :, :, :, eight, :, nibble] << high * i
        runs.append(word.permute(0, 2, 3, 1, 5, 4))
    return torch.cat([run.flatten(4) for run in runs], 2)


def unpack_codes(packed: Tensor, zero_point: int) -> Tensor:
    """int8 values (E, N, K) of bit planes."""
    experts, panels, blocks, bits = packed.shape[:4]
    out = torch.empty(experts, panels * WIDTH, blocks * 32, dtype=torch.int8, device=packed.device)
    step = max(STEP // max(WIDTH * blocks * 32, 1), 1)
    for e in range(experts):
        for p in range(0, panels, step):
            words = packed[e, p : p + step].permute(0, 3, 1, 2, 4)  # (P, 64, B, bits, byte)
            out[e, p * WIDTH : (p + step) * WIDTH] = unpack_words(words.flatten(0, 1), bits, zero_point)
    return out


def unpack_words(words_RBb4: Tensor, bits: int, zero_point: int) -> Tensor:
    """int8 values (R, K) of single outputs: their bytes (R, K/32, bits, 4)."""
    r, blocks = words_RBb4.shape[:2]
    code = torch.empty(r, blocks, 4, 2, 2, 2, dtype=torch.uint8, device=words_RBb4.device)
    low = words_RBb4[:, :, :4].unflatten(-1, (2, 2)).transpose(3, 4)  # (R, B, run, half, side)
    code[..., 0, :], code[..., 1, :] = low & 15, low >> 4
    if (high := bits - 4) > 0:
        word = words_RBb4[:, :, 4:].unflatten(-1, (2, 2)).transpose(3, 4)
        rest = code.view(r, blocks, high, 4 // high, 2, 2, 2)
        for i in range(8 // high):
            rest[:, :, :, i // 2, :, i % 2] |= (word >> high * i & (1 << high) - 1) << 4
    return code.view(r, blocks * 32).view(torch.int8) - zero_point
