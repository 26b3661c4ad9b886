// The kernels in a program without torch and Python: routes tokens, runs the expert layer over int8 weights, and
// checks the result against a plain loop.
//
//   c++ -std=c++17 -O3 -ffp-contract=off -pthread -I csrc $(find csrc/cpu -name "*.cpp") -o expert_layer

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

#include "cpu/include/grok/cpu.h"

namespace {

using namespace grok;
using namespace grok::cpu;

constexpr int64_t kTokens = 37, kDim = 256, kExperts = 8, kActive = 2;
constexpr int64_t kWidth = 384;  // of an expert

std::mt19937 random_bits(1);

std::vector<float> normal(size_t count, float size) {
  std::normal_distribution<float> draw(0.0f, size);
  std::vector<float> values(count);
  for (float& value : values) value = draw(random_bits);
  return values;
}

// int8 matrices (kExperts, n, k) with a scale for each output, as they are and packed into panels.
struct Matrices {
  int64_t n, k;
  std::vector<int8_t> values, packed;
  std::vector<float> scale;

  Matrices(int64_t n_, int64_t k_, Executor& threads)
      : n(n_), k(k_), values(kExperts * n * k), packed(values.size()), scale(normal(kExperts * n, 0.001f)) {
    for (int8_t& value : values) value = static_cast<int8_t>(random_bits());
    PackWeight p{};
    p.w = values.data();
    p.packed = packed.data();
    p.experts = kExperts;
    p.n = p.packed_n = n;
    p.k = p.row_stride = k;
    p.expert_stride = n * k;
    p.column_stride = 1;
    p.item = 1;
    pack_weight(p, threads);
  }

  Weights weights() const {
    Weights w{};
    w.data = packed.data();
    w.type = DType::int8;
    w.layout = Layout::panels;
    w.experts = kExperts;
    w.n = n;
    w.k = k;
    w.groups = 1;
    w.scales = Plane::by_groups(scale.data(), ScaleType::f32, 1, n);
    return w;
  }

  double at(int64_t expert, int64_t output, int64_t column) const {
    return scale[expert * n + output] * static_cast<double>(values[(expert * n + output) * k + column]);
  }
};

// y = Σ over a token's experts of weight · w2 (gelu(gate x) · up x), in double precision.
std::vector<double> plain_loop(const std::vector<float>& x, const std::vector<float>& weights,
                               const std::vector<int32_t>& experts, const Matrices& w13, const Matrices& w2) {
  std::vector<double> y(kTokens * kDim), inner(kWidth);
  for (int64_t slot = 0; slot < kTokens * kActive; ++slot) {
    const int64_t token = slot / kActive, e = experts[slot];
    for (int64_t f = 0; f < kWidth; ++f) {
      double gate = 0, up = 0;
      for (int64_t d = 0; d < kDim; ++d) {
        gate += w13.at(e, f, d) * x[token * kDim + d];
        up += w13.at(e, kWidth + f, d) * x[token * kDim + d];
      }
      inner[f] = 0.5 * gate * (1 + std::tanh(0.7978845608 * (gate + 0.044715 * gate * gate * gate))) * up;
    }
    for (int64_t d = 0; d < kDim; ++d) {
      for (int64_t f = 0; f < kWidth; ++f) y[token * kDim + d] += weights[slot] * w2.at(e, d, f) * inner[f];
    }
  }
  return y;
}

int run() {
  ThreadPool threads(4);
  const std::vector<float> x = normal(kTokens * kDim, 1.0f), router = normal(kExperts * kDim, 0.1f);
  const Matrices w13(2 * kWidth, kDim, threads), w2(kDim, kWidth, threads);

  std::vector<float> weights(kTokens * kActive);
  std::vector<int32_t> experts(kTokens * kActive);
  RouteTopk route{};
  route.x = x.data();
  route.x_type = DType::f32;
  route.x_stride = route.router_stride = route.d = kDim;
  route.router = router.data();
  route.weights = weights.data();
  route.experts = experts.data();
  route.rows = kTokens;
  route.e = kExperts;
  route.k = kActive;
  route_topk(route, threads);

  std::vector<float> y(kTokens * kDim), alone(y.size());
  Moe layer{};
  layer.x = x.data();
  layer.x_type = layer.row_type = DType::f32;
  layer.x_stride = kDim;
  layer.tokens = kTokens;
  layer.active = kActive;
  layer.experts = experts.data();
  layer.weights = weights.data();
  layer.w13 = w13.weights();
  layer.w2 = w2.weights();
  layer.activation = Activation::gelu_tanh;
  layer.y = y.data();
  moe(layer, threads);

  ThreadPool one(1);
  layer.y = alone.data();
  moe(layer, one);
  const bool same = std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)) == 0;

  const std::vector<double> expected = plain_loop(x, weights, experts, w13, w2);
  double error = 0, size = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += (y[i] - expected[i]) * (y[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  error = std::sqrt(error / size);
  std::printf("%s: relative error %.1e, %s bits on 4 threads and on 1\n", name(current_isa()).c_str(), error,
              same ? "the same" : "OTHER");
  return error < 1e-6 && same ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
