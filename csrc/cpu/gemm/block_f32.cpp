// Path::f32: rows and weights of any type, converted to fp32, with fused multiply-adds where the instruction set has
// them.

#include <algorithm>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/dispatch.h"
#include "cpu/fp8.h"
#include "cpu/gemm/block_product.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/group_scales.h"
#include "cpu/gemm/prefetch.h"

#if GROK_ARM
#include <arm_neon.h>
#endif

namespace grok::cpu {
namespace {

// Converts column k of the 64 outputs of a panel; w points to the run of column 0.
template <DType kType>
GROK_INLINE void convert_run(const uint8_t* w, int64_t k, float* __restrict out) {
  constexpr int64_t kSize = kType == DType::f32 ? 4 : kType == DType::bf16 ? 2 : 1;
  constexpr int64_t kColumns = 4 / kSize;
  const uint8_t* run = w + k / kColumns * kRunBytes;
  const int shift = static_cast<int>(k % kColumns * kSize * 8);
  for (int64_t n = 0; n < kPanel; ++n) {
    uint32_t bits;
    std::memcpy(&bits, run + 4 * n, 4);
    bits >>= shift;
    if constexpr (kType == DType::f32) {
      std::memcpy(out + n, &bits, 4);
    } else if constexpr (kType == DType::bf16) {
      out[n] = to_float(BF16{static_cast<uint16_t>(bits)});
    } else if constexpr (kType == DType::int8) {
      out[n] = static_cast<float>(static_cast<int32_t>(bits << 24) >> 24);
    } else {
      out[n] = from_e4m3(static_cast<uint8_t>(bits));
    }
  }
}

constexpr int64_t kFusedAhead = 4096;  // bytes of weights that a lone tile prefetches ahead

// Whether a block's weights are scaled in registers, for a lone tile: whole half blocks of codes, or as many columns of
// int8, of one group each.
inline bool fuses(const BlockProduct& b) {
  const int64_t group = b.weights->group();
  return b.scaled && b.type == DType::int8 && b.weights->layout == Layout::panels && b.columns % kCodeColumns == 0 &&
         group % kLeastCodeGroup == 0 && (kRunBlock % group == 0 || group % kRunBlock == 0) &&
         b.rows->last_tile - b.rows->first_tile == 1;
}

// Whether a block's weights need no scales and are converted in registers: those that begin with a run.
inline bool is_direct(const BlockProduct& b) {
  return !b.scaled && b.column % 4 == 0 && (b.type == DType::bf16 || (b.type == DType::int8 && alone(b)));
}

// What a tile prefetches of the next block, in `steps` steps: several tiles share it out evenly.
inline Ahead ahead_of(const BlockProduct& b, int64_t tile, int64_t steps) {
  const int64_t bytes = b.columns * kPanel * size_of(b.type);
  const int64_t share = bytes / (b.rows->last_tile - b.rows->first_tile);
  return {(b.next ? b.next : b.w + bytes) + (tile - b.rows->first_tile) * share, (share + steps - 1) / steps};
}

namespace portable {
#define GROK_F32
typedef float Vec __attribute__((vector_size(16), aligned(4)));
constexpr int64_t kWidth = 4, kColumns = 2;
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec zero() { return Vec{}; }
inline Vec splat(const float* p) { return Vec{*p, *p, *p, *p}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
inline Vec scaled_code(Vec code, Vec s, Vec m) { return s * code - m; }
#include "cpu/gemm/block_f32.inl"
#undef GROK_F32
}  // namespace portable

#if GROK_X86
namespace avx2 {
#define GROK_F32 GROK_AVX2
using Vec = __m256;
constexpr int64_t kWidth = 8, kColumns = 2;
GROK_AVX2 inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
GROK_AVX2 inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
GROK_AVX2 inline Vec zero() { return _mm256_setzero_ps(); }
GROK_AVX2 inline Vec splat(const float* p) { return _mm256_set1_ps(*p); }
GROK_AVX2 inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
GROK_AVX2 inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, sum); }
GROK_AVX2 inline Vec scaled_code(Vec code, Vec s, Vec m) { return _mm256_fmsub_ps(s, code, m); }
#include "cpu/gemm/block_f32.inl"
#undef GROK_F32
}  // namespace avx2

namespace avx512 {
#define GROK_F32 GROK_AVX512
using Vec = __m512;
constexpr int64_t kWidth = 16, kColumns = 4;
GROK_AVX512 inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
GROK_AVX512 inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
GROK_AVX512 inline Vec zero() { return _mm512_setzero_ps(); }
GROK_AVX512 inline Vec splat(const float* p) { return _mm512_set1_ps(*p); }
GROK_AVX512 inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
GROK_AVX512 inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, sum); }
GROK_AVX512 inline Vec scaled_code(Vec code, Vec s, Vec m) { return _mm512_fmsub_ps(s, code, m); }
#include "cpu/gemm/block_f32.inl"
#undef GROK_F32
}  // namespace avx512
#elif GROK_ARM
namespace neon {
#define GROK_F32
using Vec = float32x4_t;
constexpr int64_t kWidth = 4, kColumns = 4;
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec splat(const float* p) {
  Vec v;  // in assembly: g++ 12 loads the numbers of all rows at once, and spills sums for them
  asm volatile("ld1r {%0.4s}, %1" : "=w"(v) : "Q"(*p));
  return v;
}
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec add_product(Vec sum, Vec a, Vec b) { return vfmaq_f32(sum, a, b); }
inline Vec scaled_code(Vec code, Vec s, Vec m) { return vfmaq_f32(vnegq_f32(m), s, code); }
#include "cpu/gemm/block_f32.inl"
#undef GROK_F32
}  // namespace neon
#endif

BlockKernel* const block_portable = portable::block;
#if GROK_X86
BlockKernel* const block_avx2 = avx2::block;
BlockKernel* const block_avx512 = avx512::block;
#elif GROK_ARM
BlockKernel* const block_neon = neon::block;
#endif

}  // namespace

BlockKernel* f32_block(Isa isa) { return GROK_PICK(isa, block); }

}  // namespace grok::cpu
