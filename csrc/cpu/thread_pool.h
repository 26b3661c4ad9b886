#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/executor.h"

namespace grok::cpu {

// The executor of a program that has no threads to lend: the calling thread and `threads` − 1 that wait for work.
// Several threads may call `run`; their loops run one after the other. A loop inside a task runs on that task's
// thread. The Python module does not contain this class: it runs on torch's threads.
class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(int64_t threads = std::thread::hardware_concurrency());
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int64_t threads() const override;

 private:
  // One call of `run`.
  struct Loop {
    void (*call)(const void* task, int64_t i);
    const void* task;
    int64_t tasks;
  };

  void run_tasks(int64_t tasks, void (*call)(const void* task, int64_t i), const void* task) override;
  void wait_for_loops();
  void work(const Loop& loop);

  std::mutex one_loop_;  // held by the thread whose loop runs
  std::mutex mutex_;     // guards the members below it
  std::condition_variable started_, ended_;
  Loop loop_{};
  uint64_t loops_ = 0;  // started so far
  int64_t working_ = 0;  // workers that have not left the current loop
  bool stop_ = false;
  std::exception_ptr error_;
  std::atomic<int64_t> next_{0};  // task of the current loop
  std::vector<std::thread> workers_;
};

}  // namespace grok::cpu
