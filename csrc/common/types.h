#pragma once

#include <cstdint>
#include <cstring>

// A body shared by several instruction sets is inlined into a function of each: a call would run on the baseline.
#define GROK_INLINE inline __attribute__((always_inline))

namespace grok {

enum class DType { f32, bf16, int8, e4m3 };

constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::bf16 ? 2 : 1; }

constexpr const char* name(DType type) {
  return type == DType::f32 ? "f32" : type == DType::bf16 ? "bf16" : type == DType::int8 ? "int8" : "e4m3";
}

struct BF16 {
  uint16_t bits;
};

GROK_INLINE float to_float(float value) { return value; }

GROK_INLINE float to_float(BF16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
T from_float(float value);

template <>
GROK_INLINE float from_float<float>(float value) {
  return value;
}

// Rounds to nearest, ties to even. A NaN is handled apart: the addition could carry out of its mantissa.
template <>
GROK_INLINE BF16 from_float<BF16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BF16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

}  // namespace grok
