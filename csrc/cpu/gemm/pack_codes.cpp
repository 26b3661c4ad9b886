#include "cpu/gemm/pack_codes.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm/codes.h"

namespace grok::cpu {
namespace {

// The lowest kBits of four 16-bit lanes, in 16 bits: bit 0 of lanes 0 to 3 comes to these places.
template <int kBits>
uint32_t gather_lanes(uint64_t lanes, int lane1, int lane2, int lane3) {
  constexpr uint64_t kMask = 0x0001000100010001u * ((1u << kBits) - 1);
  // each lane is added in at its place above bit 48; what other products leave below has no bit twice
  const uint64_t factor =
      (uint64_t{1} << 48) + (uint64_t{1} << (32 + lane1)) + (uint64_t{1} << (16 + lane2)) + (uint64_t{1} << lane3);
  return static_cast<uint32_t>((lanes & kMask) * factor >> 48);
}

// Of the codes of 8 columns, one a byte: those of even columns in the lower half of a dword, of odd ones in the upper.
uint32_t low_bits(uint64_t codes) {
  return gather_lanes<4>(codes, 4, 8, 12) | gather_lanes<4>(codes >> 8, 4, 8, 12) << 16;
}

template <int kHigh>
uint32_t high_bits(uint64_t codes) {
  return gather_lanes<kHigh>(codes >> 4, kHigh, 8, 8 + kHigh) |
         gather_lanes<kHigh>(codes >> 12, kHigh, 8, 8 + kHigh) << 16;
}

template <int kBits>
void pack_output(const int8_t* values, int64_t column_stride, int64_t columns, int zero_point, int64_t output,
                 uint8_t* block) {
  for (int64_t k = 0; k < columns; k += kCodeColumns, block += code_block_bytes(kBits)) {
    uint8_t codes[kCodeColumns];
    for (int64_t i = 0; i < kCodeColumns; ++i) {
      codes[i] = static_cast<uint8_t>(values[(k + i) * column_stride] + zero_point);
    }
    uint32_t runs[kBits] = {};
    for (int unit = 0; unit < kUnits; ++unit) {
      uint64_t eight;
      std::memcpy(&eight, codes + unit * kUnit, sizeof eight);
      runs[unit] = low_bits(eight);
      if constexpr (kBits > 4) {
        runs[high_run(kBits, unit)] |= high_bits<kBits - 4>(eight) << high_shift(kBits, unit, 0);
      }
    }
    for (int run = 0; run < kBits; ++run) std::memcpy(block + run * kRunBytes + 4 * output, &runs[run], 4);
  }
}

template <int kBits>
void unpack_output(const uint8_t* block, int64_t output, int64_t k, int zero_point, int8_t* values) {
  for (; k > 0; k -= kCodeColumns, block += code_block_bytes(kBits), values += kCodeColumns) {
    for (int unit = 0; unit < kUnits; ++unit) {
      for (int half = 0; half < 2; ++half) {
        for (int byte = 0; byte < 4; ++byte) {
          const auto from = [&](int run) { return block[run * kRunBytes + 4 * output + byte]; };
          int code = from(unit) >> 4 * half & 15;
          if constexpr (kBits > 4) {
            code |= (from(high_run(kBits, unit)) >> high_shift(kBits, unit, half) & ((1 << (kBits - 4)) - 1)) << 4;
          }
          values[unit * kUnit + kByteColumns[half][byte]] = static_cast<int8_t>(code - zero_point);
        }
      }
    }
  }
}

}  // namespace

void pack_codes_of_output(const int8_t* values, int64_t column_stride, int64_t columns, int bits, int zero_point,
                          int64_t output, uint8_t* block) {
  const auto pack = bits == 4 ? pack_output<4> : bits == 5 ? pack_output<5> : pack_output<6>;
  pack(values, column_stride, columns, zero_point, output, block);
}

void pack_codes(const PackCodes& p, Executor& executor) {
  constexpr int64_t kPiece = 256;  // columns of each row read at once: whole cache lines, while writes stay in L1
  const int64_t panels = p.n / kPanel, panel_bytes = kPanel * p.k * p.bits / 8;
  executor.parallel_for(p.experts * panels, rows_per_range(kPanel * p.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t expert = i / panels, row = i % panels * kPanel;
      const int8_t* values = p.values + expert * p.expert_stride + row * p.row_stride;
      uint8_t* panel = p.packed + (expert * p.packed_n + p.first_row + row) / kPanel * panel_bytes;
      for (int64_t k = 0; k < p.k; k += kPiece) {
        for (int64_t output = 0; output < kPanel; ++output) {
          pack_codes_of_output(values + output * p.row_stride + k * p.column_stride, p.column_stride,
                               std::min(kPiece, p.k - k), p.bits, p.zero_point, output,
                               panel + k / kCodeColumns * code_block_bytes(p.bits));
        }
      }
    }
  });
}

void unpack_codes_of_output(const uint8_t* block, int64_t output, int64_t k, int bits, int zero_point, int8_t* values) {
  const auto unpack = bits == 4 ? unpack_output<4> : bits == 5 ? unpack_output<5> : unpack_output<6>;
  unpack(block, output, k, zero_point, values);
}

}  // namespace grok::cpu
