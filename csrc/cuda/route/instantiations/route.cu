#include <algorithm>

#include "../route.cuh"

namespace grok::cuda {
namespace {

using namespace route;

// Up to kFew tokens, a block takes one, so that more multiprocessors read the router; the bits are the same either way.
constexpr int kManyTokens = 8;
constexpr int64_t kFew = 256;

__global__ void __launch_bounds__(kThreads) group_kernel(const GroupTokens p) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  group(p, begin, min(begin + kChunk, p.rows), sm90::shared_memory<Grouping>());
}

unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

template <class X, int kTokens>
void launch(const char* op, const std::string& shape, const RouteAndGroup& p, Stream stream) {
  const Launch how = {op, shape, {blocks(p.route.tokens, kTokens), 1, 1}, {kThreads, 1, 1}, sizeof(Shared), 1, stream};
  launch_kernel(how, route_kernel<X, kTokens>, p);
}

template <class X>
void launch(const char* op, const std::string& shape, const RouteAndGroup& p, Stream stream) {
  p.route.tokens <= kFew ? launch<X, 1>(op, shape, p, stream) : launch<X, kManyTokens>(op, shape, p, stream);
}

std::string shape_of(const RouteTopk& p) {
  return "T=" + std::to_string(p.tokens) + " D=" + std::to_string(p.dim) + " E=" + std::to_string(p.experts) +
         " k=" + std::to_string(p.k) + (p.x_is_float ? " fp32" : " bf16");
}

void check_route(const char* op, const RouteTopk& p) {
  const std::string shape = shape_of(p);
  const auto check_aligned = [&](const char* name, const void* pointer, int bytes) {
    check(reinterpret_cast<uintptr_t>(pointer) % bytes == 0, op, " of ", shape, ": ", name, " is not aligned to ",
          bytes, " bytes");
  };
  check(p.tokens >= 0 && p.tokens < (1ll << 28), op, " of ", shape, ": T=", p.tokens, ", expected 0..2^28-1");
  check(p.dim >= 0 && p.dim % 4 == 0, op, " of ", shape, ": D=", p.dim, ", expected a multiple of 4");
  check(p.experts >= 1 && p.experts <= kMostExperts, op, " of ", shape, ": E=", p.experts, ", expected 1..",
        kMostExperts);
  check(p.k >= 1 && p.k <= kMostChosen && p.k <= p.experts, op, " of ", shape, ": k=", p.k, ", expected 1..",
        std::min(kMostChosen, p.experts));
  check(p.x_stride % 4 == 0, op, " of ", shape, ": x_stride=", p.x_stride, ", expected a multiple of 4");
  check_aligned("x", p.x, p.x_is_float ? 16 : 8);
  check_aligned("router", p.router, 16);
}

void launch_route(const char* op, const RouteAndGroup& p, Stream stream) {
  if (p.route.tokens == 0) return;
  p.route.x_is_float ? launch<float>(op, shape_of(p.route), p, stream)
                     : launch<uint16_t>(op, shape_of(p.route), p, stream);
}

}  // namespace

void route_topk(const RouteTopk& p, Stream stream) {
  check_route("route_topk", p);
  launch_route("route_topk", {p, nullptr, nullptr, nullptr}, stream);
}

void group_tokens(const GroupTokens& p, Stream stream) {
  const std::string shape = "rows=" + std::to_string(p.rows) + " E=" + std::to_string(p.experts);
  check(p.rows >= 0 && p.rows < (1ll << 31) - kChunk, "group_tokens of ", shape, ": rows=", p.rows,
        ", expected 0..2^31-4097");
  check(p.experts >= 1 && p.experts <= kMostExperts, "group_tokens of ", shape, ": E=", p.experts, ", expected 1..",
        kMostExperts);
  const unsigned grid = std::max(1u, blocks(p.rows, kChunk));  // the offsets are written even without rows
  const Launch how = {"group_tokens", shape, {grid, 1, 1}, {kThreads, 1, 1}, sizeof(Grouping), 1, stream};
  launch_kernel(how, group_kernel, p);
}

void route_and_group(const RouteAndGroup& p, Stream stream) {
  check_route("route_and_group", p.route);
  const RouteTopk& r = p.route;
  if (r.tokens > 0 && r.tokens <= kOneLaunch) return launch_route("route_and_group", p, stream);
  launch_route("route_and_group", {r, nullptr, nullptr, nullptr}, stream);
  group_tokens({r.chosen, p.order, p.offsets, r.tokens * r.k, r.experts}, stream);
}

}  // namespace grok::cuda
