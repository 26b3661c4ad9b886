// Path::bf16 and Path::int8 on 64-bit Arm. bfmmla and smmla multiply two rows by two outputs, over 4 columns of bf16 or
// 8 of int8: an operand is 16 bytes, 8 of each row or output. A column block of weights is first written to a stage of
// such operands, converted to bf16 exactly where it has 8 bits; all tiles of the row block read the stage:
//
//   step 0                                             step 1
//   operand 0      operand 1            operand 31     operand 0
//   outputs 0, 1   outputs 2, 3   …     outputs 62, 63  …            8 bytes of columns each
//
// bfmmla adds to its sum first the products of two columns, then those of the next two. By the architecture's
// definition (FPCR.EBF = 0, the default) these are the bits of two bfdot: products, their sum and the new sum are
// rounded to odd each, and subnormal numbers count as 0. They differ from the bits of vdpbf16ps and of fused
// multiply-adds. smmla is exact.

#include <type_traits>

#include "cpu/bf16_bytes.h"
#include "cpu/gemm/prefetch.h"

#if GROK_ARM
#include <arm_neon.h>

namespace grok::cpu {
namespace {

#define GROK_TARGET_INLINE GROK_NEON_BF16 __attribute__((always_inline)) inline

constexpr int64_t kGroupRuns = kScaleGroup / 4;   // of int8 rows that share a scale
constexpr int kOperands = static_cast<int>(kPanel) / 2;  // of a step
constexpr int64_t kStepBytes = 16 * kOperands;    // two runs of bf16, or of int8 that is not converted
static_assert(kRunBlock / 2 * kStepBytes <= kStageBytes, "a column block of operands must fit the stage");

// The low and the high bytes of 16 bf16 numbers.
struct Bytes {
  uint8x16_t low, high;
};

// The magnitude is shifted until its leading one is in bit 7, where the last bit of the exponent replaces it. −128 is
// not special: its magnitude as an unsigned byte is 128.
struct Int8Converter {
  uint8x16_t exponents;  // by the number of leading zeros: 8 of them are the number 0

  GROK_TARGET_INLINE Int8Converter() {
    constexpr uint8_t kExponents[16] = {134, 133, 132, 131, 130, 129, 128, 127};
    exponents = vld1q_u8(kExponents);
  }
  GROK_TARGET_INLINE Bytes operator()(uint8x16_t code) const {
    const uint8x16_t magnitude = vreinterpretq_u8_s8(vabsq_s8(vreinterpretq_s8_u8(code)));
    const uint8x16_t zeros = vclzq_u8(magnitude), exponent = vqtbl1q_u8(exponents, zeros);
    const uint8x16_t mantissa = vshlq_u8(magnitude, vreinterpretq_s8_u8(zeros));
    return {vsliq_n_u8(mantissa, exponent, 7), vsriq_n_u8(code, exponent, 1)};
  }
};

// Moves exponent and mantissa to their places; the subnormal codes, which are below 16, are looked up.
struct E4m3Converter {
  uint8x16_t low, high;  // of the codes 0..15

