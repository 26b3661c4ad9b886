#pragma once

#include <algorithm>
#include <cstdint>

namespace grok::cpu {

// The threads that the kernels run on. The Python module hands in torch's; a program without torch hands in a
// ThreadPool (thread_pool.h) or an adapter to its own. A process should have one set of threads: two would compete
// for the cores.
//
// No kernel's result depends on the number of threads or on which of them ran a task.
class Executor {
 public:
  virtual ~Executor() = default;

  // How many tasks can run at the same time, at least 1. It is 1 on a thread that is running a task.
  virtual int64_t threads() const = 0;

  // Calls task(0) .. task(tasks − 1), perhaps at the same time, and returns when all have returned. An exception of a
  // task is thrown again here; then the other tasks may or may not have run.
  template <class Task>
  void run(int64_t tasks, const Task& task) {
    if (tasks == 1) return task(int64_t{0});
    if (tasks > 1) run_tasks(tasks, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

  // Calls range(begin, end) for ranges that cover 0..count−1, at most one for each thread, and one only below `grain`
  // steps.
  template <class Range>
  void parallel_for(int64_t count, int64_t grain, const Range& range) {
    const int64_t ranges = std::min(threads(), (count + grain - 1) / grain);
    run(ranges, [&](int64_t i) { range(count * i / ranges, count * (i + 1) / ranges); });
  }

 protected:
  virtual void run_tasks(int64_t tasks, void (*call)(const void* task, int64_t i), const void* task) = 0;
};

// Waking a thread takes microseconds: a range of a parallel_for has at least this many elements.
constexpr int64_t kElementsPerRange = 32768;

// The grain of a parallel_for over rows of d elements.
inline int64_t rows_per_range(int64_t d) {
  return std::max<int64_t>(1, kElementsPerRange / std::max<int64_t>(1, d));
}

}  // namespace grok::cpu
