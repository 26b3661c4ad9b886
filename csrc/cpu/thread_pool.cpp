#include "cpu/thread_pool.h"

namespace grok::cpu {
namespace {

thread_local bool in_task = false;

}  // namespace

ThreadPool::ThreadPool(int64_t threads) {
  for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this] { wait_for_loops(); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  started_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

int64_t ThreadPool::threads() const { return in_task ? 1 : static_cast<int64_t>(workers_.size()) + 1; }

void ThreadPool::run_tasks(int64_t tasks, void (*call)(const void* task, int64_t i), const void* task) {
  if (in_task) {
    for (int64_t i = 0; i < tasks; ++i) call(task, i);
    return;
  }
  const std::lock_guard only(one_loop_);
  const Loop loop{call, task, tasks};
  {
    const std::lock_guard lock(mutex_);
    loop_ = loop;
    next_ = 0;
    error_ = nullptr;
    working_ = static_cast<int64_t>(workers_.size());
    ++loops_;
  }
  started_.notify_all();
  work(loop);
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return working_ == 0; });
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::wait_for_loops() {
  uint64_t seen = 0;
  while (true) {
    Loop loop;
    {
      std::unique_lock lock(mutex_);
      started_.wait(lock, [&] { return stop_ || loops_ != seen; });
      if (stop_) return;
      seen = loops_;
      loop = loop_;
    }
    work(loop);
    const std::lock_guard lock(mutex_);
    if (--working_ == 0) ended_.notify_one();
  }
}

void ThreadPool::work(const Loop& loop) {
  in_task = true;
  try {
    for (int64_t i; (i = next_.fetch_add(1)) < loop.tasks;) loop.call(loop.task, i);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  in_task = false;
}

}  // namespace grok::cpu
