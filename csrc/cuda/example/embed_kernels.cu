// The kernels in a program without Python: routes 64 tokens of Grok-1's shape and shows where each expert's rows start.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -I csrc csrc/cuda/example/embed_kernels.cu \
//     csrc/cuda/*/instantiations/*.cu -o embed_kernels

#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

#include "cuda/include/grok/route.h"

namespace {

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Zeros on the device; the process keeps them until its end.
template <class T>
T* zeros(size_t count) {
  T* data = nullptr;
  must(cudaMalloc(&data, count * sizeof(T)));
  must(cudaMemset(data, 0, count * sizeof(T)));
  return data;
}

void route() {
  constexpr int64_t kTokens = 64, kDim = 6144, kExperts = 8, kChosen = 2;
  cudaStream_t stream;
  must(cudaStreamCreate(&stream));

  grok::cuda::RouteAndGroup p{};
  p.route.x = zeros<uint16_t>(kTokens * kDim);  // bf16: your activations
  p.route.router = zeros<float>(kExperts * kDim);
  p.route.weights = zeros<float>(kTokens * kChosen);
  p.route.chosen = zeros<int32_t>(kTokens * kChosen);
  p.route.tokens = kTokens;
  p.route.dim = p.route.x_stride = kDim;
  p.route.experts = kExperts;
  p.route.k = kChosen;
  p.order = zeros<int32_t>(kTokens * kChosen);
  p.offsets = zeros<int32_t>(kExperts + 1);
  p.counter = zeros<uint32_t>(1);
  grok::cuda::route_and_group(p, stream);

  std::vector<int32_t> offsets(kExperts + 1);
  must(cudaMemcpyAsync(offsets.data(), p.offsets, offsets.size() * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
  must(cudaStreamSynchronize(stream));
  for (int32_t offset : offsets) std::printf("%d ", offset);  // all logits tie: 0 64 128 128 128 128 128 128 128
  std::printf("\n");
}

}  // namespace

int main() {
  try {
    route();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
