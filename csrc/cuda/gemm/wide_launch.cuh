#pragma once

#include <algorithm>
#include <string>

#include "check.h"
#include "wide.cuh"
#include "wide_height.h"
#include "wide_launch.h"

// From the launchers' arguments to a kernel of the wide products, for one type of the weights.

namespace grok::cuda::gemm::wide {

template <class Weight>
Wide common(const char* op, const std::string& shape, const Product& p, int64_t tokens) {
  constexpr bool kInt8 = std::is_same_v<Weight, Int8>;
  check_product(op, p);
  check(p.x_type == (kInt8 ? Type::bf16 : Type::e4m3), op, " of ", shape, ": x is not ", kInt8 ? "bf16" : "e4m3",
        ", the only type of rows for such weights");
  check(tokens == 16 || tokens == 64 || (kInt8 && tokens == 128), op, " of ", shape, ": tokens=", tokens,
        ", expected 16 or 64", kInt8 ? ", or 128" : "");
  check(p.weight_groups == 1 || (kInt8 && p.weight_groups > 1 && p.k % (p.weight_groups * kDepth) == 0), op, " of ",
        shape, ": weight_groups=", p.weight_groups, ", expected 1", kInt8 ? ", or groups of a multiple of 128 columns" : "");
  Wide k = params_of<Wide>(p);
  k.groups = static_cast<int32_t>(p.weight_groups);
  k.span = static_cast<int32_t>(p.k / p.weight_groups);
  return k;
}

template <class Weight, class Output, int kTokens, bool kRowParts>
void launch(const char* op, const std::string& shape, const Product& p, Wide k, Stream stream) {
  using C = Config<Weight, Output, kTokens, kRowParts>;
  const auto whole = [](int64_t size) { return static_cast<uint64_t>(size); };
  const uint64_t depth = whole(p.k), columns = C::kInt8 ? whole(gathered_width(p.k)) : depth;
  const uint64_t x_bytes = C::kInt8 ? 2 : 1;
  k.x = tensor_map(op, shape,
                   {p.x,
                    C::kInt8 ? Element::bf16 : Element::byte,
                    2,
                    {columns, whole(p.rows)},
                    {0, columns * x_bytes},
                    {C::kInt8 ? 64u : 128u, kTokens}});
  const auto part_rows = static_cast<uint32_t>(kRowParts ? C::kPartRows : 2 * k.height);
  k.weight = tensor_map(op, shape,
                        {p.weight,
                         Element::byte,
                         3,
                         {depth, whole(p.n), whole(p.experts)},
                         {0, depth, depth * whole(p.n)},
                         {kDepth, part_rows, 1}});
  const int64_t most = (p.rows / kTokens + std::min(p.experts, p.rows)) * tiles(k.width, C::block_rows(k));
  check(most < 1ll << 31, op, " of ", shape, ": ", most, " tiles, expected fewer than 2^31");
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(most, multiprocessors()));
  const Launch how = {op, shape, {blocks, 1, 1}, {kThreads, 1, 1}, sizeof(typename C::Shared), 1, stream};
  launch_kernel(how, wide_kernel<Weight, Output, kTokens, kRowParts>, k);
}

template <class Weight, class Output, bool kRowParts>
void launch(const char* op, const std::string& shape, const Product& p, const Wide& k, int64_t tokens, Stream stream) {
  if constexpr (kRowParts && std::is_same_v<Weight, Int8>)
    if (tokens == 128) return launch<Weight, Output, 128, kRowParts>(op, shape, p, k, stream);
  if (tokens == 64) return launch<Weight, Output, 64, kRowParts>(op, shape, p, k, stream);
  if constexpr (!kRowParts || std::is_same_v<Output, ToGated>)
    if (tokens == 16) return launch<Weight, Output, 16, kRowParts>(op, shape, p, k, stream);
}

// Rows of x bring their bytes from L2 once for every block of rows of the weights: few rows leave its height free, many
// want it large. e4m3 has few.
template <class Weight, class Output>
void launch(const char* op, const std::string& shape, const GroupedGemm& p, Wide k, int64_t tokens, Stream stream) {
  const Product& product = p.product;
  if constexpr (std::is_same_v<Weight, Int8>)
    if (tokens == 128 || (tokens == 64 && product.rows > tokens * product.experts)) {
      k.step = Config<Weight, Output, 64, true>::kPartRows;
      return launch<Weight, Output, true>(op, shape, product, k, tokens, stream);
    }
  k.height = even_height(product.n, product.experts, multiprocessors());
  launch<Weight, Output, false>(op, shape, product, k, tokens, stream);
}

template <class Weight>
void grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream) {
  const char* op = "wide_grouped_gemm";
  const std::string shape = shape_of(p.product);
  Wide k = common<Weight>(op, shape, p.product, tokens);
  check(!p.order || (p.y_is_float && p.row_weights), op, " of ", shape, ": order without row_weights, or y in bf16");
  check_aligned(op, shape, "y", p.y, 16);
  if (p.product.rows == 0) return;
  k.width = k.n;
  k.y = p.y;
  k.order = p.order;
  k.row_weights = p.row_weights;
  p.y_is_float ? launch<Weight, ToFp32>(op, shape, p, k, tokens, stream)
               : launch<Weight, ToBf16>(op, shape, p, k, tokens, stream);
}

template <class Weight>
void gate_up(const GateUp& p, int64_t tokens, Stream stream) {
  const char* op = "wide_gate_up";
  const std::string shape = shape_of(p.product);
  Wide k = common<Weight>(op, shape, p.product, tokens);
  check(p.product.n % 32 == 0, op, " of ", shape, ": N=", p.product.n, ", expected a multiple of 32");
  check_aligned(op, shape, "y", p.y, 16);
  if (p.product.rows == 0) return;
  k.step = k.n / 2;
  k.width = std::is_same_v<Weight, Int8> ? static_cast<int32_t>(gathered_width(k.step)) : k.step;
  k.y = p.y;
  k.activation = p.activation;
  k.y_scale = p.y_scale;
  k.y_scale_row = p.y_scale_row;
  k.y_scale_group = p.y_scale_group;
  launch<Weight, ToGated, true>(op, shape, p.product, k, tokens, stream);
}

}  // namespace grok::cuda::gemm::wide
