// The launchers of the products with swapped operands under the host emulation, for ctypes.

#include "cuda/gemm/tile_sizes.h"
#include "cuda/gemm/wide.cuh"
#include "cuda/include/grok/wide.h"
#include "cuda/launch.cuh"
#include "guarded.h"

using namespace grok::cuda;

extern "C" {

int even_height(int64_t n, int64_t experts, int64_t multiprocessors) {
  return gemm::even_height(n, experts, multiprocessors);
}

void convert(uint32_t bytes, uint32_t* pairs) {
  gemm::wide::convert(bytes, gemm::wide::kUpperBytes, pairs[0], pairs[1]);
}

int column_at(int place) { return gemm::column_at(place); }

int wide_grouped_gemm(const GroupedGemm* p, int64_t tokens, char* error, int size) {
  return guarded(error, size, [&] { wide_grouped_gemm(*p, tokens, nullptr); });
}

int wide_gate_up(const GateUp* p, int64_t tokens, char* error, int size) {
  return guarded(error, size, [&] { wide_gate_up(*p, tokens, nullptr); });
}

int gather_rows(const GatherRows* p, char* error, int size) {
  return guarded(error, size, [&] { gather_rows(*p, nullptr); });
}
}
