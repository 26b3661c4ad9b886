#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/attention/attention.h"
#include "cpu/fused_math.h"
#include "cpu/isa.h"

// Attention of one tile of query rows over blocks of keys (FlashAttention's online softmax), written once for all
// instruction sets. A Path holds what differs:
//   kRows        how many rows `scores` and `accumulate` take at once: they share a load of keys
//   load_query   one row of q, in the form that `scores` takes
//   load_block   the keys of a block, transposed, and its values, in the forms that `scores` and `accumulate` take
//   scores       q · k of a few rows and all keys of a block
//   accumulate   out = out · keep + p · v of a few rows and a range of the block's keys
//   fold_max     the largest of kLanes numbers, by halves, and fold_sum, their sum
//   store        one row of the result
// Every number of a row comes from the same operations in the same order, whatever rows share its tile: keys that the
// row does not see have probability 0 and add exact zeros.

namespace grok::cpu::attention {

// Keys are processed in blocks of kBlock, and blocks are summed in spans of kSpan keys, counted from the request's
// first key. The order of a query's additions, and so its bits, depends on these two alone.
constexpr int64_t kBlock = 64;
constexpr int64_t kSpan = 512;
constexpr int64_t kTileRows = 96;

// The first key that a query at `position` sees, and the first key of its block: the first that is read for it.
inline int64_t first_key(const PagedAttention& p, int64_t position) {
  return p.window && position >= p.window ? position - p.window + 1 : 0;
}
inline int64_t first_key_read(const PagedAttention& p, int64_t position) {
  return first_key(p, position) / kBlock * kBlock;
}

// Work of one thread: a tile of rows of one request and key head, over some spans of its keys. The rows of a request
// are its queries times the R = H / G query heads that share the key head: query i, head r is row i · R + r.
struct Piece {
  int64_t request, group;
  int64_t row, rows;    // at most kTileRows
  int64_t span, spans;  // the first, and how many
  float* partial;       // takes the RunningSums of the span; null: the result goes to `out`
};

struct Kernel {
  // `next`: the piece that this thread takes next, whose first block is prefetched; null if there is none.
  void (*attend)(const PagedAttention&, const Piece&, const Piece* next);
  void (*merge)(const PagedAttention&, const Piece&);  // of a tile whose spans were pieces of their own
};

// Of bf16 queries and bf16 or e4m3 pages, for Isa::avx512_bf16.
Kernel bf16_kernel();
// Of any queries and bf16 or e4m3 pages: for Isa::avx2, and for Isa::avx512 and those after it.
Kernel avx2_kernel(DType kv);
Kernel avx512_kernel(DType kv);

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kMostRows = 12;  // Path::kRows is at most this

// Reductions run over the lanes of the widest register on every instruction set: one order of the additions.
constexpr int kLanes = 16;
static_assert(kMostRows <= kLanes);

inline int64_t padded(int64_t head_size) { return (head_size + 31) / 32 * 32; }

inline int64_t partial_size(const PagedAttention& p, int64_t rows) { return rows * (2 + padded(p.head_size)); }

// The state of the online softmax: for each row the largest score so far, the sum of exp(score − largest), and the
// values weighted by it.
struct RunningSums {
  float *top, *total, *out;

  RunningSums(float* memory, int64_t rows) : top(memory), total(memory + rows), out(memory + 2 * rows) {}

