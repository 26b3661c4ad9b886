#pragma once

#include "common/types.h"
#include "cpu/gemm/layout.h"

// Codes of 4, 5 or 6 bits in panels: a block of 32 columns × 64 outputs is `bits` runs of 256 bytes, in each of which
// an output has a dword. Runs 0 to 3 hold the low 4 bits of 8 columns each, the following ones the high bits:
//
//    bits of the dword     0–3  4–7  8–11 12–15  16–19 20–23 24–27 28–31
//    column of the eight    0    2    4    6       1     3     5     7
//
// So dword & 0x0f0f0f0f is the bytes of columns 0, 4, 1, 5, and dword >> 4 & 0x0f0f0f0f those of columns 2, 6, 3, 7;
// and dword >> 4j & 0x000f000f is two neighbouring columns in 16 bits each. High bits are at the same byte as the low
// bits of their column, so that a shift and a mask bring them there.

namespace grok::cpu {

constexpr int64_t kCodeColumns = 32;      // of a block
constexpr int64_t kUnit = 8;              // columns of a run of low bits
constexpr int64_t kUnits = kCodeColumns / kUnit;
constexpr int64_t kLeastCodeGroup = 16;   // columns of a group of codes in panels, at least

constexpr int64_t code_block_bytes(int bits) { return bits * kRunBytes; }

// The columns, of a unit of 8, whose low bits are the bytes of dword & 0x0f0f0f0f and of dword >> 4 & 0x0f0f0f0f.
constexpr int kByteColumns[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};

// The run of a unit's high bits, and where in each byte they begin for these bytes (half: 0 or 1, as above).
constexpr int high_run(int bits, int unit) { return 4 + unit / (4 / (bits - 4)); }
constexpr int high_shift(int bits, int unit, int half) {
  const int each = bits - 4;
  return each * (half + 2 * (unit % (4 / each)));
}

}  // namespace grok::cpu
