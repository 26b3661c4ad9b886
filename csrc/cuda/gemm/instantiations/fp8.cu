#include "../fp8.cuh"

#include <algorithm>

#include "../check.h"
#include "../tile_sizes.h"

namespace grok::cuda {
namespace {

using namespace gemm;

void check_fp8(const char* op, const std::string& shape, const Product& p) {
  check(p.x_type == Type::e4m3 && p.weight_type == Type::e4m3, op, " of ", shape,
        ": x and weight are not both e4m3, the only types of this kernel");
  check(p.weight_groups == 1, op, " of ", shape, ": weight_groups=", p.weight_groups, ", expected 1 for e4m3");
}

template <class Output, int kHalves, int kColumns>
void launch_tiles(const char* op, const std::string& shape, const Product& p, Fp8 k, Stream stream) {
  using Config = Fp8Tile<Output, kHalves, kColumns>;
  const auto rows = static_cast<uint64_t>(p.rows), depth = static_cast<uint64_t>(p.k);
  const auto width = static_cast<uint64_t>(k.width);
  k.x = tensor_map(op, shape, {p.x, Element::byte, 2, {depth, rows}, {0, depth}, {kDepth, kRows / kCluster}});
  k.weight = weight_map(op, shape, p, kColumns);
  if (std::is_same_v<Output, ToBf16>)
    k.y_tiles = tensor_map(op, shape, {k.y, Element::bf16, 2, {width, rows}, {0, 2 * width}, {64, 64}});
  if (std::is_same_v<Output, ToGated>)
    k.y_tiles = tensor_map(op, shape, {k.y, Element::byte, 2, {width, rows}, {0, width}, {128, 64}});
  const int64_t most = most_tiles(op, shape, p, kRows, tiles(k.width, kCluster * Config::kWidth));
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(most, std::max(1, multiprocessors() / kCluster)));
  const Launch how = {op,       shape, {clusters * kCluster, 1, 1}, {kThreads, 1, 1}, sizeof(typename Config::Shared),
                      kCluster, stream};
  launch_kernel(how, fp8_kernel<Output, kHalves, kColumns>, k);
}

template <class Output>
void choose_columns(const char* op, const std::string& shape, const Product& p, Fp8 k, Stream stream) {
  const int columns = tile_columns(p.rows, p.n, p.experts, std::max(1, multiprocessors() / kCluster));
  k.step = 128;
  if (columns == 256) return launch_tiles<Output, 2, 128>(op, shape, p, k, stream);
  if (columns == 192) return launch_tiles<Output, 1, 192>(op, shape, p, k, stream);
  launch_tiles<Output, 1, 128>(op, shape, p, k, stream);
}

}  // namespace

void grouped_gemm(const GroupedGemm& p, Stream stream) {
  const char* op = "grouped_gemm";
  const std::string shape = shape_of(p.product);
  const Fp8 k = params_of<Fp8>(op, shape, p);
  check_fp8(op, shape, p.product);
  if (p.product.rows == 0) return;
  p.y_is_float ? choose_columns<ToFp32>(op, shape, p.product, k, stream)
               : choose_columns<ToBf16>(op, shape, p.product, k, stream);
}

void gate_up(const GateUp& p, Stream stream) {
  const char* op = "gate_up";
  const std::string shape = shape_of(p.product);
  const Fp8 k = params_of<Fp8>(op, shape, p);
  check_fp8(op, shape, p.product);
  if (p.product.rows == 0) return;
  launch_tiles<ToGated, 2, 128>(op, shape, p.product, k, stream);
}

}  // namespace grok::cuda
