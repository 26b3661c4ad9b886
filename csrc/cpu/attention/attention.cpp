#include "cpu/attention/attention.h"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/attention/tile.h"
#include "cpu/dispatch.h"
#include "cpu/fp8.h"

namespace grok::cpu::attention {
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
    case DType::int8: return;  // no pages are of it
  }
}

// Any types, in fp32. `lanes` sums of a row are in registers at a time. The loops over them are not unrolled, because
// the compiler vectorises loops, but not the scalar statements that it would unroll them to.
template <bool fused, int lanes>
struct Fp32Path {
  static constexpr bool kFused = fused;
  static constexpr int64_t kRows = 6;

  GROK_INLINE static float fold_max(float* m) { return attention::fold_max<kLanes>(m); }
  GROK_INLINE static float fold_sum(float* m) { return attention::fold_sum<kLanes>(m); }

  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    const int64_t width = padded(p.head_size);
    widen(p.q_type, q, p.head_size, width, queries + r * width);
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size);
    for (int64_t j = 0; j < kBlock; ++j) {
      widen(p.kv_type, w.block->k[j], p.head_size, width, w.staged + j * width);
      widen(p.kv_type, w.block->v[j], p.head_size, width, w.values + j * width);
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

  GROK_INLINE static void accumulate(const Workspace& w, int64_t /*row*/, int64_t rows, int64_t from, int64_t to,
                                     float* out, int64_t width) {
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
    const float divisor = total < 0.5f ? 0.5f : total;  // the total is at least 1 unless all scores are −inf
    if (p.q_type == DType::f32) return divide(out, divisor, p.head_size, static_cast<float*>(y));
    return divide(out, divisor, p.head_size, static_cast<BF16*>(y));
  }
};

#define GROK_ATTENTION(NAME, TARGET, FUSED, LANES)                                          \
  TARGET void attend_##NAME(const PagedAttention& p, const Piece& piece, const Piece* next) { \
    attend<Fp32Path<FUSED, LANES>>(p, piece, next);                                         \
  }                                                                                         \
  TARGET void merge_##NAME(const PagedAttention& p, const Piece& tile) {                    \
    merge_spans<Fp32Path<FUSED, LANES>>(p, tile);                                           \
  }                                                                                         \
  constexpr Kernel kernel_##NAME{attend_##NAME, merge_##NAME};

GROK_ATTENTION(portable, , false, 8)
#if GROK_X86
GROK_ATTENTION(avx2, GROK_AVX2, true, 16)
GROK_ATTENTION(avx512, GROK_AVX512, true, 32)
#elif GROK_ARM
GROK_ATTENTION(neon, , true, 8)
#endif

Kernel kernel_for(Isa isa, [[maybe_unused]] DType q, [[maybe_unused]] DType kv) {
#if GROK_X86
  if (isa == Isa::avx512_bf16 && q == DType::bf16 && kv != DType::f32) return bf16_kernel();
  if (isa >= Isa::avx512 && kv != DType::f32) return avx512_kernel(kv);
  if (isa == Isa::avx2 && kv != DType::f32) return avx2_kernel(kv);
#endif
  return GROK_PICK(isa, kernel);
}

constexpr int64_t kLargestPartials = 16 << 20;   // floats; beyond that a tile's spans are not split
constexpr int64_t kProductsPerThread = 1 << 18;  // multiply-adds of q · k that amortise waking a thread

// How a call is divided.
struct Plan {
  std::vector<Piece> pieces;
  std::vector<Piece> merges;    // the tiles whose spans are pieces of their own: `spans` results from `partial` on
  std::vector<float> partials;  // these results
  int64_t threads;              // no more than there is work for
};

// One piece for each tile of rows; where there are too few tiles to occupy the threads, one for each of their spans.
// `plan` is reused for its memory.
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

void check_requests(const PagedAttention& p) {
  const char* op = "paged_attention";
  check(p.query_start[0] >= 0, op, ": query_start[0] is ", p.query_start[0], ", expected 0 or more");
  for (int64_t b = 0; b < p.requests; ++b) {
    const int64_t begin = p.query_start[b], end = p.query_start[b + 1], length = p.seq_lens[b];
    check(begin <= end && end <= p.tokens, op, ": query_start[", b + 1, "] is ", end, ", expected at least ", begin,
          " and at most T=", p.tokens);
    check(length >= end - begin && length <= p.table_columns * p.page_size, op, ": seq_lens[", b, "] is ", length,
          ", expected at least its ", end - begin, " queries and at most N*S=", p.table_columns * p.page_size);
    if (begin == end) continue;
    const int32_t* table = p.block_table + b * p.table_stride;
    const int64_t first = first_key_read(p, length - (end - begin)) / p.page_size;
    for (int64_t i = first; i <= (length - 1) / p.page_size; ++i) {
      check(table[i] >= 0 && table[i] < p.pages, op, ": block_table[", b, ", ", i, "] is ", table[i],
            ", expected 0 or more and less than P=", p.pages);
    }
  }
  check(p.query_start[0] == 0 && p.query_start[p.requests] == p.tokens, op, ": query_start goes from ",
        p.query_start[0], " to ", p.query_start[p.requests], ", expected 0 to T=", p.tokens);
}

// Runs the pieces, the last first: of one long prompt, these are the longest. A thread takes a piece before it runs the
// one before, so that the kernel can prefetch it.
template <class Run>
void run_last_first(const std::vector<Piece>& pieces, int64_t threads, Executor& executor, const Run& run) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  std::atomic<int64_t> left{count};
  executor.run(std::min(count, threads), [&](int64_t) {
    for (int64_t i = --left; i >= 0;) {
      const int64_t next = --left;
      run(pieces[i], next >= 0 ? &pieces[next] : nullptr);
      i = next;
    }
  });
}

}  // namespace

Workspace& workspace(int64_t head_size) {
  thread_local Workspace w;
  thread_local std::vector<float> memory;
  const int64_t width = padded(head_size), block = kBlock * width, rows = kTileRows * (width + 2);
  const int64_t size = 3 * rows + 3 * block + 64;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  void* start = memory.data();
  size_t space = memory.size() * sizeof(float);
  float* next = static_cast<float*>(std::align(64, 1, start, space));
  const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
  w.keys = take(block);
  w.values = take(block);
  w.staged = take(block);
  w.queries = take(rows);
  w.sums = take(rows);
  w.totals = take(rows);
  return w;
}

}  // namespace grok::cpu::attention

namespace grok::cpu {

void paged_attention(const PagedAttention& p, Executor& executor) {
  using attention::Piece;
  check_float("paged_attention: q", p.q_type);
  if (p.kv_type != DType::e4m3) check_float("paged_attention: the pages", p.kv_type);
  attention::check_requests(p);
  thread_local attention::Plan plan;
  const attention::Kernel kernel = attention::kernel_for(current_isa(), p.q_type, p.kv_type);
  attention::make_plan(p, executor.threads(), plan);
  attention::run_last_first(plan.pieces, plan.threads, executor, [&](const Piece& piece, const Piece* next) {
    kernel.attend(p, piece, next);
  });
  attention::run_last_first(plan.merges, plan.threads, executor, [&](const Piece& tile, const Piece*) {
    kernel.merge(p, tile);
  });
}

}  // namespace grok::cpu