  void clear(int64_t rows, int64_t width) const {
    for (int64_t r = 0; r < rows; ++r) top[r] = kMinusInf;
    std::memset(total, 0, rows * sizeof(float));
    std::memset(out, 0, rows * width * sizeof(float));
  }
};

// Where a block of keys and values of one request and key head lies. Entries past `count` repeat the last key; they are
// masked later.
struct KeyBlock {
  int64_t first, count;
  const void* k[kBlock];
  const void* v[kBlock];
  float k_scale[kBlock], v_scale[kBlock];  // 1 where the pages have none
};

// The workspace of a thread, kept between calls.
struct Workspace {
  float* queries;  // kTileRows rows of `width` numbers
  float* keys;     // kBlock rows of `width`, transposed
  float* values;   // kBlock rows of `width`
  float* staged;   // kBlock rows of `width`: keys before they are transposed
  float* sums;     // RunningSums of a span
  float* totals;   // RunningSums of all spans so far
  alignas(64) float scores[kMostRows * kBlock];
  float keep[kLanes];
  float factor[kTileRows];                    // the attention temperature of each row
  int32_t first[kTileRows], last[kTileRows];  // the keys that a row sees
  int64_t element, row_bytes;                 // of an element and of a row of the pages
  KeyBlock blocks[2];
  KeyBlock *block = blocks, *next = blocks + 1;  // the current block, and the one to prefetch
  int64_t ahead;                                 // how many rows of `next` are prefetched: its keys, then its values

  const void* row_ahead(int64_t i) const { return i < kBlock ? next->k[i] : next->v[i - kBlock]; }
};

Workspace& workspace(int64_t head_size);

// Prefetches more rows of the next block. The order of pages and of what follows them is one that the CPU does not
// foresee. The requests are spread over the work on this block, since of a burst most would wait.
GROK_INLINE void prefetch_rows(Workspace& w, int64_t rows) {
  for (const int64_t end = std::min(2 * kBlock, w.ahead + rows); w.ahead < end; ++w.ahead) {
    const char* row = static_cast<const char*>(w.row_ahead(w.ahead));
    for (int64_t i = 0; i < w.row_bytes; i += 64) __builtin_prefetch(row + i);
  }
}

// Prefetches the scales of the block; load_scales reads them once the block is the current one.
inline void find_block(const PagedAttention& p, const Piece& piece, int64_t first, int64_t count, KeyBlock& b) {
  const int32_t* page = p.block_table + piece.request * p.table_stride + first / p.page_size;
  const int64_t element = size_of(p.kv_type);
  const int64_t k_stride = p.keys.slot_stride * element, v_stride = p.values.slot_stride * element;
  int64_t slot = first % p.page_size;
  for (int64_t j = 0; j < count; slot = 0, ++page) {
    const int64_t end = std::min(count, j + p.page_size - slot);
    const char* k = p.keys.row(p.kv_type, *page, piece.group, slot);
    const char* v = p.values.row(p.kv_type, *page, piece.group, slot);
    if (p.keys.scale) {
      __builtin_prefetch(p.keys.row_scale(*page, piece.group, slot));
      __builtin_prefetch(p.values.row_scale(*page, piece.group, slot));
    }
    for (; j < end; ++j, k += k_stride, v += v_stride) {
      b.k[j] = k;
      b.v[j] = v;
    }
  }
  std::fill(b.k + count, b.k + kBlock, b.k[count - 1]);
  std::fill(b.v + count, b.v + kBlock, b.v[count - 1]);
  b.first = first;
  b.count = count;
}

// Reads the scales of a block whose pages have them.
inline void load_scales(const PagedAttention& p, const Piece& piece, KeyBlock& b) {
  const int32_t* page = p.block_table + piece.request * p.table_stride + b.first / p.page_size;
  int64_t slot = b.first % p.page_size;
  for (int64_t j = 0; j < b.count; slot = 0, ++page) {
    const int64_t count = std::min(b.count - j, p.page_size - slot);
    std::copy_n(p.keys.row_scale(*page, piece.group, slot), count, b.k_scale + j);
    std::copy_n(p.values.row_scale(*page, piece.group, slot), count, b.v_scale + j);
    j += count;
  }
  std::fill(b.k_scale + b.count, b.k_scale + kBlock, 1.0f);
  std::fill(b.v_scale + b.count, b.v_scale + kBlock, 1.0f);
}

// The larger or the sum of the lanes, by halves: lanes j and j + n / 2 first.
template <int n>
GROK_INLINE float fold_max(float* m) {
  if constexpr (n > 1) {
    for (int j = 0; j < n / 2; ++j) m[j] = m[j + n / 2] > m[j] ? m[j + n / 2] : m[j];
    return fold_max<n / 2>(m);
  }
  return m[0];
}

template <int n>
GROK_INLINE float fold_sum(float* m) {
  if constexpr (n > 1) {
    for (int j = 0; j < n / 2; ++j) m[j] += m[j + n / 2];
    return fold_sum<n / 2>(m);
  }
  return m[0];
}

// score = outer · factor · tanh(inner · q·k), or without the tanh; `factor` is the row's.
struct Scaling {
  float inner, outer;
  bool capped;

