// The launchers of csrc/cuda/route under the host emulation, for ctypes.

#include "cuda/include/grok/route.h"
#include "cuda/launch.cuh"
#include "guarded.h"

extern "C" {

void set_seed(uint64_t seed) { grok::emulation::options().seed = seed; }

int route_topk(const grok::cuda::RouteTopk* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::route_topk(*p, nullptr); });
}

int group_tokens(const grok::cuda::GroupTokens* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::group_tokens(*p, nullptr); });
}

int route_and_group(const grok::cuda::RouteAndGroup* p, char* error, int size) {
  return guarded(error, size, [&] { grok::cuda::route_and_group(*p, nullptr); });
}
}
