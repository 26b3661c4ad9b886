#include "cpu/gemm/gather_rows.h"

#include <cstring>
#include <vector>

#include "cpu/fp8.h"
#include "cpu/gemm/group_scales.h"
#include "cpu/gemm/pack_codes.h"
#include "cpu/isa.h"

namespace grok::cpu {
namespace {

// The values of one row; `packed` is where those of a weight in panels are put together.
const void* row_of(const Weights& w, int64_t row, char* packed) {
  if (w.layout == Layout::rows) return static_cast<const char*>(w.data) + row * w.row_stride * size_of(w.type);
  const uint8_t* panel = w.panel(0, row);
  if (w.bits) {
    unpack_codes_of_output(panel, row % kPanel, w.k, w.bits, w.zero_point, reinterpret_cast<int8_t*>(packed));
    return packed;
  }
  const uint8_t* words = panel + row % kPanel * 4;
  for (int64_t byte = 0; byte < w.k * size_of(w.type); byte += 4) std::memcpy(packed + byte, words + byte * kPanel, 4);
  return packed;
}

template <class V, class Out>
void convert_row(const GatherRows& p, Isa isa, int64_t row, const V* values, Out* out) {
  const Weights& w = p.w;
  if (!w.scales.data) {
    for (int64_t k = 0; k < w.k; ++k) out[k] = from_float<Out>(to_float(values[k]) * p.multiplier);
    return;
  }
  const bool has_minima = w.minima.data || w.zeros.data;
  for (int64_t group = 0, columns = w.group(); group < w.groups; ++group, values += columns, out += columns) {
    float scales[kPanel], minima[kPanel];
    group_scales(w, 0, row / kPanel * kPanel, group, isa, scales, minima);
    const float s = scales[row % kPanel], m = has_minima ? minima[row % kPanel] : 0.0f;
    for (int64_t k = 0; k < columns; ++k) out[k] = from_float<Out>((s * to_float(values[k]) - m) * p.multiplier);
  }
}

template <class V>
void gather(const GatherRows& p, Isa isa, Executor& executor) {
  executor.parallel_for(p.count, rows_per_range(p.w.k), [&](int64_t begin, int64_t end) {
    std::vector<char> packed(p.w.layout == Layout::panels ? p.w.k * sizeof(V) : 0);
    for (int64_t i = begin; i < end; ++i) {
      const V* values = static_cast<const V*>(row_of(p.w, p.rows[i], packed.data()));
      if (p.out_type == DType::f32) {
        convert_row(p, isa, p.rows[i], values, static_cast<float*>(p.out) + i * p.w.k);
      } else {
        convert_row(p, isa, p.rows[i], values, static_cast<BF16*>(p.out) + i * p.w.k);
      }
    }
  });
}

}  // namespace

void gather_rows(const GatherRows& p, Executor& executor) {
  if (!p.w.k) return;
  const Isa isa = current_isa();
  switch (p.w.type) {
    case DType::f32: return gather<float>(p, isa, executor);
    case DType::bf16: return gather<BF16>(p, isa, executor);
    case DType::int8: return gather<int8_t>(p, isa, executor);
    case DType::e4m3: return gather<E4M3>(p, isa, executor);
  }
}

}  // namespace grok::cpu
