#pragma once

#include "cpu/attention/kv_pages.h"
#include "cpu/executor.h"

namespace grok::cpu {

// Causal attention of a flat batch of queries over paged keys and values: request b has the queries query_start[b] ..
// query_start[b + 1] − 1, which are the last ones of its seq_lens[b] positions. The score of a query and a key is t ·
// softcap · tanh(scale · q·k / softcap), without the tanh where softcap is 0; t = log2(position) /
// log2(temperature_len) for a query at a position above temperature_len, else 1. With a window a query sees itself
// and the window − 1 positions before it.
//
// The bits of a query depend neither on the batch, nor on the other queries of its prompt, the pages or the threads.
struct PagedAttention {
  const void* q;                          // (T, H, C), C contiguous; f32 or bf16
  DType q_type;
  int64_t q_token_stride, q_head_stride;  // in elements
  KvPages keys, values;
  DType kv_type;                          // f32, bf16 or e4m3
  const int32_t* block_table;             // (B, N): the pages of each request, in order
  int64_t table_stride;                   // elements from row to row
  const int32_t* query_start;             // (B + 1,), ascending from 0 to T
  const int32_t* seq_lens;                // (B,)
  void* out;                              // (T, H, C), contiguous, of q_type
  int64_t tokens, requests;               // T, B
  int64_t table_columns, pages;           // N, P
  int64_t heads, groups;                  // H a multiple of G
  int64_t head_size, page_size;           // C, S
  float scale, softcap;
  int64_t window, temperature_len;        // 0 for none
};

// Throws std::invalid_argument where a request names a query or a page that does not exist.
void paged_attention(const PagedAttention& p, Executor& executor);

}  // namespace grok::cpu
