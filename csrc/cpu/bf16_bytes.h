#pragma once

#include <cstdint>

// Byte codes converted to bf16 by table: the codes' low seven bits index two tables, of the low and of the high byte of
// the bf16 number, with one vpermi2b each for 64 codes. The sign is added afterwards.

namespace grok::cpu {

struct Bf16Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];

  constexpr void set(int code, int bits) {
    low[code] = static_cast<uint8_t>(bits & 0xff);
    high[code] = static_cast<uint8_t>(bits >> 8);
  }
};

// Of e4m3 codes without their sign, exact; NaN is 0x7fc0.
constexpr Bf16Bytes e4m3_bytes() {
  constexpr int kSubnormals[] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // code · 2⁻⁹
  Bf16Bytes bytes{};
  for (int code = 0; code < 128; ++code) {
    const int normal = (code << 4) + ((127 - 7) << 7);  // a mantissa of 3 bits to one of 7; bias 7 to bias 127
    bytes.set(code, code < 8 ? kSubnormals[code] : code == 127 ? 0x7fc0 : normal);
  }
  return bytes;
}

// Of the integers 0..127, exact.
constexpr Bf16Bytes int8_bytes() {
  Bf16Bytes bytes{};
  for (int value = 1; value < 128; ++value) {
    int exponent = 0;
    while (value >> (exponent + 1)) ++exponent;
    bytes.set(value, ((127 + exponent) << 7) + ((value << (7 - exponent)) & 0x7f));
  }
  return bytes;
}

inline constexpr Bf16Bytes kE4m3Bytes = e4m3_bytes();
inline constexpr Bf16Bytes kInt8Bytes = int8_bytes();

}  // namespace grok::cpu
