#include "bindings.h"

namespace grok {
namespace {

class TorchThreads final : public cpu::Executor {
 public:
  int64_t threads() const override { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

 private:
  void run_tasks(int64_t tasks, void (*call)(const void* task, int64_t i), const void* task) override {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) call(task, i);
    });
  }
};

}  // namespace

cpu::Executor& executor() {
  static TorchThreads threads;
  return threads;
}

}  // namespace grok
