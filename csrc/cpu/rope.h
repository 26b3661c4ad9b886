#pragma once

#include <cstdint>

#include "../common/types.h"
#include "isa.h"
#include "kv_cache.h"

namespace grok::cpu {

// Rows of heads, (T, N, C) with C contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t count;  // N
  int64_t token_stride, head_stride;
};

// q and k turned by their positions, in fp32 and rounded once; k and v written to their slots.
struct RopeStoreKv {
  Heads q, k, v;
  void* out;  // (T, H, C), contiguous, of q's type: q turned
  KvPages k_pages, v_pages;
  const int32_t* positions;  // (T,), each in 0..L-1
  const int32_t* slots;      // (T,), each in -1..P*S-1
  const float* cos_sin;      // (L, C), rows cos_sin_stride elements apart
  int64_t cos_sin_stride;
  int64_t head_size;  // C, even
  int64_t page_size;  // S
};

// Does tokens begin..end-1. A token's bits depend neither on the others nor on the instruction set.
using RopeStoreKvTokens = void (*)(const RopeStoreKv&, int64_t begin, int64_t end);

RopeStoreKvTokens rope_store_kv_tokens(Isa isa, DType x, DType kv);

}  // namespace grok::cpu
