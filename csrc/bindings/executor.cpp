// The kernels' executor over torch's threads, and the CPUs that these may run on.

#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <climits>
#include <vector>

#include "bindings.h"

namespace grok {
namespace {

// For each worker of a pool, by its number, the CPUs that it may run on, a bit each. None: all workers keep theirs.
using Places = std::vector<std::vector<unsigned long>>;

// Never freed once set: workers may hold it, and it is set about once in a process.
std::atomic<const Places*> places{nullptr};

// Binds the thread that runs it, unless it is the caller's own (number 0): what an embedding program does with its
// threads is its business, and threads that they start would inherit the binding.
void bind_this_worker() {
#ifdef __linux__
  static thread_local const Places* applied = nullptr;
  const Places* wanted = places.load(std::memory_order_acquire);
  const int number = at::get_thread_num();
  if (wanted == applied || number == 0) return;
  applied = wanted;
  const std::vector<unsigned long>& mask = (*wanted)[number % wanted->size()];
  // a failure, of a CPU that was taken from the process since, leaves the thread where it is, which is only slower
  sched_setaffinity(0, mask.size() * sizeof(unsigned long), reinterpret_cast<const cpu_set_t*>(mask.data()));
#endif
}

class TorchThreads final : public cpu::Executor {
 public:
  int64_t threads() const override { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

 private:
  void run_tasks(int64_t tasks, void (*call)(const void* task, int64_t i), const void* task) override {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      bind_this_worker();
      for (int64_t i = begin; i < end; ++i) call(task, i);
    });
  }
};

void bind_threads(const std::vector<std::vector<int64_t>>& cpus) {
  constexpr int64_t kBits = sizeof(unsigned long) * CHAR_BIT, kMost = 1 << 16;
  check(!cpus.empty(), "bind_threads: cpus is empty, expected a list of CPUs for each worker");
  Places masks;
  for (const std::vector<int64_t>& own : cpus) {
    check(!own.empty(), "bind_threads: a worker has no CPUs");
    std::vector<unsigned long> mask;
    for (const int64_t cpu : own) {
      check(cpu >= 0 && cpu < kMost, "bind_threads: CPU ", cpu, " is not in 0..", kMost - 1);
      if (static_cast<int64_t>(mask.size()) <= cpu / kBits) mask.resize(cpu / kBits + 1);
      mask[cpu / kBits] |= 1ul << cpu % kBits;
    }
    masks.push_back(std::move(mask));
  }
  places.store(new Places(std::move(masks)), std::memory_order_release);
}

}  // namespace

cpu::Executor& executor() {
  static TorchThreads threads;
  return threads;
}

void define_executor(pybind11::module_& module) {
  module.def("bind_threads", &bind_threads, pybind11::arg("cpus"),
             "Let worker i of each of torch's pools run on cpus[i % len(cpus)] from its next loop on; a caller's own "
             "thread is not bound.");
}

}  // namespace grok
