#include "attention.h"

#include <memory>
#include <utility>

#include "attention_tile.h"
#include "fp8.h"

namespace grok::cpu {
namespace {

template <class T>
GROK_INLINE void widen(const void* row, int64_t c, int64_t width, float* __restrict y) {
  const T* x = static_cast<const T*>(row);
  for (int64_t i = 0; i < c; ++i) y[i] = to_float(x[i]);
  for (int64_t i = c; i < width; ++i) y[i] = 0.0f;
}

GROK_INLINE void widen(DType type, const void* row, int64_t c, int64_t width, float* y) {
  switch (type) {
    case DType::f32: return widen<float>(row, c, width, y);
    case DType::bf16: return widen<BF16>(row, c, width, y);
    case DType::e4m3: return widen<E4M3>(row, c, width, y);
  }
}

// Everything in fp32. `lanes` sums of a row are held in registers at a time. The loops over them must not be unrolled:
// as loops they become vector instructions, taken apart they would stay scalar.
template <bool fused, int lanes>
struct Fp32Path {
  static constexpr bool kFused = fused;

  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    const int64_t width = padded(p.head_size);
    widen(p.q_type, q, p.head_size, width, queries + r * width);
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size);
    for (int64_t j = 0; j < kBlock; ++j) {
      widen(p.kv_type, w.block.k[j], p.head_size, width, w.staged + j * width);
      widen(p.kv_type, w.block.v[j], p.head_size, width, w.values + j * width);
    }
    constexpr int64_t kPatch = 16;
    for (int64_t c = 0; c < width; c += kPatch) {
      for (int64_t j = 0; j < kBlock; ++j) {
        for (int64_t i = c; i < c + kPatch; ++i) w.keys[i * kBlock + j] = w.staged[j * width + i];
      }
    }
  }

