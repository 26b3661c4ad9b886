#pragma once

#include <cstdint>

#include "cpu/executor.h"

namespace grok::cpu {

// Writes values (experts, n, k) + zero_point, codes of 4, 5 or 6 bits, to rows first_row .. first_row + n − 1 of codes
// in panels (codes.h). Bits of a code beyond these are dropped.
struct PackCodes {
  const int8_t* values;
  uint8_t* packed;  // (experts, packed_n / 64, k / 32, bits, 64, 4), contiguous
  int bits, zero_point;
  int64_t experts, n, k;                             // n a multiple of 64, k of 32
  int64_t expert_stride, row_stride, column_stride;  // of values
  int64_t packed_n, first_row;                       // multiples of 64
};
void pack_codes(const PackCodes& p, Executor& executor);

// Packs columns of one output, a multiple of 32, into the blocks of a panel. block: the first of these blocks.
void pack_codes_of_output(const int8_t* values, int64_t column_stride, int64_t columns, int bits, int zero_point,
                          int64_t output, uint8_t* block);

// values = code − zero_point of the k columns of one output, a multiple of 32. block: the first of its panel.
void unpack_codes_of_output(const uint8_t* block, int64_t output, int64_t k, int bits, int zero_point, int8_t* values);

}  // namespace grok::cpu