  GROK_TARGET_INLINE E4m3Converter() : low(vld1q_u8(kE4m3Bytes.low)), high(vld1q_u8(kE4m3Bytes.high)) {}
  GROK_TARGET_INLINE Bytes operator()(uint8x16_t code) const {
    const uint8x16_t nan = vdupq_n_u8(0x7f), magnitude = vandq_u8(code, nan);
    const uint8x16_t rebased = vaddq_u8(vshrq_n_u8(magnitude, 4), vdupq_n_u8((127 - 7) / 2));
    const uint8x16_t known = vqtbx1q_u8(rebased, high, magnitude);
    const uint8x16_t value = vorrq_u8(known, vandq_u8(vceqq_u8(magnitude, nan), nan));
    return {vqtbx1q_u8(vshlq_n_u8(code, 4), low, magnitude), vbslq_u8(nan, value, code)};
  }
};

// Converts runs of 4 columns of 8 bits. Prefetches the block after this one.
template <class Converter>
GROK_NEON_BF16 void stage_converted(const uint8_t* w, int64_t runs, const uint8_t* next, uint8_t* stage) {
  const Converter convert;
  for (int64_t run = 0; run < runs; ++run, next += kRunBytes) {
    fetch<Fetch::alone>(next);
    for (int64_t i = 0; i < kRunBytes; i += 16, w += 16, stage += 32) {
      const Bytes bytes = convert(vld1q_u8(w));
      vst1q_u8(stage, vzip1q_u8(bytes.low, bytes.high));
      vst1q_u8(stage + 16, vzip2q_u8(bytes.low, bytes.high));
    }
  }
}

// Interleaves pairs of runs as they are; zeros after the last, if their number is odd.
GROK_NEON_BF16 void stage_pairs(const uint8_t* w, int64_t runs, const uint8_t* next, uint8_t* stage) {
  for (int64_t run = 0; run < runs; run += 2, next += 2 * kRunBytes) {
    fetch<Fetch::alone>(next);
    fetch<Fetch::alone>(next + kRunBytes);
    const bool whole = run + 1 < runs;
    for (int64_t i = 0; i < kRunBytes; i += 16, stage += 32) {
      const uint8_t* from = w + run * kRunBytes + i;
      const uint32x4_t a = vreinterpretq_u32_u8(vld1q_u8(from));
      const uint32x4_t b = whole ? vreinterpretq_u32_u8(vld1q_u8(from + kRunBytes)) : vdupq_n_u32(0);
      vst1q_u8(stage, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
      vst1q_u8(stage + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    }
  }
}

// Two runs of two packed rows as an operand; zeros for the second row of a tile that has one row only there.
template <bool kBoth>
GROK_TARGET_INLINE uint32x4_t row_operand(const uint32_t* first, const uint32_t* second) {
  const uint32x2_t none = vdup_n_u32(0);
  const uint32x2_t a = kBoth ? vld1_u32(first) : vld1_lane_u32(first, none, 0);
  const uint32x2_t b = kBoth ? vld1_u32(second) : vld1_lane_u32(second, none, 0);
  return vzip1q_u32(vcombine_u32(a, none), vcombine_u32(b, none));
}

GROK_TARGET_INLINE float32x4_t multiply(float32x4_t sum, uint32x4_t rows, uint32x4_t outputs) {
  return vbfmmlaq_f32(sum, vreinterpretq_bf16_u32(rows), vreinterpretq_bf16_u32(outputs));
}
GROK_TARGET_INLINE int32x4_t multiply(int32x4_t sum, uint32x4_t rows, uint32x4_t outputs) {
  return vmmlaq_s32(sum, vreinterpretq_s8_u32(rows), vreinterpretq_s8_u32(outputs));
}

// Two sums of 2 rows × 2 outputs as 4 outputs of the first row, or of the second.
GROK_TARGET_INLINE float32x4_t row_of(float32x4_t a, float32x4_t b, int row) {
  const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
  return vreinterpretq_f32_f64(row == 0 ? vzip1q_f64(x, y) : vzip2q_f64(x, y));
}

GROK_TARGET_INLINE float32x4_t to_float(float32x4_t sum) { return sum; }
GROK_TARGET_INLINE float32x4_t to_float(int32x4_t sum) { return vcvtq_f32_s32(sum); }

// c (+)= scale · (x · the stage's weights) of one tile. Sum: float32x4_t for bf16, without scales; int32x4_t for int8.
template <int kRows, class Sum>
GROK_NEON_BF16 void tile(const uint32_t* x, const uint8_t* stage, int64_t runs, const float* scale, int64_t groups,
                         float* c, bool first) {
  constexpr bool kInt8 = std::is_same_v<Sum, int32x4_t>;
  constexpr int kPairs = (kRows + 1) / 2, kStrip = kPairs == 1 ? 16 : 8;  // 16 or 24 of 32 registers hold sums
  constexpr uint32_t kNoRun[kTile] = {};
  for (int strip = 0; strip < kOperands; strip += kStrip) {
    Sum sum[kPairs][kStrip] = {};
    const uint8_t* w = stage + 16 * strip;
    const uint32_t* rows = x;
    for (int64_t run = 0; run < runs; run += 2, w += kStepBytes, rows += 2 * kRows) {
      const uint32_t* second = kInt8 && run + 1 == runs ? kNoRun : rows + kRows;
      uint32x4_t pair[kPairs];
#pragma GCC unroll 3
      for (int p = 0; p < kPairs; ++p) {
        if (2 * p + 1 < kRows) {
          pair[p] = row_operand<true>(rows + 2 * p, second + 2 * p);
        } else {
          pair[p] = row_operand<false>(rows + 2 * p, second + 2 * p);
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < kStrip; ++j) {
        uint32x4_t outputs;  // in assembly: g++ 12 loads several at once, and spills sums for them
        asm volatile("ldr %q0, %1" : "=w"(outputs) : "m"(reinterpret_cast<const uint32x4_t*>(w)[j]));
#pragma GCC unroll 3
        for (int p = 0; p < kPairs; ++p) sum[p][j] = multiply(sum[p][j], pair[p], outputs);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float factor = kInt8 ? scale[r * groups] : 1.0f;
#pragma GCC unroll 8
      for (int j = 0; j < kStrip; j += 2) {
        float* to = c + r * kPanel + 2 * (strip + j);
        const float32x4_t value = row_of(to_float(sum[r / 2][j]), to_float(sum[r / 2][j + 1]), r % 2);
        const float32x4_t before = first ? vdupq_n_f32(0.0f) : vld1q_f32(to);
        vst1q_f32(to, kInt8 ? vfmaq_n_f32(before, value, factor) : vaddq_f32(before, value));
      }
    }
  }
}

using TileKernel = void (*)(const uint32_t*, const uint8_t*, int64_t, const float*, int64_t, float*, bool);
template <class Sum>
constexpr TileKernel kTiles[] = {tile<1, Sum>, tile<2, Sum>, tile<3, Sum>, tile<4, Sum>, tile<5, Sum>, tile<6, Sum>};

const uint8_t* after(const BlockProduct& b) { return b.next ? b.next : b.w + b.columns * kPanel * size_of(b.type); }

}  // namespace

// A block's sums begin at zero, as in block_f32.inl.
void bf16_block_neon(const BlockProduct& b) {
  const int64_t quads = (b.columns + 3) / 4;
  uint8_t* stage = static_cast<uint8_t*>(b.stage);
  if (b.type == DType::bf16) {
    stage_pairs(b.w, 2 * quads, after(b), stage);
  } else {
    const auto convert = b.type == DType::int8 ? stage_converted<Int8Converter> : stage_converted<E4m3Converter>;
    convert(b.w, quads, after(b), stage);
  }
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    kTiles<float32x4_t>[t.rows - 1](b.x->at(t, b.column / 2), stage, 2 * quads, nullptr, 0,
                                    b.c + (t.row - b.rows->row) * kPanel, b.first);
  }
}

void int8_block_neon(const BlockProduct& b) {
  const int64_t runs = (b.columns + 3) / 4, groups = b.x->groups;
  uint8_t* stage = static_cast<uint8_t*>(b.stage);
  stage_pairs(b.w, runs, after(b), stage);
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    const uint32_t* x = b.x->at(t, b.column / 4);
    const float* scale = b.x->scales + t.row * groups + b.column / kScaleGroup;
    for (int64_t run = 0; run < runs; run += kGroupRuns) {
      kTiles<int32x4_t>[t.rows - 1](x + run * t.rows, stage + run * kRunBytes, std::min(kGroupRuns, runs - run),
                                    scale + run / kGroupRuns, groups, b.c + (t.row - b.rows->row) * kPanel,
                                    b.first && run == 0);
    }
  }
}

}  // namespace grok::cpu
#endif