  template <int rows>
  GROK_INLINE static void scores(const float* __restrict q, const float* __restrict keys, int64_t width,
                                 float* __restrict s) {
    for (int64_t at = 0; at < kBlock; at += lanes) {
      float sums[rows][lanes] = {};
      for (int64_t c = 0; c < width; ++c) {
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 1
          for (int j = 0; j < lanes; ++j) {
            sums[r][j] = multiply_add<fused>(q[r * width + c], keys[c * kBlock + at + j], sums[r][j]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 1
        for (int j = 0; j < lanes; ++j) s[r * kBlock + at + j] = sums[r][j];
      }
    }
  }

  template <int rows>
  GROK_INLINE static void accumulate(const float* __restrict p, const float* __restrict keep,
                                     const float* __restrict values, int64_t from, int64_t to,
                                     float* __restrict out, int64_t width) {
    for (int64_t at = 0; at < width; at += lanes) {
      float sums[rows][lanes];
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 1
        for (int i = 0; i < lanes; ++i) sums[r][i] = out[r * width + at + i] * keep[r];
      }
      for (int64_t j = from; j < to; ++j) {
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 1
          for (int i = 0; i < lanes; ++i) {
            sums[r][i] = multiply_add<fused>(p[r * kBlock + j], values[j * width + at + i], sums[r][i]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 1
        for (int i = 0; i < lanes; ++i) out[r * width + at + i] = sums[r][i];
      }
    }
  }

  GROK_INLINE static void scores(Workspace& w, int64_t row, int64_t rows, int64_t width) {
    const float* q = w.queries + row * width;
    switch (rows) {
      case 1: return scores<1>(q, w.keys, width, w.scores);
      case 2: return scores<2>(q, w.keys, width, w.scores);
      case 3: return scores<3>(q, w.keys, width, w.scores);
      case 4: return scores<4>(q, w.keys, width, w.scores);
      case 5: return scores<5>(q, w.keys, width, w.scores);
      default: return scores<kRows>(q, w.keys, width, w.scores);
    }
  }

  GROK_INLINE static void accumulate(const Workspace& w, int64_t rows, int64_t from, int64_t to, float* out,
                                     int64_t width) {
    switch (rows) {
      case 1: return accumulate<1>(w.scores, w.keep, w.values, from, to, out, width);
      case 2: return accumulate<2>(w.scores, w.keep, w.values, from, to, out, width);
      case 3: return accumulate<3>(w.scores, w.keep, w.values, from, to, out, width);
      case 4: return accumulate<4>(w.scores, w.keep, w.values, from, to, out, width);
      case 5: return accumulate<5>(w.scores, w.keep, w.values, from, to, out, width);
      default: return accumulate<kRows>(w.scores, w.keep, w.values, from, to, out, width);
    }
  }

  GROK_INLINE static void store(const PagedAttention& p, const float* out, float total, void* y) {
    const float divisor = total < 0.5f ? 0.5f : total;  // at least 1 wherever a score is not −inf
    if (p.q_type == DType::f32) return divide(out, divisor, p.head_size, static_cast<float*>(y));
    return divide(out, divisor, p.head_size, static_cast<BF16*>(y));
  }
};

void attend_portable(const PagedAttention& p, const Piece& piece) { attend<Fp32Path<false, 8>>(p, piece); }
void merge_portable(const PagedAttention& p, const Piece& tile) { merge_spans<Fp32Path<false, 8>>(p, tile); }

#if GROK_X86
GROK_AVX2 void attend_avx2(const PagedAttention& p, const Piece& piece) { attend<Fp32Path<true, 16>>(p, piece); }
GROK_AVX2 void merge_avx2(const PagedAttention& p, const Piece& tile) { merge_spans<Fp32Path<true, 16>>(p, tile); }

GROK_AVX512 void attend_avx512(const PagedAttention& p, const Piece& piece) { attend<Fp32Path<true, 32>>(p, piece); }
GROK_AVX512 void merge_avx512(const PagedAttention& p, const Piece& tile) { merge_spans<Fp32Path<true, 32>>(p, tile); }
#endif

constexpr int64_t kLargestPartials = 16 << 20;  // floats; beyond, a tile's spans follow one another
constexpr int64_t kProductsPerThread = 1 << 18;  // of a number of q and one of k: enough that waking a thread pays

}  // namespace

Workspace& workspace(int64_t head_size) {
  thread_local Workspace held;
  thread_local std::vector<float> memory;
  const int64_t width = padded(head_size), block = kBlock * width, rows = kTileRows * (width + 2);
  const int64_t size = 3 * rows + 3 * block + 64;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  void* start = memory.data();
  size_t space = memory.size() * sizeof(float);
  float* next = static_cast<float*>(std::align(64, 1, start, space));
  const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
  held.keys = take(block);
  held.values = take(block);
  held.staged = take(block);
  held.queries = take(rows);
  held.sums = take(rows);
  held.totals = take(rows);
  return held;
}

void make_plan(const PagedAttention& p, int64_t threads, Plan& plan) {
  plan.pieces.clear();
  plan.merges.clear();
  int64_t size = 0, products = 0;
  const int64_t shared = p.heads / p.groups;
  for (int64_t b = 0; b < p.requests; ++b) {
    const int64_t count = p.query_start[b + 1] - p.query_start[b], before = p.seq_lens[b] - count;
    for (int64_t row = 0; row < count * shared; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, count * shared - row);
      const int64_t span = first_key(p, before + row / shared) / kSpan;
      const int64_t spans = (before + (row + rows - 1) / shared) / kSpan + 1 - span;
      for (int64_t g = 0; g < p.groups; ++g) plan.pieces.push_back({b, g, row, rows, span, spans, nullptr});
      size += spans * partial_size(p, rows) * p.groups;
      products += spans * std::min<int64_t>(kSpan, p.seq_lens[b]) * rows * p.head_size * p.groups;
    }
  }
  plan.threads = threads = std::min(threads, 1 + products / kProductsPerThread);
  if (threads == 1 || static_cast<int64_t>(plan.pieces.size()) >= 4 * threads || size > kLargestPartials) return;
  std::swap(plan.pieces, plan.merges);
  if (static_cast<int64_t>(plan.partials.size()) < size) plan.partials.resize(size);
  float* partial = plan.partials.data();
  for (Piece& tile : plan.merges) {
    tile.partial = partial;
    for (int64_t i = 0; i < tile.spans; ++i) {
      plan.pieces.push_back({tile.request, tile.group, tile.row, tile.rows, tile.span + i, 1, partial});
      partial += partial_size(p, tile.rows);
    }
  }
}

AttentionKernel attention_kernel(Isa isa, DType q, DType kv) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
      if (q == DType::bf16 && kv != DType::f32) return attention_bf16_kernel();
      return {attend_avx512, merge_avx512};
    case Isa::avx512: return {attend_avx512, merge_avx512};
    case Isa::avx2: return {attend_avx2, merge_avx2};
#endif
    default: return {attend_portable, merge_portable};
  }
}

}  // namespace grok::cpu
