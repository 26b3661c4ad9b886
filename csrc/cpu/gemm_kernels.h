#pragma once

#include "gemm.h"

// The innermost products, one for each path and instruction set: a block of K of a panel with the rows of some tiles.

namespace grok::cpu {

struct Block {
  const uint8_t* w;   // the run that holds column `column`, or starts there
  DType elem;          // of w
  int64_t column, columns;
  const PackedRows* x;
  const PackedRows::RowBlock* rows;
  float* c;           // (rows, 64)
  bool first;         // c is written, else added to
  void* stage;        // kStageBytes, for converted weights
  const uint8_t* then;  // what the thread reads after this block, if it is elsewhere and known
};

using BlockKernel = void (*)(const Block&);

constexpr int64_t kStageBytes = 32 << 10;  // a block of columns of a panel as fp32 or as bf16, in the nearest cache

// Memory that will be read soon is asked for while a tile computes: the machine's own prefetching ends with each page.
// Several tiles share out the block that follows theirs; a tile alone runs ahead of itself. For each run:
//   alone  4 cache lines, to the second cache: more of them can be under way there than to the nearest
//   few    2 lines at most, likewise: few tiles wait for memory too
//   many   2 lines at most, to the nearest cache
enum class Fetch { alone, few, many };
constexpr int kShared = 2;              // cache lines
constexpr int64_t kLeast = 32;          // bytes
constexpr int64_t kRowsAhead = 64;      // runs of the rows
constexpr int64_t kRunsAhead = 32;      // of the weights of a tile alone; what it ends with asks for what comes then

struct Ahead {
  const uint8_t* from;
  int64_t step;  // bytes a run; 0 once there is nothing left
};

template <Fetch kFetch>
GROK_INLINE void fetch(const uint8_t* from) {
  constexpr int kLines = kFetch == Fetch::alone ? 4 : kShared;
  constexpr int kCache = kFetch == Fetch::many ? 3 : 2;  // how near
#pragma GCC unroll 4
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(from + 64 * line, 0, kCache);
}

inline bool alone(const Block& b) { return b.rows->last_tile - b.rows->first_tile == 1; }

// Where a block is converted, or read by several tiles or in parts: of a pass that comes after `done` runs, of `all`. The
// passes share out evenly what comes then: asked for faster than memory gives it, it would hold up the loads.
inline Ahead share_of(const Block& b, int64_t done, int64_t all) {
  const int64_t bytes = b.columns * kPanel * size_of(b.elem);
  const int64_t step = std::clamp<int64_t>((bytes + all - 1) / std::max<int64_t>(1, all), kLeast, kShared * 64);
  return done * step < bytes ? Ahead{(b.then ? b.then : b.w + bytes) + done * step, step} : Ahead{b.w, 0};
}

// A tile alone over `runs` runs of weights as they are: compute(first run, their number, whether c is written, ahead).
template <class Compute>
void stream(const Block& b, int64_t runs, Compute compute) {
  const int64_t body = b.then ? std::max<int64_t>(0, (runs - 1) / kRunsAhead * kRunsAhead) : runs;
  if (body) compute(0, body, b.first, Ahead{b.w + kRunsAhead * kRunBytes, kRunBytes});
  if (body < runs) compute(body, runs - body, b.first && !body, Ahead{b.then, kRunBytes});
}

#if GROK_X86
void bf16_block_avx512(const Block& b);
void int8_block_avx512(const Block& b);
#endif
BlockKernel f32_block(Isa isa);

}  // namespace grok::cpu
