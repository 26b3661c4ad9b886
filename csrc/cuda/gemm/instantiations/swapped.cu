#include "../swapped.cuh"

#include <algorithm>

#include "../../include/grok/swapped.h"
#include "../check.h"
#include "../tile_sizes.h"

namespace grok::cuda {
namespace {

using namespace gemm;

template <class Weight>
void add_groups(const char* op, const std::string& shape, const Product& p, int64_t tokens, swapped::Swapped& k) {
  constexpr bool kInt8 = std::is_same_v<Weight, swapped::Int8>;
  check(p.x_type == (kInt8 ? Type::bf16 : Type::e4m3), op, " of ", shape, ": x is not ", kInt8 ? "bf16" : "e4m3",
        ", the only type of rows for such weights");
  check(tokens == 16 || tokens == 64 || (kInt8 && tokens == 128), op, " of ", shape, ": tokens=", tokens,
        ", expected 16 or 64", kInt8 ? ", or 128" : "");
  check(p.weight_groups == 1 || (kInt8 && p.weight_groups > 1 && p.k % (p.weight_groups * kDepth) == 0), op, " of ",
        shape, ": weight_groups=", p.weight_groups, ", expected 1",
        kInt8 ? ", or groups of a multiple of 128 columns" : "");
  k.groups = static_cast<int32_t>(p.weight_groups);
  k.span = static_cast<int32_t>(p.k / p.weight_groups);
}

template <class Weight, class Form, int kTokens>
void launch_tiles(const char* op, const std::string& shape, const Product& p, swapped::Swapped k, Stream stream) {
  using C = swapped::Config<Weight, Form, kTokens>;
  const auto columns = static_cast<uint64_t>(C::kInt8 ? gathered_width(p.k) : p.k);
  const uint64_t bytes = columns * (C::kInt8 ? 2 : 1);
  k.x = tensor_map(op, shape,
                   {p.x, C::kInt8 ? Element::bf16 : Element::byte, 2, {columns, static_cast<uint64_t>(p.rows)},
                    {0, bytes}, {C::kXColumns, kTokens}});
  k.weight = weight_map(op, shape, p, C::kEven ? 2 * k.height : C::kPartRows);
  const int64_t most = most_tiles(op, shape, p, kTokens, tiles(k.width, C::block_rows(k)));
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(most, multiprocessors()));
  const Launch how = {op, shape, {blocks, 1, 1}, {kThreads, 1, 1}, sizeof(typename C::Shared), 1, stream};
  launch_kernel(how, swapped::swapped_kernel<Weight, Form, kTokens>, k);
}

// Every block of weight rows reads all rows of x from L2 again. With few rows of x that is cheap, and the block's
// height is chosen for even rounds; with many, tall blocks win. e4m3 has only few rows here.
template <class Weight>
void choose_block(const char* op, const std::string& shape, const GroupedGemm& p, int64_t tokens, Stream stream) {
  auto k = params_of<swapped::Swapped>(op, shape, p);
  add_groups<Weight>(op, shape, p.product, tokens, k);
  if (p.product.rows == 0) return;
  k.y_is_float = p.y_is_float;
  if constexpr (std::is_same_v<Weight, swapped::Int8>) {
    k.step = 128;
    if (tokens == 128) return launch_tiles<Weight, swapped::Tall, 128>(op, shape, p.product, k, stream);
    if (tokens == 64 && p.product.rows > tokens * p.product.experts)
      return launch_tiles<Weight, swapped::Tall, 64>(op, shape, p.product, k, stream);
  }
  k.height = even_height(p.product.n, p.product.experts, multiprocessors());
  tokens == 64 ? launch_tiles<Weight, swapped::Even, 64>(op, shape, p.product, k, stream)
               : launch_tiles<Weight, swapped::Even, 16>(op, shape, p.product, k, stream);
}

template <class Weight>
void choose_tokens(const char* op, const std::string& shape, const GateUp& p, int64_t tokens, Stream stream) {
  auto k = params_of<swapped::Swapped>(op, shape, p);
  add_groups<Weight>(op, shape, p.product, tokens, k);
  if (p.product.rows == 0) return;
  if constexpr (std::is_same_v<Weight, swapped::Int8>) {
    k.width = static_cast<int32_t>(gathered_width(k.width));
    if (tokens == 128) return launch_tiles<Weight, swapped::Gated, 128>(op, shape, p.product, k, stream);
  }
  tokens == 64 ? launch_tiles<Weight, swapped::Gated, 64>(op, shape, p.product, k, stream)
               : launch_tiles<Weight, swapped::Gated, 16>(op, shape, p.product, k, stream);
}

}  // namespace

void swapped_grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream) {
  const char* op = "swapped_grouped_gemm";
  const std::string shape = shape_of(p.product);
  p.product.weight_type == Type::int8 ? choose_block<swapped::Int8>(op, shape, p, tokens, stream)
                                      : choose_block<swapped::E4m3>(op, shape, p, tokens, stream);
}

void swapped_gate_up(const GateUp& p, int64_t tokens, Stream stream) {
  const char* op = "swapped_gate_up";
  const std::string shape = shape_of(p.product);
  p.product.weight_type == Type::int8 ? choose_tokens<swapped::Int8>(op, shape, p, tokens, stream)
                                      : choose_tokens<swapped::E4m3>(op, shape, p, tokens, stream);
}

}  // namespace grok::cuda
