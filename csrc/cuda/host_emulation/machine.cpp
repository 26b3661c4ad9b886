#include "machine.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "builtins.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace grok::emulation {
namespace {

constexpr size_t kPage = 4096, kStack = 32 * kPage;
constexpr size_t kSharedMap = 64 * kPage;  // 256 KB: no block has more

Machine* running = nullptr;

constexpr size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::byte* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("host emulation: no memory for fibers");
  return static_cast<std::byte*>(memory);
}

// Memory that is mapped once and kept until the process exits. Every piece lies between inaccessible pages: an access
// past its end faults, and the fault is reported with its offset.
class Pool {
 public:
  explicit Pool(size_t bytes) : bytes_(bytes) {}

  std::byte* get(size_t i) {
    while (pieces_.size() <= i) {
      std::byte* memory = map_memory(bytes_ + 2 * kPage);
      mprotect(memory, kPage, PROT_NONE);
      mprotect(memory + kPage + bytes_, kPage, PROT_NONE);
      pieces_.push_back(memory + kPage);
    }
    return pieces_[i];
  }

 private:
  size_t bytes_;
  std::vector<std::byte*> pieces_;
};

Pool& stacks() {
  static Pool pool(kStack);
  return pool;
}

Pool& shared_memories() {
  static Pool pool(kSharedMap);
  return pool;
}

void enter(Thread& thread) {
  const Dim3 &size = running->block_dim, &index = thread.block->index;
  running->current = &thread;
  threadIdx = {thread.index % size.x, thread.index / size.x % size.y, thread.index / (size.x * size.y)};
  blockIdx = {index.x, index.y, index.z};
}

[[noreturn]] void leave() { _longjmp(running->scheduler, 1); }

void check_finished(Thread& thread) {
  if (!thread.open_products.empty() || !thread.product_groups.empty()) fail("ended with products (wgmma) in flight");
  if (!thread.open_stores.empty() || !thread.store_groups.empty()) fail("ended with stores (TMA) in flight");
  if (*thread.copies) fail("ended with copies (cp.async) in flight");
}

void fiber_main() {
  (*running->body)();
  check_finished(self());
  self().done = true;
  leave();
}

void resume(Thread& thread) {
  enter(thread);
  if (_setjmp(running->scheduler)) {
    running->current = nullptr;
    return;
  }
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = thread.stack;
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

std::string deadlock() {
  std::string text = "deadlock:";
  std::map<std::string, std::vector<const Thread*>> waiters;  // by what they wait for
  for (const Block& block : running->blocks)
    for (const Thread& thread : block.threads)
      if (!thread.done) waiters[thread.waits_for->describe()].push_back(&thread);
  for (const auto& [what, threads] : waiters) {
    text += "\n  " + name_of(*threads.front());
    if (threads.size() > 1) text += " and " + std::to_string(threads.size() - 1) + " more";
    text += " wait" + std::string(threads.size() > 1 ? "" : "s") + " for " + what;
  }
  return text;
}

// The threads that a pass visits. Now and then, for a while, these are only a half, quarter or eighth of all, which
// then run ahead of the others as far as the waits allow.
std::pair<size_t, size_t> part_of(size_t count) {
  Machine& m = *running;
  if (m.ahead_passes == 0 && m.random() % 4 == 0) {
    m.ahead_passes = m.random() % 64;
    m.ahead_count = count >> (1 + m.random() % 3);
    m.ahead_first = m.ahead_count ? m.random() % count / m.ahead_count * m.ahead_count : 0;
  }
  if (m.ahead_passes == 0 || m.ahead_count == 0) return {m.random() % count, count};
  --m.ahead_passes;
  return {m.ahead_first, m.ahead_count};
}

// One pass over threads, from a random start and in a random direction. False if no thread could run.
bool pass(const std::vector<Thread*>& threads, size_t& left) {
  const size_t count = threads.size();
  const auto [first, visited] = running->lazy() ? part_of(count) : std::pair<size_t, size_t>{0, count};
  const bool backwards = running->lazy() && running->random() % 2;
  bool ran = false;
  for (size_t i = 0; i < visited; ++i) {
    Thread& thread = *threads[(first + (backwards ? visited - 1 - i : i)) % count];
    if (thread.done || (thread.waits_for && !thread.waits_for->met())) continue;
    thread.waits_for = nullptr;
    resume(thread);
    if (!running->error.empty()) return true;
    left -= thread.done;
    ran = true;
  }
  if (ran || visited == count) return ran;
  running->ahead_passes = 0;  // the threads ahead wait for others
  return true;
}

void deliver_one() {
  std::vector<Deferred>& pending = running->pending;
  const size_t i = running->random() % pending.size();
  const Deferred effect = std::move(pending[i]);
  pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(i));
  effect.run();
}

