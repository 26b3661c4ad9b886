// The launchers of the swapped-operand products under the host emulation, for ctypes, beside gemm_emulated.cpp's.

#include "cuda/gemm/tile_sizes.h"
#include "cuda/gemm/swapped.cuh"
#include "cuda/include/grok/swapped.h"
#include "cuda/launch.cuh"
#include "guarded.h"

using namespace grok::cuda;

extern "C" {

int even_height(int64_t n, int64_t experts, int64_t multiprocessors) {
  return gemm::even_height(n, experts, multiprocessors);
}

void convert(uint32_t bytes, uint32_t* pairs) {
  gemm::swapped::convert(bytes, gemm::swapped::kUpperBytes, pairs[0], pairs[1]);
}

int column_at(int place) { return gemm::column_at(place); }

int swapped_grouped_gemm(const GroupedGemm* p, int64_t tokens, char* error, int size) {
  return guarded(error, size, [&] { swapped_grouped_gemm(*p, tokens, nullptr); });
}

int swapped_gate_up(const GateUp* p, int64_t tokens, char* error, int size) {
  return guarded(error, size, [&] { swapped_gate_up(*p, tokens, nullptr); });
}

int gather_rows(const GatherRows* p, char* error, int size) {
  return guarded(error, size, [&] { gather_rows(*p, nullptr); });
}
}
