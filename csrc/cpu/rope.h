#pragma once

#include "cpu/attention/kv_pages.h"
#include "cpu/executor.h"

namespace grok::cpu {

// (T, N, C), C contiguous. Strides are in elements.
struct Heads {
  const void* data;
  int64_t count;  // N
  int64_t token_stride, head_stride;
};

// Rotates q and k by their positions, in fp32 and rounded once; writes k and v to their slots of the pages. The bits
// of a token depend neither on the other tokens nor on the instruction set.
struct RopeStoreKv {
  Heads q, k, v;
  void* out;                 // (T, H, C), contiguous, of q's type: q rotated
  KvPages k_pages, v_pages;
  DType type;                // of q, k and v: f32 or bf16
  DType kv_type;             // of the pages: f32, bf16 or e4m3
  const int32_t* positions;  // (T,), each in 0..L−1
  const int32_t* slots;      // (T,), each in 0..P·S−1, or −1 to write nothing
  const float* cos_sin;      // (L, C): C/2 cosines, then C/2 sines
  int64_t cos_sin_stride;    // elements from row to row
  int64_t tokens;            // T
  int64_t head_size;         // C, even
  int64_t page_size;         // S
};
void rope_store_kv(const RopeStoreKv& p, Executor& executor);

}  // namespace grok::cpu