void check_block_finished(const Block& block) {
  for (size_t i = block.shared_bytes; i < whole_pages(block.shared_bytes); ++i)
    if (block.shared[i] != std::byte{0xff}) {
      running->error = "a thread wrote past its shared memory, at shared address " + hex(kSharedBase + i) +
                       " (block of " + std::to_string(block.shared_bytes) + " bytes from " + hex(kSharedBase) + " on)";
      return;
    }
}

void run_cluster(const Dim3& first) {
  Machine& m = *running;
  const uint32_t count = m.block_dim.count(), ranks = m.cluster.count();
  std::vector<Thread*> threads;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    Block& block = m.blocks[rank];
    const size_t bytes = block.shared_bytes;
    block = Block{};
    block.rank = rank;
    block.index = Dim3(first.x + rank % m.cluster.x, first.y + rank / m.cluster.x % m.cluster.y, first.z);
    block.shared_bytes = bytes;
    // Access ends at a page boundary; the bytes between the block's memory and that boundary are checked at the end.
    block.shared = shared_memories().get(rank);
    const size_t mapped = whole_pages(bytes);
    mprotect(block.shared, kSharedMap, PROT_NONE);
    if (mapped) {
      mprotect(block.shared, mapped, PROT_READ | PROT_WRITE);
      std::memset(block.shared, 0xff, mapped);  // NaN in every type, so that reads before writes show
    }
    block.unfenced.assign(bytes / 2 + 1, 0);
    block.threads.resize(count);
    for (uint32_t i = 0; i < count; ++i) {
      block.threads[i].block = &block;
      block.threads[i].index = i;
      block.threads[i].stack = reinterpret_cast<char*>(stacks().get(rank * count + i));
      threads.push_back(&block.threads[i]);
    }
  }
  m.cluster_meeting = Meeting{};
  size_t left = threads.size();
  while (left && m.error.empty()) {
    const bool ran = pass(threads, left);
    if (!m.error.empty()) return;
    if (!m.pending.empty() && (!ran || m.random() % 4 == 0)) {
      deliver_one();
    } else if (!ran && left) {
      m.error = deadlock();
    }
  }
  if (m.error.empty() && !m.pending.empty()) m.error = "the block ended before " + m.pending.front().what;
  for (const Block& block : m.blocks)
    if (m.error.empty()) check_block_finished(block);
}

void on_fault(int, siginfo_t* info, void*) {
  const std::byte* address = static_cast<const std::byte*>(info->si_addr);
  if (!running || !running->current) {
    std::signal(SIGSEGV, SIG_DFL);
    return;
  }
  for (const Block& block : running->blocks) {
    const std::byte* end = block.shared + kSharedMap + kPage;
    if (address < block.shared - kPage || address >= end) continue;
    const long offset = static_cast<long>(address - block.shared);
    fail("out-of-bounds access to shared memory, " + std::to_string(offset) + " bytes from its start (it has " +
         std::to_string(block.shared_bytes) + ")");
  }
  fail("invalid access to global memory at " + hex(reinterpret_cast<uint64_t>(address)));
}

// While a launch runs, memory faults are reported as its error; at other times the process's own handlers stay.
class FaultReports {
 public:
  FaultReports() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultReports() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

void check_shape(const LaunchShape& shape) {
  auto refuse = [](const std::string& what) { throw std::runtime_error("host emulation: " + what); };
  if (shape.block.count() < 1 || shape.block.count() > 1024)
    refuse("blocks of " + std::to_string(shape.block.count()) + " threads, expected 1..1024");
  if (shape.block.count() % kWarp)
    refuse("blocks of " + std::to_string(shape.block.count()) + " threads, no whole warps");
  if (shape.shared_bytes > kSharedLimit)
    refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory, expected at most " +
           std::to_string(kSharedLimit));
  if (shape.grid.count() < 1) refuse("an empty grid");
  if (shape.grid.x % shape.cluster.x || shape.grid.y % shape.cluster.y || shape.cluster.z != 1)
    refuse("a grid that clusters do not divide");
  if (shape.cluster.count() > 8) refuse("a cluster of more than 8 blocks");
}

}  // namespace

Options& options() {
  static Options value;
  return value;
}

Machine& machine() { return *running; }

uint64_t Machine::random() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void Machine::defer(std::function<void()> run, std::string what) {
  if (lazy() && random() % 2) {
    pending.push_back({std::move(run), std::move(what)});
  } else {
    run();
  }
}

