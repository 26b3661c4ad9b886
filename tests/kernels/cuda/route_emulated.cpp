// The launchers of csrc/cuda/route under the host emulation, for ctypes.

#include <algorithm>
#include <cstring>
#include <exception>

#include "cuda/include/grok/route.h"
#include "cuda/launch.cuh"

namespace {

template <class Call>
int guarded(char* error, int size, const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), static_cast<size_t>(size) - 1);
    return 1;
  }
}

}  // namespace

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
