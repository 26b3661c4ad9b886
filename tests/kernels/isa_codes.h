#pragma once

#include "cpu/gemm/pack_codes.h"
#include "isa_checks.h"

// Products by codes of 4, 5 and 6 bits, beside portable's.

namespace grok::cpu::checks {

// Codes (experts, n, k) with planes of fp32 and bytes.
struct Codes {
  std::vector<int8_t> values;
  std::vector<uint8_t> packed, sub_scales, sub_minima;
  std::vector<float> scales, minima;
  Weights weights{};

  // columns: that share S and M. super: that share the planes of fp32; equal to `columns` in formats of one level.
  Codes(Random& random, int bits, int64_t experts, int64_t n, int64_t k, int64_t columns, int64_t super,
        bool with_minima, Layout layout, Executor& executor)
      : values(experts * n * k), packed(experts * n * k * bits / 8), sub_scales(experts * n * (k / columns)),
        sub_minima(sub_scales.size()), scales(experts * n * (k / super)), minima(scales.size()) {
    const int zero_point = with_minima ? 0 : 1 << (bits - 1);
    for (int8_t& value : values) value = static_cast<int8_t>(random.integer(0, (1 << bits) - 1) - zero_point);
    for (uint8_t& value : sub_scales) value = static_cast<uint8_t>(random.integer(with_minima ? 0 : -63, 63));
    for (uint8_t& value : sub_minima) value = static_cast<uint8_t>(random.integer(0, 63));
    // of 11 bits, as those of the files
    for (float& value : scales) value = static_cast<float>(random.integer(1024, 2047)) * 0x1p-14f;
    for (float& value : minima) value = static_cast<float>(random.integer(1024, 2047)) * 0x1p-13f;
    weights.type = DType::int8;
    weights.bits = bits;
    weights.zero_point = zero_point;
    weights.layout = layout;
    weights.experts = experts;
    weights.n = n;
    weights.k = k;
    weights.row_stride = k;
    weights.expert_stride = n * k;
    weights.groups = k / columns;
    const auto plane = layout == Layout::panels ? Plane::by_panels : Plane::by_groups;
    weights.data = values.data();
    weights.scales = plane(scales.data(), ScaleType::f32, k / super, n);
    if (with_minima) weights.minima = plane(minima.data(), ScaleType::f32, k / super, n);
    if (super != columns) {
      weights.subscales = plane(sub_scales.data(), with_minima ? ScaleType::u8 : ScaleType::i8, k / columns, n);
      if (with_minima) weights.subminima = plane(sub_minima.data(), ScaleType::u8, k / columns, n);
    }
    if (layout == Layout::rows) return;
    PackCodes p{};
    p.values = values.data();
    p.packed = packed.data();
    p.bits = bits;
    p.zero_point = zero_point;
    p.experts = experts;
    p.n = p.packed_n = n;
    p.k = k;
    p.expert_stride = n * k;
    p.row_stride = k;
    p.column_stride = 1;
    pack_codes(p, executor);
    weights.data = packed.data();
  }
};

struct CodeSize {
  int64_t n, k, columns, super;
  Layout layout;
};

inline void products_of_codes(Judge& judge) {
  ThreadPool pool(1);
  const int32_t offsets[] = {0, 0, 13, 20};  // of experts
  const int64_t rows = offsets[3];
  const CodeSize sizes[] = {{128, 768, 32, 256, Layout::panels}, {64, 256, 16, 256, Layout::panels},
                            {64, 288, 32, 32, Layout::panels},   {64, 576, 96, 96, Layout::panels},
                            {64, 640, 640, 640, Layout::panels}, {67, 96, 48, 48, Layout::rows}};
  for (const CodeSize& size : sizes) {
    for (int bits : {4, 5, 6}) {
      for (bool with_minima : {false, true}) {
        // the formats that there are: of two levels, 4 and 5 bits have minima, and 6 bits are of two levels without
        const bool two_levels = size.super != size.columns;
        if (bits == 6 ? !two_levels || with_minima : two_levels && !with_minima) continue;
        for (DType xt : {DType::f32, DType::bf16, DType::int8}) {
          Random random{static_cast<uint64_t>(size.k)};
          const Codes w(random, bits, 3, size.n, size.k, size.columns, size.super, with_minima, size.layout, pool);
          const int64_t scales = (size.k + kScaleGroup - 1) / kScaleGroup;
          Array x(xt, rows * size.k);
          x.fill([&](int64_t) { return random.normal() * (xt == DType::int8 ? 40.0f : 1.0f); });
          std::vector<float> scale(rows * scales);
          for (float& value : scale) value = 0.5f + random.uniform();
          const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
            int32_t part[4];
            for (int i = 0; i < 4; ++i) part[i] = std::clamp<int32_t>(offsets[i], begin, end) - begin;
            Result y((end - begin) * size.n);
            GroupedGemm p{};
            p.x.data = x.bytes.data() + begin * size.k * size_of(xt);
            p.x.type = xt;
            p.x.stride = size.k;
            if (xt == DType::int8) {
              p.x.scale = scale.data() + begin * scales;
              p.x.groups = scales;
            }
            p.w = w.weights;
            p.offsets = part;
            p.rows = end - begin;
            p.y = y.data();
            p.y_type = DType::f32;
            grouped_gemm(p, executor);
            return y;
          };
          const std::string what = std::string("grouped_gemm ") + name(xt) + " codes of " + std::to_string(bits) +
                                   (with_minima ? " with minima" : "") + " k=" + std::to_string(size.k) + " group " +
                                   std::to_string(size.columns);
          judge.check(what, rows, 2e-6, compute);
        }
      }
    }
  }
}

}  // namespace grok::cpu::checks
