#include "../fp8.cuh"

#include <algorithm>

#include "../check.h"
#include "../tile_columns.h"

namespace grok::cuda {
namespace {

using namespace gemm;

Fp8 common(const char* op, const std::string& shape, const Product& p) {
  check_product(op, p);
  check(p.x_type == Type::e4m3 && p.weight_type == Type::e4m3, op, " of ", shape,
        ": x and weight are not both e4m3, the only types of this kernel");
  check(p.weight_groups == 1, op, " of ", shape, ": weight_groups=", p.weight_groups, ", expected 1 for e4m3");
  return params_of<Fp8>(p);
}

uint64_t whole(int64_t size) { return static_cast<uint64_t>(size); }

template <class Output, int kHalves, int kColumns>
void launch(const char* op, const std::string& shape, const Product& p, Fp8 k, Stream stream) {
  using Config = Fp8Tile<Output, kHalves, kColumns>;
  const uint64_t depth = whole(p.k), width = whole(k.width);
  k.x = tensor_map(op, shape, {p.x, Element::byte, 2, {depth, whole(p.rows)}, {0, depth}, {kDepth, kRows / kCluster}});
  k.weight = tensor_map(op, shape,
                        {p.weight,
                         Element::byte,
                         3,
                         {depth, whole(p.n), whole(p.experts)},
                         {0, depth, depth * whole(p.n)},
                         {kDepth, kColumns, 1}});
  if (std::is_same_v<Output, ToBf16>)
    k.y = tensor_map(op, shape, {k.y_data, Element::bf16, 2, {width, whole(p.rows)}, {0, 2 * width}, {64, 64}});
  if (std::is_same_v<Output, ToGated>)
    k.y = tensor_map(op, shape, {k.y_data, Element::byte, 2, {width, whole(p.rows)}, {0, width}, {128, 64}});
  const int64_t most = (p.rows / kRows + std::min(p.experts, p.rows)) * tiles(k.width, kCluster * Config::kWidth);
  check(most < 1ll << 31, op, " of ", shape, ": ", most, " tiles, expected fewer than 2^31");
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(most, std::max(1, multiprocessors() / kCluster)));
  const Launch how = {op,       shape, {clusters * kCluster, 1, 1}, {kThreads, 1, 1}, sizeof(typename Config::Shared),
                      kCluster, stream};
  launch_kernel(how, fp8_kernel<Output, kHalves, kColumns>, k);
}

template <class Output>
void launch(const char* op, const std::string& shape, const Product& p, Fp8 k, Stream stream) {
  const int columns = tile_columns(p.rows, p.n, p.experts, std::max(1, multiprocessors() / kCluster));
  k.half = 128;
  if (columns == 256) return launch<Output, 2, 128>(op, shape, p, k, stream);
  if (columns == 192) return launch<Output, 1, 192>(op, shape, p, k, stream);
  launch<Output, 1, 128>(op, shape, p, k, stream);
}

}  // namespace

void grouped_gemm(const GroupedGemm& p, Stream stream) {
  const char* op = "grouped_gemm";
  const std::string shape = shape_of(p.product);
  Fp8 k = common(op, shape, p.product);
  check(!p.order || (p.y_is_float && p.row_weights), op, " of ", shape, ": order without row_weights, or y in bf16");
  check_aligned(op, shape, "y", p.y, 16);
  if (p.product.rows == 0) return;
  k.width = k.n;
  k.y_data = p.y;
  k.order = p.order;
  k.row_weights = p.row_weights;
  p.y_is_float ? launch<ToFp32>(op, shape, p.product, k, stream) : launch<ToBf16>(op, shape, p.product, k, stream);
}

void gate_up(const GateUp& p, Stream stream) {
  const char* op = "gate_up";
  const std::string shape = shape_of(p.product);
  Fp8 k = common(op, shape, p.product);
  check(p.product.n % 32 == 0, op, " of ", shape, ": N=", p.product.n, ", expected a multiple of 32");
  check_aligned(op, shape, "y", p.y, 16);
  if (p.product.rows == 0) return;
  k.half = k.width = k.n / 2;
  k.y_data = p.y;
  k.activation = p.activation;
  k.y_scale = p.y_scale;
  k.y_scale_row = p.y_scale_row;
  k.y_scale_group = p.y_scale_group;
  launch<ToGated, 2, 128>(op, shape, p.product, k, stream);
}

}  // namespace grok::cuda
