#include "../rows.cuh"

#include "../check.h"

namespace grok::cuda {

using namespace gemm;

void gather_quantize(const GatherQuantize& p, Stream stream) {
  const char* op = "gather_quantize";
  const std::string shape = "rows=" + std::to_string(p.rows) + " D=" + std::to_string(p.dim);
  check(p.rows >= 0 && p.rows < 1ll << 31, op, " of ", shape, ": rows=", p.rows, ", expected 0..2^31-1");
  check(p.dim >= 8 && p.dim < 1ll << 31 && p.dim % 8 == 0 && p.x_stride % 8 == 0, op, " of ", shape, ": D=", p.dim,
        " and x_stride=", p.x_stride, ", expected multiples of 8");
  check(p.active >= 1, op, " of ", shape, ": active=", p.active, ", expected 1 or more");
  check_aligned(op, shape, "x", p.x, 16);
  check_aligned(op, shape, "q", p.q, 16);
  if (p.rows == 0) return;
  const auto groups = static_cast<unsigned>(tiles(p.dim, 8 * kRowThreads));
  const Launch how = {op, shape, {static_cast<unsigned>(p.rows), groups, 1}, {kRowThreads, 1, 1}, 0, 1, stream};
  launch_kernel(how, gather_quantize_kernel, p);
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
  const auto parts = static_cast<unsigned>((gathered_width(p.dim) / 128 + kRowWarps - 1) / kRowWarps);
  const Launch how = {op, shape, {static_cast<unsigned>(p.rows), parts, 1}, {kRowThreads, 1, 1}, 0, 1, stream};
  launch_kernel(how, gather_rows_kernel, p);
}

void combine(const Combine& p, Stream stream) {
  const char* op = "combine";
  const std::string shape = "T=" + std::to_string(p.tokens) + " D=" + std::to_string(p.dim);
  check(p.tokens >= 0 && p.tokens < 1ll << 31, op, " of ", shape, ": T=", p.tokens, ", expected 0..2^31-1");
  check(p.dim >= 4 && p.dim % 4 == 0, op, " of ", shape, ": D=", p.dim, ", expected a multiple of 4");
  check_aligned(op, shape, "parts", p.parts, 16);
  check_aligned(op, shape, "y", p.y, 8);
  if (p.tokens == 0) return;
  const auto columns = static_cast<unsigned>(tiles(p.dim, 4 * kRowThreads));
  const Launch how = {op, shape, {static_cast<unsigned>(p.tokens), columns, 1}, {kRowThreads, 1, 1}, 0, 1, stream};
  launch_kernel(how, combine_kernel, p);
}

}  // namespace grok::cuda
