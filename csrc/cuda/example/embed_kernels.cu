// The kernels in a program without Python: routes 64 tokens, prints where each expert's rows start, and runs the expert
// layer on them.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -I csrc csrc/cuda/example/embed_kernels.cu \
//     csrc/cuda/*/instantiations/*.cu -o embed_kernels

#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

#include "cuda/include/grok/gemm.h"

namespace {

using namespace grok::cuda;

constexpr int64_t kTokens = 64, kDim = 6144, kExperts = 8, kChosen = 2, kRows = kTokens * kChosen;
constexpr int64_t kWidth = 4096;  // F, the width of an expert; Grok-1 has 32768

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Zeros on the device, freed when the process exits.
template <class T>
T* zeros(size_t count) {
  T* data = nullptr;
  must(cudaMalloc(&data, count * sizeof(T)));
  must(cudaMemset(data, 0, count * sizeof(T)));
  return data;
}

// e4m3 weights (kExperts, n, k) with a scale per output, and rows of k columns with a scale for each 128.
Product product(const uint8_t* x, const float* x_scale, const int32_t* offsets, int64_t n, int64_t k) {
  Product p{};
  p.x_type = p.weight_type = Type::e4m3;
  p.x = x;
  p.x_scale = x_scale;
  p.x_scale_row = 1;
  p.x_scale_group = kRows;
  p.weight = zeros<uint8_t>(kExperts * n * k);
  p.weight_scale = zeros<float>(kExperts * n);
  p.offsets = offsets;
  p.rows = kRows;
  p.n = n;
  p.k = k;
  p.experts = kExperts;
  p.weight_groups = 1;
  return p;
}

RouteAndGroup route(const uint16_t* x, Stream stream) {
  RouteAndGroup p{};
  p.route.x = x;
  p.route.router = zeros<float>(kExperts * kDim);
  p.route.weights = zeros<float>(kRows);
  p.route.chosen = zeros<int32_t>(kRows);
  p.route.tokens = kTokens;
  p.route.dim = p.route.x_stride = kDim;
  p.route.experts = kExperts;
  p.route.k = kChosen;
  p.order = zeros<int32_t>(kRows);
  p.offsets = zeros<int32_t>(kExperts + 1);
  p.counter = zeros<uint32_t>(1);
  route_and_group(p, stream);
  return p;
}

// y = Σ over a token's experts of weight · down(gelu(gate x) · up x), in bf16.
const uint16_t* expert_layer(const uint16_t* x, const RouteAndGroup& routed, Stream stream) {
  GatherQuantize rows{};
  rows.x = x;
  rows.order = routed.order;
  rows.offsets = routed.offsets;
  rows.q = zeros<uint8_t>(kRows * kDim);
  rows.scale = zeros<float>(kRows * kDim / 128);
  rows.scale_row = 1;
  rows.scale_group = rows.rows = kRows;
  rows.dim = rows.x_stride = kDim;
  rows.active = kChosen;
  rows.experts = kExperts;
  gather_quantize(rows, stream);

  GateUp up{};
  up.product = product(rows.q, rows.scale, routed.offsets, 2 * kWidth, kDim);
  up.activation = Activation::gelu_tanh;
  uint8_t* inner = zeros<uint8_t>(kRows * kWidth);
  up.y = inner;
  up.y_scale = zeros<float>(kRows * kWidth / 128);
  up.y_scale_row = 1;
  up.y_scale_group = kRows;
  gate_up(up, stream);

  GroupedGemm down{};
  down.product = product(inner, up.y_scale, routed.offsets, kDim, kWidth);
  float* parts = zeros<float>(kRows * kDim);
  down.y = parts;
  down.y_is_float = true;
  down.order = routed.order;
  down.row_weights = routed.route.weights;
  grouped_gemm(down, stream);

  Combine sum{};
  sum.parts = parts;
  sum.y = zeros<uint16_t>(kTokens * kDim);
  sum.tokens = kTokens;
  sum.active = kChosen;
  sum.dim = kDim;
  combine(sum, stream);
  return sum.y;
}

void run() {
  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  const uint16_t* x = zeros<uint16_t>(kTokens * kDim);  // bf16: your activations
  const RouteAndGroup routed = route(x, stream);
  const uint16_t* y = expert_layer(x, routed, stream);

  std::vector<int32_t> offsets(kExperts + 1);
  uint16_t first;
  must(cudaMemcpyAsync(offsets.data(), routed.offsets, sizeof(int32_t) * offsets.size(), cudaMemcpyDeviceToHost,
                       stream));
  must(cudaMemcpyAsync(&first, y, sizeof first, cudaMemcpyDeviceToHost, stream));
  must(cudaStreamSynchronize(stream));
  for (int32_t offset : offsets) std::printf("%d ", offset);  // all logits tie: 0 64 128 128 128 128 128 128 128
  std::printf("\n%d\n", first);                               // and all weights are 0
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
