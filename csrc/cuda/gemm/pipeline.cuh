#pragma once

#include "../sm90.cuh"

// A ring of stages between the threads that load tiles and those that multiply them. A loader waits until a stage is
// empty, a multiplier until it is full; each keeps its own Position in the ring.

namespace grok::cuda::gemm {

template <int kStages>
struct Ring {
  sm90::Barrier full[kStages], empty[kStages];

  // Called by one thread, followed by fence_barrier_init and a barrier of the whole cluster.
  __device__ __forceinline__ void init(uint32_t loaders, uint32_t multipliers) {
    for (int i = 0; i < kStages; ++i) {
      sm90::init(full[i], loaders, "full");
      sm90::init(empty[i], multipliers, "empty");
    }
  }
};

template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kStages>
__device__ __forceinline__ void wait_full(Ring<kStages>& ring, const Position<kStages>& at) {
  sm90::wait(ring.full[at.stage], at.parity);
}

// In the first round every stage is empty: waiting for the phase before the first returns at once.
template <int kStages>
__device__ __forceinline__ void wait_empty(Ring<kStages>& ring, const Position<kStages>& at) {
  sm90::wait(ring.empty[at.stage], at.parity ^ 1);
}

}  // namespace grok::cuda::gemm