  explicit Scaling(const PagedAttention& p) : inner(p.scale), outer(1.0f), capped(p.softcap > 0.0f) {
    if (!capped) return;
    inner = std::min(p.scale / p.softcap, std::numeric_limits<float>::max());  // finite: tanh is 1 there
    outer = p.softcap;
  }
};

// Makes scores of the products with the keys that a row sees, −inf of the others. Returns the largest.
template <class Path, bool capped>
GROK_INLINE float mask(float* __restrict s, const KeyBlock& b, float inner, float outer, int32_t from, int32_t to) {
  float m[kLanes];
  for (int j = 0; j < kLanes; ++j) m[j] = kMinusInf;
  for (int32_t i = 0; i < kBlock; i += kLanes) {
    for (int32_t j = 0; j < kLanes; ++j) {
      const float x = inner * (s[i + j] * b.k_scale[i + j]);
      const float y = outer * (capped ? tanh_fused<Path::kFused>(x) : x);
      s[i + j] = i + j >= from && i + j <= to ? y : kMinusInf;
      m[j] = s[i + j] > m[j] ? s[i + j] : m[j];
    }
  }
  return Path::fold_max(m);
}

// Makes exp(score − shift) of a row's scores, times the scales of the values. Returns the sum without these scales.
template <class Path>
GROK_INLINE float weigh(float* __restrict s, const float* __restrict scale, float shift) {
  float sums[kLanes] = {};
  for (int at = 0; at < kBlock; at += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float probability = exp_below<Path::kFused>(s[at + j] - shift);
      sums[j] += probability;
      s[at + j] = probability * scale[at + j];
    }
  }
  return Path::fold_sum(sums);
}

// Turns the scores of rows r..r+n−1 into probabilities, times the scales of the values; w.keep receives the factors
// that rescale the rows' earlier sums. All rows take each step together, so that their latencies overlap.
template <class Path>
GROK_INLINE void softmax(Workspace& w, const Scaling& scaling, int64_t r, int64_t n, float* __restrict top,
                         float* __restrict total) {
  float shift[kLanes] = {}, keep[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const int32_t from = w.first[r + i] - static_cast<int32_t>(w.block->first);
    const int32_t to = w.last[r + i] - static_cast<int32_t>(w.block->first);
    const float outer = scaling.outer * w.factor[r + i];
    float* s = w.scores + i * kBlock;
    const float here = scaling.capped ? mask<Path, true>(s, *w.block, scaling.inner, outer, from, to)
                                      : mask<Path, false>(s, *w.block, scaling.inner, outer, from, to);
    const float new_top = here > top[i] ? here : top[i];
    shift[i] = new_top == kMinusInf ? 0.0f : new_top;  // no key seen yet: exp(−inf − 0) is 0, not NaN
    keep[i] = top[i] - shift[i];
    top[i] = new_top;
  }
  for (int i = 0; i < kLanes; ++i) w.keep[i] = exp_below<Path::kFused>(keep[i]);
  for (int64_t i = 0; i < n; ++i) {
    total[i] = total[i] * w.keep[i] + weigh<Path>(w.scores + i * kBlock, w.block->v_scale, shift[i]);
  }
}

