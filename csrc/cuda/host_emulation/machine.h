#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

// The emulated multiprocessor: the threads of a cluster's blocks are fibers of one host thread, and a scheduler resumes
// any fiber whose condition is met. What a fiber does between two waits is atomic.

namespace grok::emulation {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kSharedBase = 1024;  // where dynamic shared memory starts on the chip
constexpr size_t kSharedLimit = 232448;  // most that a block may use on sm_90, beside the reserved kilobyte

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  constexpr Dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
  uint32_t count() const { return x * y * z; }
};

// How a launch is scheduled. Seed 0: threads run in order, and copies and products are done when issued. Any other
// seed: threads run in random order, some of them ahead of the others for a while; products, and a random half of the
// copies, are done as late as the waits for them allow, the copies in any order that the chip might take.
struct Options {
  uint64_t seed = 0;
};
Options& options();

// What a thread waits for.
struct Condition {
  virtual bool met() const = 0;
  virtual std::string describe() const = 0;

 protected:
  ~Condition() = default;
};

// A reusable barrier of a fixed number of threads, which may exchange values through `slot`.
struct Meeting {
  uint32_t expected = 0, arrived = 0;
  uint64_t round = 0;
  const char* operation = "";
  uint64_t slot[2][kWarp] = {};
};

struct Block;

// An effect that the chip performs some time after the instruction.
struct Deferred {
  std::function<void()> run;
  std::string what;
};

// One thread's part of a product of its warpgroup (wgmma) that is in flight.
struct Product {
  float* d;                          // the thread's accumulators
  std::shared_ptr<std::vector<float>> values;  // their values while in flight; d holds NaN until the last wait
  std::function<void(float*)> run;
};

// A product as a warpgroup issues it; all of its threads must pass the same arguments.
struct Issued {
  uint64_t a, b;
  uint32_t n;
  bool accumulate;
  std::vector<double> sums[4];  // by warp; empty until computed
  uint32_t done;                // threads that have waited for it
};

struct Thread {
  Block* block = nullptr;
  uint32_t index = 0;  // in its block
  char* stack = nullptr;
  jmp_buf context;
  bool started = false, done = false;
  const Condition* waits_for = nullptr;

  std::vector<Product> open_products;                 // issued, not yet committed
  std::vector<std::vector<Product>> product_groups;   // committed, oldest first
  uint64_t products_issued = 0, products_done = 0;
  bool products_fenced = false;                       // wgmma.fence was called since the last wait for products
  std::vector<Deferred> open_stores;
  std::vector<std::vector<Deferred>> store_groups;
  std::vector<Deferred> open_copies;                  // cp.async with no arrival after them yet
  std::shared_ptr<uint32_t> copies = std::make_shared<uint32_t>(0);  // cp.async of this thread in flight
  std::vector<uint32_t> unfenced;                     // indices at which Block::unfenced names this thread

  uint32_t warp() const { return index / kWarp; }
  uint32_t lane() const { return index % kWarp; }
};

struct Block {
  Dim3 index;
  uint32_t rank = 0;  // in its cluster
  std::byte* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  Meeting named[16];
  std::map<std::pair<uint32_t, uint32_t>, Meeting> warps;  // by warp and mask
  std::map<uint32_t, std::string> barrier_names;           // by shared address
  Meeting warpgroups[8];
  std::vector<int> registers;                              // per thread, by warpgroup; empty before setmaxnreg
  std::map<std::pair<uint32_t, uint64_t>, Issued> products;  // in flight, by warpgroup and number
  std::vector<uint32_t> unfenced;  // for each 2 bytes: 1 + the thread that wrote them without fence_async since, or 0

  // The bytes at a shared address of this block; fails where [address, address + bytes) leaves it.
  std::byte* at(uint32_t address, size_t bytes, const char* operation);
};

// The state of a launch. Only one runs at a time.
struct Machine {
  Dim3 grid, block_dim, cluster;
  std::vector<Block> blocks;      // of the running cluster
  std::vector<Deferred> pending;  // copies in flight
  Meeting cluster_meeting;
  Thread* current = nullptr;
  jmp_buf scheduler;
  std::string error;
  const std::function<void()>* body = nullptr;
  uint64_t random_state = 0;
  size_t ahead_first = 0, ahead_count = 0, ahead_passes = 0;  // only these threads run, for so many passes

  bool lazy() const { return random_state != 0; }
  uint64_t random();
  void defer(std::function<void()> run, std::string what);  // runs it later, or at once
};

Machine& machine();
inline Thread& self() { return *machine().current; }

[[noreturn]] void fail(const std::string& message);  // ends the launch with an error of the running thread
void wait_until(const Condition& condition);
void meet(Meeting& meeting, uint32_t expected, const char* operation, const std::string& name);
Meeting& warp_meeting(uint32_t mask);
uint64_t exchange(uint32_t mask, uint64_t value, const char* operation,
                  const std::function<uint64_t(const uint64_t*)>& read);

uint32_t shared_address(const void* pointer, size_t bytes, const char* operation);  // in the running thread's block
std::string name_of(const Thread& thread);

struct LaunchShape {
  Dim3 grid, block, cluster;
  size_t shared_bytes = 0;
};
// Runs `body` as every thread of the grid. Throws std::runtime_error on a deadlock or any error of a thread.
void run_grid(const LaunchShape& shape, const std::function<void()>& body);

}  // namespace grok::emulation
