#pragma once

#include "cpu/gemm/block_product.h"

// Weights are prefetched while a tile computes, since the hardware prefetcher stops at each page. Several tiles share
// out the block that follows theirs; a lone tile prefetches its own stream ahead of itself.

namespace grok::cpu {

// How much a tile prefetches for each run, and into which cache.
//   alone  4 cache lines into L2, which can have more of them under way than L1
//   few    2 lines at most, also into L2: few tiles wait for memory too
//   many   2 lines at most, into L1
enum class Fetch { alone, few, many };

constexpr int kLinesPerRun = 2;           // at most, where tiles share out a block
constexpr int64_t kLeastBytesPerRun = 32;
constexpr int64_t kRowsAhead = 64;  // runs of packed rows to prefetch ahead
constexpr int64_t kRunsAhead = 32;  // runs of weights that a lone tile prefetches ahead; the last ones: of what is next

// What a tile prefetches: `step` bytes further on with each run; step is 0 once nothing is left.
struct Ahead {
  const uint8_t* from;
  int64_t step;
};

template <Fetch kFetch>
GROK_INLINE void fetch(const uint8_t* from) {
  constexpr int kLines = kFetch == Fetch::alone ? 4 : kLinesPerRun;
  constexpr int kLocality = kFetch == Fetch::many ? 3 : 2;  // L1 or L2
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(from + 64 * line, 0, kLocality);
}

inline bool alone(const BlockProduct& b) { return b.rows->last_tile - b.rows->first_tile == 1; }

// Spreads the prefetch of the next block evenly over the passes over this one, `all` runs in total: prefetching
// faster than memory delivers would stall this block's own loads. Returns the share of the pass that starts after
// `done` of these runs.
inline Ahead share_of(const BlockProduct& b, int64_t done, int64_t all) {
  const int64_t bytes = b.columns * kPanel * (b.bits ? b.bits : 8 * size_of(b.type)) / 8;
  const int64_t even = (bytes + all - 1) / std::max<int64_t>(1, all);
  const int64_t step = std::clamp<int64_t>(even, kLeastBytesPerRun, kLinesPerRun * 64);
  return done * step < bytes ? Ahead{(b.next ? b.next : b.w + bytes) + done * step, step} : Ahead{b.w, 0};
}

// Streams `runs` runs of unconverted weights past a lone tile, in calls of
// compute(first run, number of runs, whether c is written, what to prefetch).
template <class Compute>
void stream(const BlockProduct& b, int64_t runs, Compute compute) {
  const int64_t body = b.next ? std::max<int64_t>(0, (runs - 1) / kRunsAhead * kRunsAhead) : runs;
  if (body) compute(0, body, b.first, Ahead{b.w + kRunsAhead * kRunBytes, kRunBytes});
  if (body < runs) compute(body, runs - body, b.first && !body, Ahead{b.next, kRunBytes});
}

}  // namespace grok::cpu