// Adds the sums of a span to those of the spans before it.
GROK_INLINE void merge(const RunningSums& into, const RunningSums& from, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = from.top[r] > into.top[r] ? from.top[r] : into.top[r];
    const float shift = top == kMinusInf ? 0.0f : top;
    const float old = exp_f(into.top[r] - shift), fresh = exp_f(from.top[r] - shift);
    into.top[r] = top;
    into.total[r] = into.total[r] * old + from.total[r] * fresh;
    float* __restrict a = into.out + r * width;
    const float* __restrict b = from.out + r * width;
    for (int64_t i = 0; i < width; ++i) a[i] = a[i] * old + b[i] * fresh;
  }
}

template <class X>
GROK_INLINE void divide(const float* __restrict x, float total, int64_t c, X* __restrict y) {
  // + 0 turns −0 into 0: whether a zero is negative depends on how many hidden keys were added
  for (int64_t i = 0; i < c; ++i) y[i] = from_float<X>(x[i] / total + 0.0f);
}

// For a Path's load_query: column c of row r, of each kRows rows, is number c · kRows + r.
template <int64_t kRows>
GROK_INLINE void load_column(const PagedAttention& p, const void* q, float* queries, int64_t r) {
  const int64_t width = padded(p.head_size);
  float* y = queries + r / kRows * kRows * width + r % kRows;
  for (int64_t c = 0; c < p.head_size; ++c) {
    const bool f32 = p.q_type == DType::f32;
    y[c * kRows] = f32 ? static_cast<const float*>(q)[c] : to_float(static_cast<const BF16*>(q)[c]);
  }
  for (int64_t c = p.head_size; c < width; ++c) y[c * kRows] = 0.0f;
}

// Copies the rows of a block to w.staged, with zeros up to `width`.
GROK_INLINE void pad_rows(Workspace& w, int64_t head_size, int64_t width) {
  const int64_t bytes = head_size * w.element, rest = width * w.element - bytes;
  char* to = reinterpret_cast<char*>(w.staged);
  for (const void** rows : {w.block->k, w.block->v}) {
    for (int64_t j = 0; j < kBlock; ++j, to += bytes + rest) {
      std::memcpy(to, rows[j], bytes);
      std::memset(to + bytes, 0, rest);
      rows[j] = to;
    }
  }
}

// For a Path's store. parted: of every 2 · kWidth columns the even ones come first, then the odd ones.
template <int kWidth, bool parted>
GROK_INLINE void store_row(const PagedAttention& p, const float* out, float total, void* y) {
  const float divisor = total < 0.5f ? 0.5f : total;  // at least 1 wherever a score is not −inf
  for (int64_t at = 0; at < p.head_size; at += 2 * kWidth) {
    float x[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) {
      x[parted ? 2 * i : i] = out[at + i];
      x[parted ? 2 * i + 1 : i + kWidth] = out[at + kWidth + i];
    }
    const int64_t count = std::min<int64_t>(2 * kWidth, p.head_size - at);
    if (p.q_type == DType::f32) {
      divide(x, divisor, count, static_cast<float*>(y) + at);
    } else {
      divide(x, divisor, count, static_cast<BF16*>(y) + at);
    }
  }
}

struct QueryRow {
  int64_t token, head, position;
};

inline QueryRow find_row(const PagedAttention& p, const Piece& piece, int64_t r) {
  const int64_t shared = p.heads / p.groups, begin = p.query_start[piece.request];
  const int64_t query = (piece.row + r) / shared, count = p.query_start[piece.request + 1] - begin;
  return {begin + query, piece.group * shared + (piece.row + r) % shared, p.seq_lens[piece.request] - count + query};
}

inline int64_t first_key_read(const PagedAttention& p, const Piece& piece) {
  return std::max(piece.span * kSpan, first_key_read(p, find_row(p, piece, 0).position));
}

