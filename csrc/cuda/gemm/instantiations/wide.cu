#include "../check.h"
#include "../wide_launch.h"
#include "../wide_rows.cuh"

namespace grok::cuda {

using namespace gemm;

void wide_grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream) {
  const bool int8 = p.product.weight_type == Type::int8;
  int8 ? wide::grouped_gemm<wide::Int8>(p, tokens, stream) : wide::grouped_gemm<wide::E4m3>(p, tokens, stream);
}

void wide_gate_up(const GateUp& p, int64_t tokens, Stream stream) {
  const bool int8 = p.product.weight_type == Type::int8;
  int8 ? wide::gate_up<wide::Int8>(p, tokens, stream) : wide::gate_up<wide::E4m3>(p, tokens, stream);
}

void gather_rows(const GatherRows& p, Stream stream) {
  const char* op = "gather_rows";
  const std::string shape = "rows=" + std::to_string(p.rows) + " D=" + std::to_string(p.dim);
  check(p.rows >= 0 && p.rows < 1ll << 31, op, " of ", shape, ": rows=", p.rows, ", expected 0..2^31-1");
  check(p.dim >= 2 && p.dim % 2 == 0 && p.x_stride % 2 == 0, op, " of ", shape, ": D=", p.dim,
        " and x_stride=", p.x_stride, ", expected multiples of 2");
  check(!p.order || (p.offsets && p.active >= 1), op, " of ", shape, ": order without offsets, or active=", p.active,
        ", expected 1 or more");
  check_aligned(op, shape, "x", p.x, 4);
  check_aligned(op, shape, "y", p.y, 16);
  if (p.rows == 0) return;
  const auto parts = static_cast<unsigned>((gathered_width(p.dim) / 128 + wide::kRowWarps - 1) / wide::kRowWarps);
  const Launch how = {op, shape, {static_cast<unsigned>(p.rows), parts, 1}, {wide::kRowThreads, 1, 1}, 0, 1, stream};
  launch_kernel(how, wide::gather_rows_kernel, p);
}

}  // namespace grok::cuda
