#pragma once

#include <cstdint>

// wgmma.mma_async for the tile widths in use. A warpgroup multiplies 64 rows of A with N rows of B along K and adds to
// N / 2 accumulators per thread: in warp w and lane l, d[4j + 2h + i] is row 16w + 8h + l / 4, column 8j + 2 (l % 4) +
// i.
//
// The instruction names every accumulator, so its text grows with N: the macros below list registers by tens.

namespace grok::sm90 {

#define GROK_NAMES_2(t) "%" #t "0, %" #t "1"
#define GROK_NAMES_4(t) GROK_NAMES_2(t) ", %" #t "2, %" #t "3"
#define GROK_NAMES_6(t) GROK_NAMES_4(t) ", %" #t "4, %" #t "5"
#define GROK_NAMES_8(t) GROK_NAMES_6(t) ", %" #t "6, %" #t "7"
#define GROK_NAMES(t) GROK_NAMES_8(t) ", %" #t "8, %" #t "9"
#define GROK_TENS_1 GROK_NAMES()
#define GROK_TENS_3 GROK_TENS_1 ", " GROK_NAMES(1) ", " GROK_NAMES(2)
#define GROK_TENS_4 GROK_TENS_3 ", " GROK_NAMES(3)
#define GROK_TENS_6 GROK_TENS_4 ", " GROK_NAMES(4) ", " GROK_NAMES(5)
#define GROK_TENS_8 GROK_TENS_6 ", " GROK_NAMES(6) ", " GROK_NAMES(7)
#define GROK_TENS_9 GROK_TENS_8 ", " GROK_NAMES(8)

#define GROK_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GROK_D8(i) GROK_D4(i), GROK_D4(i + 4)
#define GROK_D16(i) GROK_D8(i), GROK_D8(i + 8)
#define GROK_D32(i) GROK_D16(i), GROK_D16(i + 16)
#define GROK_D64(i) GROK_D32(i), GROK_D32(i + 32)

#define GROK_UNWRAP(...) __VA_ARGS__

// d = a bᵀ, or d += a bᵀ if `accumulate`: a has 64 rows and b kN rows of 32 e4m3 each, given as descriptors (`operand`
// in sm90.cuh).
template <int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);

// n; the names of its n / 2 accumulators, and their operands; the operand numbers of a, b and accumulate.
#define GROK_MULTIPLY_E4M3(n, names, operands, a_at, b_at, accumulate_at)                                           \
  template <>                                                                                                       \
  __device__ __forceinline__ void multiply<n>(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_at ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" names "}, %" #a_at ", %" #b_at        \
                 ", p, 1, 1;\n}"                                                                                    \
                 : GROK_UNWRAP operands                                                                             \
                 : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));                                          \
  }
GROK_MULTIPLY_E4M3(16, GROK_NAMES_8(), (GROK_D8(0)), 8, 9, 10)
GROK_MULTIPLY_E4M3(64, GROK_TENS_3 ", " GROK_NAMES_2(3), (GROK_D32(0)), 32, 33, 34)
#undef GROK_MULTIPLY_E4M3

// The same for rows of 16 bf16, with a in registers, two columns in each: in warp w and lane l, a[2i + h] is row 16w +
// 8h + l / 4, columns 8i + 2 (l % 4) and the next. They must not change until the product is complete.
template <int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define GROK_MULTIPLY_BF16(n, names, operands, a0_at, a1_at, a2_at, a3_at, b_at, accumulate_at)                     \
  template <>                                                                                                       \
  __device__ __forceinline__ void multiply<n>(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b,                \
                                              bool accumulate) {                                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_at ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, {%" #a0_at ", %" #a1_at     \
                 ", %" #a2_at ", %" #a3_at "}, %" #b_at ", p, 1, 1, 0;\n}"                                          \
                 : GROK_UNWRAP operands                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(accumulate)));      \
  }
GROK_MULTIPLY_BF16(16, GROK_NAMES_8(), (GROK_D8(0)), 8, 9, 10, 11, 12, 13)
GROK_MULTIPLY_BF16(64, GROK_TENS_3 ", " GROK_NAMES_2(3), (GROK_D32(0)), 32, 33, 34, 35, 36, 37)
GROK_MULTIPLY_BF16(128, GROK_TENS_6 ", " GROK_NAMES_4(6), (GROK_D64(0)), 64, 65, 66, 67, 68, 69)
#undef GROK_MULTIPLY_BF16

// The same for rows of 32 e4m3, with four columns in each register: a[2i + h] is row 16w + 8h + l / 4, columns 16i +
// 4 (l % 4) and the next three.
template <int kN>
__device__ __forceinline__ void multiply_e4m3(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define GROK_MULTIPLY_FROM_REGISTERS(n, names, operands, a0_at, a1_at, a2_at, a3_at, b_at, accumulate_at)           \
  template <>                                                                                                       \
  __device__ __forceinline__ void multiply_e4m3<n>(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b,           \
                                                   bool accumulate) {                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_at ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" names "}, {%" #a0_at ", %" #a1_at     \
                 ", %" #a2_at ", %" #a3_at "}, %" #b_at ", p, 1, 1;\n}"                                             \
                 : GROK_UNWRAP operands                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int32_t>(accumulate)));      \
  }
GROK_MULTIPLY_FROM_REGISTERS(128, GROK_TENS_6 ", " GROK_NAMES_4(6), (GROK_D64(0)), 64, 65, 66, 67, 68, 69)
GROK_MULTIPLY_FROM_REGISTERS(192, GROK_TENS_9 ", " GROK_NAMES_6(9), (GROK_D64(0), GROK_D32(64)), 96, 97, 98, 99, 100,
                             101)
#undef GROK_MULTIPLY_FROM_REGISTERS

}  // namespace grok::sm90
