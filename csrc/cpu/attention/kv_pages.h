#pragma once

#include <cstdint>

#include "common/types.h"

namespace grok::cpu {

// The keys or the values of all requests: pages (P, G, S, C), C contiguous, and for e4m3 their scales (P, G, S), S
// contiguous. Strides are in elements.
struct KvPages {
  void* data;
  float* scale;  // null unless e4m3
  int64_t page_stride, group_stride, slot_stride;
  int64_t scale_page_stride, scale_group_stride;

  char* row(DType type, int64_t page, int64_t group, int64_t slot) const {
    const int64_t element = page * page_stride + group * group_stride + slot * slot_stride;
    return static_cast<char*>(data) + element * size_of(type);
  }
  float* row_scale(int64_t page, int64_t group, int64_t slot) const {
    if (!scale) return nullptr;
    return scale + page * scale_page_stride + group * scale_group_stride + slot;
  }
};

}  // namespace grok::cpu
