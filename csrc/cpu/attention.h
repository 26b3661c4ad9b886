#pragma once

#include <cstdint>
#include <vector>

#include "../common/types.h"
#include "isa.h"
#include "kv_cache.h"

namespace grok::cpu {

// Causal attention of a flat batch of queries over paged keys and values; the contract is in grok_kernels/ops.py.
// Strides are in elements.
struct PagedAttention {
  const void* q;  // (T, H, C), C contiguous
  int64_t q_token_stride, q_head_stride;
  DType q_type;
  KvPages keys, values;
  DType kv_type;
  const int32_t* block_table;  // (B, N), rows table_stride apart
  int64_t table_stride;
  const int32_t* query_start;  // (B+1,)
  const int32_t* seq_lens;     // (B,)
  void* out;                   // (T, H, C), contiguous, of q's type
  int64_t requests;            // B
  int64_t heads;               // H, a multiple of G
  int64_t groups;              // G
  int64_t head_size;           // C
  int64_t page_size;           // S
  float scale, softcap;
  int64_t window, temperature_len;  // 0: none
};

// Keys meet queries in blocks of kBlock, and blocks are summed up in spans of kSpan, counted from the request's first
// key. A query's bits depend on these alone: not on the batch, the other queries of its prompt, the pages or threads.
constexpr int64_t kBlock = 64;
constexpr int64_t kSpan = 512;

// The first key that a query at `position` sees, and the first of its block: the first that is read for it.
inline int64_t first_key(const PagedAttention& p, int64_t position) {
  return p.window && position >= p.window ? position - p.window + 1 : 0;
}
inline int64_t first_key_read(const PagedAttention& p, int64_t position) {
  return first_key(p, position) / kBlock * kBlock;
}

// A piece of work: some rows of one request and key head, over some spans of its keys. The request's queries times the
// R = H / G query heads that share the key head are its rows: query i, head r is row i · R + r.
struct Piece {
  int64_t request, group;
  int64_t row, rows;    // at most kTileRows
  int64_t span, spans;  // the first, and how many
  float* partial;       // where the span's maximum, sum and weighted values go; nullptr: on to the result
};

constexpr int64_t kTileRows = 96;

struct Plan {
  std::vector<Piece> pieces;
  // Where the spans of a tile are pieces of their own: the tiles, each with `spans` results from `partial` on.
  std::vector<Piece> merges;
  std::vector<float> partials;
  int64_t threads;  // as many as there is work for
};

// Tiles of rows; and where these are too few to occupy the threads, one piece for each of their spans. Kept between
// calls for its memory.
void make_plan(const PagedAttention& p, int64_t threads, Plan& plan);

struct AttentionKernel {
  void (*attend)(const PagedAttention&, const Piece&);
  void (*merge)(const PagedAttention&, const Piece&);
};

AttentionKernel attention_kernel(Isa isa, DType q, DType kv);

}  // namespace grok::cpu
