#pragma once

#include "cpu/isa.h"

// The intrinsics of AVX-512 that the kernels use: the compiler's own, or with GROK_EMULATE_AVX512 functions of the same
// names that compute the same in AVX2, so that a machine without AVX-512 tests the kernels. Only tests are built so.

#if GROK_X86

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, PR 105593
#include <immintrin.h>
#pragma GCC diagnostic pop

#ifdef GROK_EMULATE_AVX512
#include "cpu/emulation/avx512.inl"
#else

namespace grok::cpu {

// The two products are in assembly: with the intrinsics, g++ 12 spills sums to memory.

// sum += v[0] · pair[0] + v[1] · pair[1] in each 32-bit lane, of bf16.
GROK_AVX512_BF16 __attribute__((always_inline)) inline void add_pairs(__m512& sum, __m512i v, const uint32_t* pair) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(v), "m"(*pair));
}

// sum += the four products of unsigned bytes of v and signed bytes of x in each 32-bit lane.
GROK_AVX512_VNNI __attribute__((always_inline)) inline void add_quads(__m512i& sum, __m512i v, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(v), "v"(x));
}

// Makes the compiler compute `value` once, where it would repeat the computation.
GROK_AVX512_BF16 __attribute__((always_inline)) inline void keep(__m512i& value) { asm("" : "+v"(value)); }

}  // namespace grok::cpu

#endif

namespace grok::cpu {

template <int count>  // to the left where it is negative
GROK_AVX512 __attribute__((always_inline)) inline __m512i shift_right(__m512i value) {
  if constexpr (count >= 0) {
    return _mm512_srli_epi32(value, count);
  } else {
    return _mm512_slli_epi32(value, -count);
  }
}

}  // namespace grok::cpu

#endif
