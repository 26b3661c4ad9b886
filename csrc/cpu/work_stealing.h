#pragma once

#include <atomic>
#include <vector>

#include "cpu/executor.h"

namespace grok::cpu {

// Calls task(i, next) for every i in 0..tasks−1. Each thread starts with a contiguous part of the tasks and goes
// through it forwards, so that what it reads is contiguous too; a thread that is done steals from the others, from
// the ends of their parts, since tasks differ in size. `next` is the task that the same thread does after this one,
// or −1: the thread can prefetch for it.
template <class Task>
void run_stealing(Executor& executor, int64_t tasks, const Task& task) {
  struct alignas(64) Part {        // a cache line each
    std::atomic<uint64_t> bounds;  // the first task left; in the upper half, one past the last
  };
  const int64_t threads = std::min(executor.threads(), tasks);
  std::vector<Part> parts(threads);
  for (int64_t i = 0; i < threads; ++i) {
    const uint64_t first = tasks * i / threads, last = tasks * (i + 1) / threads;
    parts[i].bounds = first | last << 32;
  }
  const auto take = [&](int64_t worker) {
    for (int64_t i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& bounds = parts[(worker + i) % threads].bounds;
      uint64_t now = bounds.load(std::memory_order_relaxed);
      while (static_cast<uint32_t>(now) < now >> 32) {
        const uint64_t then = i == 0 ? now + 1 : now - (uint64_t{1} << 32);
        if (!bounds.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
        return static_cast<int64_t>(i == 0 ? static_cast<uint32_t>(now) : then >> 32);
      }
    }
    return int64_t{-1};
  };
  executor.run(threads, [&](int64_t worker) {
    for (int64_t i = take(worker), next; i >= 0; i = next) {
      next = take(worker);
      task(i, next);
    }
  });
}

}  // namespace grok::cpu