template <class Path>
GROK_INLINE void store_rows(const PagedAttention& p, const Piece& piece, const RunningSums& sums, int64_t width) {
  const int64_t element = p.q_type == DType::f32 ? 4 : 2;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const QueryRow row = find_row(p, piece, r);
    char* y = static_cast<char*>(p.out) + (row.token * p.heads + row.head) * p.head_size * element;
    Path::store(p, sums.out + r * width, sums.total[r], y);
  }
}

template <class Path>
GROK_INLINE void attend(const PagedAttention& p, const Piece& piece, const Piece* next) {
  const int64_t width = padded(p.head_size), rows = piece.rows;
  Workspace& w = workspace(p.head_size);
  const int64_t element = p.q_type == DType::f32 ? 4 : 2;
  for (int64_t r = 0; r < rows; ++r) {
    const QueryRow row = find_row(p, piece, r);
    const char* q = static_cast<const char*>(p.q);
    Path::load_query(p, q + (row.token * p.q_token_stride + row.head * p.q_head_stride) * element, w.queries, r);
    w.first[r] = static_cast<int32_t>(first_key(p, row.position));
    w.last[r] = static_cast<int32_t>(row.position);
    const bool hot = p.temperature_len && row.position > p.temperature_len;
    w.factor[r] = hot ? static_cast<float>(std::log2(row.position) / std::log2(p.temperature_len)) : 1.0f;
  }
  const Scaling scaling(p);
  for (KeyBlock& b : w.blocks) {
    std::fill_n(b.k_scale, kBlock, 1.0f);
    std::fill_n(b.v_scale, kBlock, 1.0f);
  }
  w.element = size_of(p.kv_type);
  w.row_bytes = p.head_size * w.element;
  const RunningSums sums(piece.partial ? piece.partial : w.sums, rows), totals(w.totals, rows);
  sums.clear(rows, width);
  totals.clear(rows, width);
  const int64_t start = first_key_read(p, piece);
  const int64_t stop = std::min<int64_t>((piece.span + piece.spans) * kSpan, w.last[rows - 1] + 1);
  find_block(p, piece, start, std::min(kBlock, stop - start), *w.next);
  for (int64_t at = start, after = at + kBlock; at < stop; at = after, after += kBlock) {
    std::swap(w.block, w.next);
    w.ahead = after < stop || next ? 0 : 2 * kBlock;
    if (p.keys.scale) load_scales(p, piece, *w.block);
    if (after < stop) {
      find_block(p, piece, after, std::min(kBlock, stop - after), *w.next);
    } else if (next) {
      const int64_t first = first_key_read(p, *next);
      find_block(p, *next, first, std::min(kBlock, p.seq_lens[next->request] - first), *w.next);
    }
    Path::load_block(p, w);
    for (int64_t r = 0; r < rows; r += Path::kRows) {
      const int64_t n = std::min(Path::kRows, rows - r);
      if (w.last[r + n - 1] < at || w.first[r] >= after) continue;
      Path::scores(w, r, n, width);
      softmax<Path>(w, scaling, r, n, sums.top + r, sums.total + r);
      const int64_t from = std::max<int64_t>(0, w.first[r] - at);
      const int64_t to = std::min(w.block->count, w.last[r + n - 1] - at + 1);
      Path::accumulate(w, r, n, from, to, sums.out + r * width, width);
    }
    if (piece.partial || (after % kSpan && after < stop)) continue;
    merge(totals, sums, rows, width);
    sums.clear(rows, width);
  }
  if (!piece.partial) store_rows<Path>(p, piece, totals, width);
}

template <class Path>
GROK_INLINE void merge_spans(const PagedAttention& p, const Piece& tile) {
  const int64_t width = padded(p.head_size);
  const RunningSums totals(workspace(p.head_size).totals, tile.rows);
  totals.clear(tile.rows, width);
  for (int64_t span = 0; span < tile.spans; ++span) {
    merge(totals, RunningSums(tile.partial + span * partial_size(p, tile.rows), tile.rows), tile.rows, width);
  }
  store_rows<Path>(p, tile, totals, width);
}

}  // namespace grok::cpu::attention