std::string name_of(const Thread& thread) {
  const Dim3& index = thread.block->index;
  std::string block = std::to_string(index.x);
  if (running->grid.y > 1 || running->grid.z > 1)
    block += "," + std::to_string(index.y) + "," + std::to_string(index.z);
  return "block " + block + " thread " + std::to_string(thread.index) + " (warp " + std::to_string(thread.warp()) + ")";
}

void fail(const std::string& message) {
  if (!running->current) throw std::runtime_error(message);  // in a deferred effect, on the scheduler's own stack
  running->error = name_of(self()) + ": " + message;
  leave();
}

void wait_until(const Condition& condition) {
  while (!condition.met()) {
    Thread& thread = self();
    thread.waits_for = &condition;
    if (!_setjmp(thread.context)) leave();
  }
}

namespace {

struct Met final : Condition {
  const Meeting& meeting;
  uint64_t round;
  const std::string& name;
  Met(const Meeting& meeting, const std::string& name) : meeting(meeting), round(meeting.round), name(name) {}
  bool met() const override { return meeting.round != round; }
  std::string describe() const override {
    return name + " (" + std::to_string(meeting.arrived) + " of " + std::to_string(meeting.expected) + " threads came)";
  }
};

}  // namespace

void meet(Meeting& meeting, uint32_t expected, const char* operation, const std::string& name) {
  if (meeting.arrived && (meeting.expected != expected || std::strcmp(meeting.operation, operation) != 0))
    fail(name + ": " + operation + " of " + std::to_string(expected) + " threads meets " + meeting.operation + " of " +
         std::to_string(meeting.expected));
  meeting.expected = expected;
  meeting.operation = operation;
  const Met met(meeting, name);
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  wait_until(met);
}

Meeting& warp_meeting(uint32_t mask) {
  const Thread& thread = self();
  if (!(mask >> thread.lane() & 1)) fail("a warp operation whose mask " + hex(mask) + " lacks the calling lane");
  return thread.block->warps[{thread.warp(), mask}];
}

uint64_t exchange(uint32_t mask, uint64_t value, const char* operation,
                  const std::function<uint64_t(const uint64_t*)>& read) {
  Meeting& meeting = warp_meeting(mask);
  uint64_t* slot = meeting.slot[meeting.round & 1];  // lanes of the round before may still read the other one
  slot[self().lane()] = value;
  meet(meeting, static_cast<uint32_t>(__builtin_popcount(mask)), operation,
       std::string(operation) + " of warp " + std::to_string(self().warp()) + " with mask " + hex(mask));
  return read(slot);
}

std::byte* Block::at(uint32_t address, size_t bytes, const char* operation) {
  if (address < kSharedBase || address - kSharedBase + bytes > shared_bytes)
    fail(std::string(operation) + ": shared addresses " + hex(address) + ".." + hex(address + bytes) +
         " are outside the block's " + hex(kSharedBase) + ".." + hex(kSharedBase + shared_bytes));
  return shared + (address - kSharedBase);
}

uint32_t shared_address(const void* pointer, size_t bytes, const char* operation) {
  Block& block = *self().block;
  const std::ptrdiff_t offset = static_cast<const std::byte*>(pointer) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > block.shared_bytes)
    fail(std::string(operation) + ": " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
         " from the start of shared memory, which has " + std::to_string(block.shared_bytes));
  return kSharedBase + static_cast<uint32_t>(offset);
}

void run_grid(const LaunchShape& shape, const std::function<void()>& body) {
  check_shape(shape);
  Machine m;
  m.grid = shape.grid;
  m.block_dim = shape.block;
  m.cluster = shape.cluster;
  m.body = &body;
  m.random_state = options().seed;
  m.blocks.resize(shape.cluster.count());
  for (Block& block : m.blocks) block.shared_bytes = shape.shared_bytes;
  running = &m;
  gridDim = {shape.grid.x, shape.grid.y, shape.grid.z};
  blockDim = {shape.block.x, shape.block.y, shape.block.z};
  {
    const FaultReports reports;
    for (uint32_t z = 0; z < shape.grid.z; ++z)
      for (uint32_t y = 0; y < shape.grid.y; y += shape.cluster.y)
        for (uint32_t x = 0; x < shape.grid.x && m.error.empty(); x += shape.cluster.x) {
          try {
            run_cluster(Dim3(x, y, z));
          } catch (const std::runtime_error& error) {
            m.error = error.what();
          }
        }
  }
  running = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

}  // namespace grok::emulation
