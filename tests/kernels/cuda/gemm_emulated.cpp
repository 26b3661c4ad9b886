// The launchers of csrc/cuda/gemm under the host emulation, for ctypes.

#include "cuda/gemm/tile_sizes.h"
#include "cuda/include/grok/gemm.h"
#include "cuda/launch.cuh"
#include "guarded.h"

extern "C" {

void set_seed(uint64_t seed) { grok::emulation::options().seed = seed; }

void set_multiprocessors(int count) { grok::cuda::multiprocessor_count() = count; }

int tile_columns(int64_t rows, int64_t n, int64_t experts, int clusters) {
  return grok::cuda::gemm::tile_columns(rows, n, experts, clusters);
}

int grouped_gemm(const grok::cuda::GroupedGemm* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::grouped_gemm(*p, nullptr); });
}

int gate_up(const grok::cuda::GateUp* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::gate_up(*p, nullptr); });
}

int gather_quantize(const grok::cuda::GatherQuantize* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::gather_quantize(*p, nullptr); });
}

int combine(const grok::cuda::Combine* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::combine(*p, nullptr); });
}
}
