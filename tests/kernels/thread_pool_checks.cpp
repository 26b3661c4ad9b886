// What ThreadPool promises, for the thread sanitizer to watch: every task runs once, loops inside tasks are serial,
// several threads may call it, and an exception reaches the caller and leaves the pool usable.

#include "cpu/thread_pool.h"

#include <cstdio>
#include <stdexcept>

namespace {

using grok::cpu::ThreadPool;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

void every_task_runs_once(ThreadPool& pool) {
  for (int64_t tasks : {0, 1, 2, 3, 100}) {
    std::vector<int> runs(tasks, 0);
    pool.run(tasks, [&](int64_t i) { ++runs[i]; });
    for (int count : runs) expect(count == 1, "every task runs once");
  }
}

void ranges_cover_all_steps(ThreadPool& pool) {
  std::vector<int> runs(1000, 0);
  std::atomic<int64_t> ranges{0};
  pool.parallel_for(1000, 300, [&](int64_t begin, int64_t end) {
    ++ranges;
    for (int64_t i = begin; i < end; ++i) ++runs[i];
  });
  for (int count : runs) expect(count == 1, "every step is in one range");
  expect(ranges == std::min<int64_t>(pool.threads(), 4), "as many ranges as threads and the grain allow");
}

void loops_inside_tasks_are_serial(ThreadPool& pool) {
  std::atomic<int64_t> sum{0};
  pool.run(8, [&](int64_t) {
    expect(pool.threads() == 1, "a task has one thread");
    const auto thread = std::this_thread::get_id();
    pool.run(5, [&](int64_t i) {
      expect(std::this_thread::get_id() == thread, "a loop inside a task stays on its thread");
      sum += i;
    });
  });
  expect(sum == 80, "loops inside tasks run");
}

void threads_may_share_the_pool(ThreadPool& pool) {
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) pool.run(7, [&](int64_t i) { sum += i; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(sum == 3 * 50 * 21, "loops of several threads run");
}

void exceptions_reach_the_caller(ThreadPool& pool) {
  for (int round = 0; round < 20; ++round) {
    bool caught = false;
    try {
      pool.run(16, [](int64_t i) {
        if (i == 5) throw std::runtime_error("planted");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    expect(caught, "an exception reaches the caller");
  }
  every_task_runs_once(pool);
}

}  // namespace

int main() {
  for (int64_t threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    expect(pool.threads() == threads, "it has the threads that were asked for");
    every_task_runs_once(pool);
    ranges_cover_all_steps(pool);
    if (threads > 1) loops_inside_tasks_are_serial(pool);
    threads_may_share_the_pool(pool);
    exceptions_reach_the_caller(pool);
  }
  return failures != 0;
}
