#include "sm90.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace grok::emulation {

constexpr uint32_t kWarpgroup = 128;
constexpr int kRegisters = 65536;
constexpr uint32_t kInFlight = 0x7fc0dead;  // the NaN in accumulators while products are in flight

namespace {

std::string text(uint64_t value) { return std::to_string(value); }

uint32_t warpgroup() { return self().index / kWarpgroup; }

Block& peer(uint32_t rank, const char* operation) {
  Machine& m = machine();
  if (rank >= m.blocks.size())
    fail(std::string(operation) + ": block " + text(rank) + " of a cluster of " + text(m.blocks.size()));
  return m.blocks[rank];
}

void check_alive(const Block& block, const char* operation) {
  for (const Thread& thread : block.threads)
    if (!thread.done) return;
  fail(std::string(operation) + ": block " + text(block.rank) + " of the cluster has ended");
}

// Tracking of ordinary stores that no fence has yet made visible to the copy engine and the tensor core.

constexpr uint32_t kGrain = 2;

void note_write(Block& block, Thread& thread, uint32_t address, uint32_t bytes) {
  for (uint32_t i = (address - kSharedBase) / kGrain; i <= (address - kSharedBase + bytes - 1) / kGrain; ++i) {
    block.unfenced[i] = thread.index + 1;
    thread.unfenced.push_back(i);
  }
}

void check_fenced(const Block& block, uint32_t address, uint32_t bytes, const char* operation) {
  for (uint32_t i = (address - kSharedBase) / kGrain; i <= (address - kSharedBase + bytes - 1) / kGrain; ++i)
    if (block.unfenced[i])
      fail(std::string(operation) + ": thread " + text(block.unfenced[i] - 1) + " wrote shared offset " +
           text(i * kGrain) + " and did not call fence_async after it");
}

// Barriers

struct State {
  uint64_t valid : 2, phase : 1, expected : 20, left : 20;
  int64_t bytes : 21;
};
constexpr uint64_t kValid = 1;  // memory that was never written has 3

struct At {  // a barrier of a block
  Block& block;
  uint32_t address;

  State state() const {
    State state;
    std::memcpy(&state, block.shared + (address - kSharedBase), sizeof state);
    return state;
  }
  void set(const State& state) const { std::memcpy(block.shared + (address - kSharedBase), &state, sizeof state); }

  std::string name() const {
    const auto found = block.barrier_names.find(address);
    const std::string where = machine().blocks.size() > 1 ? " of block " + text(block.rank) + " of the cluster" : "";
    return "barrier " + (found == block.barrier_names.end() ? text(address - kSharedBase) : found->second) + where;
  }

  State checked(const char* operation) const {
    const State now = state();
    if (now.valid != kValid || !block.barrier_names.count(address))
      fail(std::string(operation) + ": no barrier was initialised at shared offset " + text(address - kSharedBase));
    return now;
  }

  // Counts `arrivals` arrivals, `expected` more bytes to wait for, and `came` bytes that have come.
  void count(const char* operation, uint32_t arrivals, int64_t expected, int64_t came) const {
    State now = checked(operation);
    if (arrivals > now.left)
      fail(std::string(operation) + ": more arrivals than the " + text(now.expected) + " of " + name());
    const int64_t bytes = now.bytes + expected - came;
    if (bytes >= 1 << 20 || bytes <= -(1 << 20))
      fail(std::string(operation) + ": " + std::to_string(bytes) + " bytes expected at " + name());
    now.left = now.left - arrivals;
    now.bytes = bytes;
    if (!now.left && !now.bytes) {
      now.phase ^= 1;
      now.left = now.expected;
    }
    set(now);
  }
};

At barrier_at(const sm90::Barrier& barrier, const char* operation) {
  return {*self().block, shared_address(&barrier, sizeof barrier, operation)};
}

struct PhaseComplete final : Condition {
  At at;
  uint32_t parity;
  PhaseComplete(At at, uint32_t parity) : at(at), parity(parity) {}
  bool met() const override { return at.state().phase != parity; }
  std::string describe() const override {
    const State now = at.state();
    return at.name() + ", parity " + text(parity) + " (" + text(now.expected - now.left) + " of " + text(now.expected) +
           " arrivals came, " + std::to_string(static_cast<int64_t>(now.bytes)) + " bytes are missing)";
  }
};

// Tiles

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

uint32_t tile_address(const void* tile, uint32_t bytes, const char* operation) {
  const uint32_t address = shared_address(tile, bytes, operation);
  if (address % 1024)
    fail(std::string(operation) + ": a tile at shared offset " + text(address - kSharedBase) +
         ", expected a multiple of 1024");
  return address;
}

// Calls each(offset in the tile, column, row of the tensor or null if outside) for every 16 bytes of a box.
template <class Each>
void for_chunks(const sm90::TensorMap& map, int x, int y, int z, const Each& each) {
  const uint32_t chunk = 16 / map.element_bytes;
  uint32_t offset = 0;
  for (uint32_t k = 0; k < map.box[2]; ++k)
    for (uint32_t j = 0; j < map.box[1]; ++j)
      for (uint32_t i = 0; i < map.box[0]; i += chunk, offset += 16) {
        const int64_t column = int64_t{x} + i, row = int64_t{y} + j, matrix = int64_t{z} + k;
        const bool outside = row < 0 || row >= map.size[1] || matrix < 0 || matrix >= map.size[2];
        each(offset, column, outside ? nullptr : map.data + row * map.stride[1] + matrix * map.stride[2]);
      }
}

int64_t inside(const sm90::TensorMap& map, int64_t column) {  // bytes of the chunk at this column that exist, 0..16
  const int64_t left = (map.size[0] - column) * map.element_bytes;
  return left < 0 ? 0 : left > 16 ? 16 : left;
}

void check_column(const sm90::TensorMap& map, int x, const char* operation) {
  if (x < 0 || x * static_cast<int64_t>(map.element_bytes) % 16)
    fail(std::string(operation) + ": column " + std::to_string(x) +
         ", the emulation takes multiples of 16 bytes from 0 on");
}

void copy_in(const sm90::TensorMap& map, Block& block, uint32_t tile, int x, int y, int z) {
  for_chunks(map, x, y, z, [&](uint32_t offset, int64_t column, const std::byte* row) {
    std::byte* to = block.shared + (swizzled(tile + offset) - kSharedBase);
    std::memset(to, 0, 16);
    if (row) std::memcpy(to, row + column * map.element_bytes, static_cast<size_t>(inside(map, column)));
  });
}

void copy_out(const sm90::TensorMap& map, const Block& block, uint32_t tile, int x, int y) {
  for_chunks(map, x, y, 0, [&](uint32_t offset, int64_t column, std::byte* row) {
    if (row)
      std::memcpy(row + column * map.element_bytes, block.shared + (swizzled(tile + offset) - kSharedBase),
                  static_cast<size_t>(inside(map, column)));
  });
}

// Products

double from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent == 15 && mantissa == 7 ? std::nan("")
                      : exponent                      ? std::ldexp(8 + mantissa, exponent - 10)
                                                      : std::ldexp(mantissa, -9);
  return bits & 0x80 ? -size : size;
}

const double* e4m3_values() {
  static const std::vector<double> table = [] {
    std::vector<double> values(256);
    for (int i = 0; i < 256; ++i) values[static_cast<size_t>(i)] = from_e4m3(static_cast<uint8_t>(i));
    return values;
  }();
  return table.data();
}

constexpr int kDepth = 32;  // bytes of K in one wgmma

// `rows` rows of 32 bytes of an operand, from row `first` on, addressed by its descriptor.
class Rows {
 public:
  Rows(Block& block, uint64_t operand, uint32_t first, uint32_t rows) : block_(block), first_(first), rows_(rows) {
    start_ = static_cast<uint32_t>(operand & 0x3fff) << 4;
    groups_ = static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4;
    if (operand >> 62 != 1) fail("wgmma: an operand without the swizzle of 128 bytes");
    if (operand >> 49 & 7) fail("wgmma: an operand with a base offset");
    if (groups_ % 1024) fail("wgmma: groups of 8 rows " + text(groups_) + " bytes apart, expected a multiple of 1024");
  }

  uint32_t address(uint32_t row, uint32_t byte) const {
    return swizzled(start_ + (first_ + row) / 8 * groups_ + (first_ + row) % 8 * 128 + byte);
  }

  void check() const {
    for (uint32_t row = 0; row < rows_; ++row)
      for (uint32_t byte = 0; byte < kDepth; byte += 16) {
        block_.at(address(row, byte), 16, "wgmma");
        check_fenced(block_, address(row, byte), 16, "wgmma");
      }
  }

  uint8_t operator()(uint32_t row, uint32_t byte) const {
    return static_cast<uint8_t>(block_.shared[address(row, byte) - kSharedBase]);
  }

 private:
  Block& block_;
  uint32_t first_, rows_, start_, groups_;
};

// The values of the first `count` rows, row by row.
template <class Rows>
std::vector<double> e4m3_rows(const Rows& rows, uint32_t count) {
  std::vector<double> values;
  for (uint32_t row = 0; row < count; ++row)
    for (uint32_t k = 0; k < kDepth; ++k) values.push_back(e4m3_values()[rows(row, k)]);
  return values;
}

template <class Rows>
std::vector<double> bf16_rows(const Rows& rows, uint32_t count) {
  std::vector<double> values;
  for (uint32_t row = 0; row < count; ++row)
    for (uint32_t k = 0; k < kDepth; k += 2)
      values.push_back(sm90::from_bf16(static_cast<uint16_t>(rows(row, k) | rows(row, k + 1) << 8)));
  return values;
}

// The warp's 16 rows of a times the n rows of b, in double precision.
std::vector<double> multiplied(const std::vector<double>& a, const std::vector<double>& b, uint32_t n) {
  const size_t depth = b.size() / n;
  std::vector<double> columns(b.size()), sums(size_t{16} * n);
  for (uint32_t c = 0; c < n; ++c)
    for (size_t k = 0; k < depth; ++k) columns[k * n + c] = b[c * depth + k];
  for (uint32_t r = 0; r < 16; ++r)
    for (size_t k = 0; k < depth; ++k) {
      const double x = a[r * depth + k];
      const double* w = &columns[k * n];
      double* sum = &sums[r * n];
      for (uint32_t c = 0; c < n; ++c) sum[c] += x * w[c];
    }
  return sums;
}

void meet_warp(const char* operation) {
  exchange(0xffffffffu, 0, operation, [](const uint64_t*) { return uint64_t{0}; });
}

template <class Visit>
void for_products(Thread& thread, const Visit& visit) {
  for (auto& group : thread.product_groups)
    for (Product& product : group) visit(product);
  for (Product& product : thread.open_products) visit(product);
}

void finish(Thread& thread, const Product& product) {
  product.run(product.values->data());
  bool in_use = false;
  for_products(thread, [&](const Product& other) { in_use |= other.values == product.values; });
  if (in_use) return;
  for (size_t i = 0; i < product.values->size(); ++i) {
    if (__float_as_uint(product.d[i]) != kInFlight)
      fail("accumulator " + text(i) + " was written while products (wgmma) were in flight");
    product.d[i] = (*product.values)[i];
  }
}

// Issues the thread's part of a product of its warpgroup. `sums` returns the warp's sums; it is called when the product
// is done.
void issue(float* d, uint32_t n, bool accumulate, std::function<const std::vector<double>&()> sums) {
  Thread& thread = self();
  std::shared_ptr<std::vector<float>> values;
  for_products(thread, [&](const Product& other) {
    if (other.d == d) values = other.values;
  });
  if (!values) {
    values = std::make_shared<std::vector<float>>(d, d + n / 2);
    for (uint32_t i = 0; i < n / 2; ++i) d[i] = __uint_as_float(kInFlight);
  }
  const uint32_t lane = thread.lane();
  auto add = [n, accumulate, lane, sums = std::move(sums)](float* v) {
    const std::vector<double>& sum = sums();
    for (uint32_t i = 0; i < n / 2; ++i) {
      const uint32_t row = i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      v[i] = static_cast<float>((accumulate ? static_cast<double>(v[i]) : 0.0) + sum[row * n + column]);
    }
  };
  thread.open_products.push_back({d, std::move(values), std::move(add)});
}

struct Registers final : Condition {
  const Block& block;
  uint32_t group;
  int registers;
  Registers(const Block& block, uint32_t group, int registers) : block(block), group(group), registers(registers) {}
  bool met() const override {
    int used = registers;
    for (uint32_t i = 0; i < block.registers.size(); ++i) used += i == group ? 0 : block.registers[i];
    return used * static_cast<int>(kWarpgroup) <= kRegisters;
  }
  std::string describe() const override {
    return text(static_cast<uint64_t>(registers)) + " registers a thread (setmaxnreg)";
  }
};

}  // namespace

void note_tile_write(const void* to, uint32_t bytes) {
  Thread& thread = self();
  note_write(*thread.block, thread, shared_address(to, bytes, "store"), bytes);
}

}  // namespace grok::emulation

namespace grok::sm90 {

using namespace emu;

void cluster_sync() {
  Machine& m = machine();
  meet(m.cluster_meeting, static_cast<uint32_t>(m.blocks.size() * self().block->threads.size()), "cluster_sync",
       "cluster_sync");
}

void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads < 1 || threads % 32)
    fail("named_barrier " + std::to_string(id) + " of " + std::to_string(threads) +
         " threads, expected 1..15 and whole warps");
  meet(self().block->named[id], static_cast<uint32_t>(threads), "named_barrier", "named barrier " + std::to_string(id));
}

void resize_registers(const char* operation, int registers) {
  Block& block = *self().block;
  const uint32_t group = warpgroup(), groups = static_cast<uint32_t>(block.threads.size()) / kWarpgroup;
  if (block.threads.size() % kWarpgroup)
    fail(std::string(operation) + ": a block of " + text(block.threads.size()) + " threads, no whole warpgroups");
  if (registers % 8 || registers < 24 || registers > 256)
    fail(std::string(operation) + " " + std::to_string(registers) + ", expected a multiple of 8 in 24..256");
  if (block.registers.empty())
    block.registers.assign(groups, kRegisters / static_cast<int>(block.threads.size()) / 8 * 8);
  const int now = block.registers[group];
  const bool more = operation[sizeof "setmaxnreg." - 1] == 'i';
  meet(block.warpgroups[group], kWarpgroup, operation, std::string(operation) + " of warpgroup " + text(group));
  if (more ? registers < now : registers > now)
    fail(std::string(operation) + " " + std::to_string(registers) + " by a warpgroup that has " + std::to_string(now));
  if (more) wait_until(Registers(block, group, registers));
  block.registers[group] = registers;
  meet(block.warpgroups[group], kWarpgroup, operation, std::string(operation) + " of warpgroup " + text(group));
}

// Barriers

void init(Barrier& barrier, uint32_t arrivals, const char* name) {
  const At at = barrier_at(barrier, "mbarrier.init");
  if (arrivals < 1 || arrivals >= 1u << 20)
    fail("mbarrier.init of " + std::string(name) + ": " + text(arrivals) + " arrivals");
  if (at.address % 8) fail("mbarrier.init of " + std::string(name) + ": not aligned to 8 bytes");
  if (!at.block.barrier_names.emplace(at.address, name).second)
    fail("mbarrier.init of " + std::string(name) + ": " + at.name() + " is there");
  State state{};
  state.valid = kValid;
  state.expected = state.left = arrivals;
  at.set(state);
}

void arrive(Barrier& barrier) { barrier_at(barrier, "mbarrier.arrive").count("mbarrier.arrive", 1, 0, 0); }

void arrive_at(Barrier& barrier, uint32_t rank) {
  const char* operation = "mbarrier.arrive at another block";
  Block& block = peer(rank, operation);
  check_alive(block, operation);
  At{block, barrier_at(barrier, operation).address}.count(operation, 1, 0, 0);
}

void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  barrier_at(barrier, "mbarrier.arrive.expect_tx").count("mbarrier.arrive.expect_tx", 1, bytes, 0);
}

void wait(Barrier& barrier, uint32_t parity) {
  const At at = barrier_at(barrier, "mbarrier.try_wait");
  at.checked("mbarrier.try_wait");
  if (parity > 1) fail("mbarrier.try_wait of " + at.name() + ": parity " + text(parity));
  wait_until(PhaseComplete(at, parity));
}

// Copies

void load_tile_to(uint16_t ranks, void* tile, const TensorMap& map, Barrier& full, int x, int y, int z) {
  const char* operation = "cp.async.bulk.tensor (load)";
  const uint32_t address = tile_address(tile, map.bytes(), operation), at = barrier_at(full, operation).address;
  check_column(map, x, operation);
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block& block = peer(rank, operation);
    check_fenced(block, address, map.bytes(), operation);
    machine().defer(
        [=, &block] {
          check_alive(block, operation);
          copy_in(map, block, address, x, y, z);
          At{block, at}.count(operation, 0, 0, map.bytes());
        },
        "a load of a tile into shared offset " + text(address - kSharedBase) + " of block " + text(rank) + " came");
  }
}

void store_tile(const TensorMap& map, const void* tile, int x, int y) {
  const char* operation = "cp.async.bulk.tensor (store)";
  const uint32_t address = tile_address(tile, map.bytes(), operation);
  Block& block = *self().block;
  check_column(map, x, operation);
  if (map.rank != 2) fail(std::string(operation) + ": a tensor of rank " + std::to_string(map.rank) + ", expected 2");
  check_fenced(block, address, map.bytes(), operation);
  auto run = [=, &block] { copy_out(map, block, address, x, y); };
  if (!machine().lazy()) run();
  self().open_stores.push_back({machine().lazy() ? std::function<void()>(run) : [] {}, "a store"});
}

void commit_stores() {
  Thread& thread = self();
  thread.store_groups.push_back(std::move(thread.open_stores));
  thread.open_stores.clear();
}

void wait_store_groups(size_t groups) {
  auto& queue = self().store_groups;
  while (queue.size() > groups) {
    for (const Deferred& store : queue.front()) store.run();
    queue.erase(queue.begin());
  }
}

void fence_async() {
  Thread& thread = self();
  for (const uint32_t i : thread.unfenced)
    if (thread.block->unfenced[i] == thread.index + 1) thread.block->unfenced[i] = 0;
  thread.unfenced.clear();
}

void copy_4_bytes(float* to, const float* from, bool valid) {
  const uint32_t address = shared_address(to, 4, "cp.async");
  if (address % 4) fail("cp.async: not aligned to 4 bytes");
  Thread& thread = self();
  Block& block = *thread.block;
  auto run = [=, &block, &thread] {
    const float value = valid ? *from : 0.0f;
    std::memcpy(block.shared + (address - kSharedBase), &value, sizeof value);
    note_write(block, thread, address, 4);
  };
  ++*thread.copies;
  if (!machine().lazy()) run();
  thread.open_copies.push_back({machine().lazy() ? std::function<void()>(run) : [] {}, "a copy"});
}

void arrive_after_copies(Barrier& barrier) {
  const At at = barrier_at(barrier, "cp.async.mbarrier.arrive");
  at.checked("cp.async.mbarrier.arrive");
  Thread& thread = self();
  machine().defer(
      [at, copies = std::move(thread.open_copies), in_flight = thread.copies] {
        for (const Deferred& copy : copies) copy.run();
        *in_flight -= static_cast<uint32_t>(copies.size());
        at.count("cp.async.mbarrier.arrive", 1, 0, 0);
      },
      "the arrival of copies of 4 bytes at " + at.name());
  thread.open_copies.clear();
}

// Products

uint64_t operand(const void* tile) {
  const uint32_t address = tile_address(tile, 1024, "operand");
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (1024ull / 16) << 32 | 1ull << 62;
}

void fence_products() {
  meet_warp("wgmma.fence");
  self().products_fenced = true;
}

namespace {

// A product of the warpgroup, whose threads must pass the same arguments. `rows_a` returns the values of the warp's
// rows of a.
template <class RowsA>
void multiply(float* d, uint32_t n, uint64_t a, uint64_t b, bool accumulate, RowsA rows_a,
              std::vector<double> (*values)(const Rows&, uint32_t)) {
  Thread& thread = self();
  Block& block = *thread.block;
  const uint32_t group = warpgroup(), warp = thread.warp() % 4;
  meet_warp("wgmma");
  if (!thread.products_fenced) fail("wgmma: no fence_products since the accumulators were last the thread's own");
  const Issued mine = {a, b, n, accumulate, {}, 0};
  Issued& issued = block.products.try_emplace({group, thread.products_issued}, mine).first->second;
  if (issued.a != a || issued.b != b || issued.n != n || issued.accumulate != accumulate)
    fail("wgmma: its operands differ from those of other threads of warpgroup " + text(group));
  const Rows rows_b(block, b, 0, n);
  if (thread.lane() == 0) rows_b.check();
  const auto sums = [&issued, rows_a, rows_b, n, warp, values]() -> const std::vector<double>& {
    if (issued.sums[warp].empty()) issued.sums[warp] = multiplied(rows_a(), values(rows_b, n), n);
    return issued.sums[warp];
  };
  if (!machine().lazy()) sums();
  issue(d, n, accumulate, sums);
  ++thread.products_issued;
}

}  // namespace

void multiply_e4m3(float* d, int n, uint64_t a, uint64_t b, bool accumulate) {
  const Rows rows(*self().block, a, 16 * (self().warp() % 4), 16);
  if (self().lane() == 0) rows.check();
  multiply(
      d, static_cast<uint32_t>(n), a, b, accumulate, [rows] { return e4m3_rows(rows, 16); }, e4m3_rows<Rows>);
}

namespace {

// A warp's 16 rows of 32 bytes in registers. A lane holds four pieces of 4 bytes: piece lane % 4 of the first half of
// row lane / 4, the same of row lane / 4 + 8, then both of the second half.
struct WarpRows {
  uint32_t pieces[4][kWarp];

  explicit WarpRows(const uint32_t* mine) {
    for (uint32_t i = 0; i < 4; ++i)
      exchange(0xffffffffu, mine[i], "wgmma", [&](const uint64_t* slot) {
        for (uint32_t lane = 0; lane < kWarp; ++lane) pieces[i][lane] = static_cast<uint32_t>(slot[lane]);
        return uint64_t{0};
      });
  }

  uint8_t operator()(uint32_t row, uint32_t byte) const {
    return static_cast<uint8_t>(pieces[byte / 16 * 2 + row / 8][row % 8 * 4 + byte % 16 / 4] >> byte % 4 * 8);
  }
};

}  // namespace

void multiply_e4m3_from_registers(float* d, int n, const uint32_t* a, uint64_t b, bool accumulate) {
  const WarpRows rows(a);
  multiply(
      d, static_cast<uint32_t>(n), 0, b, accumulate, [rows] { return e4m3_rows(rows, 16); }, e4m3_rows<Rows>);
}

void multiply_bf16(float* d, int n, const uint32_t* a, uint64_t b, bool accumulate) {
  const WarpRows rows(a);
  multiply(
      d, static_cast<uint32_t>(n), 0, b, accumulate, [rows] { return bf16_rows(rows, 16); }, bf16_rows<Rows>);
}

void commit_products() {
  meet_warp("wgmma.commit_group");
  Thread& thread = self();
  thread.product_groups.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}

void wait_product_groups(size_t groups) {
  meet_warp("wgmma.wait_group");
  Thread& thread = self();
  while (thread.product_groups.size() > groups) {
    const std::vector<Product> done = std::move(thread.product_groups.front());
    thread.product_groups.erase(thread.product_groups.begin());
    for (size_t i = 0; i < done.size(); ++i) {
      // later products of the same group may use the same accumulators
      bool again = false;
      for (size_t j = i + 1; j < done.size(); ++j) again |= done[j].values == done[i].values;
      again ? done[i].run(done[i].values->data()) : finish(thread, done[i]);
      const auto at = thread.block->products.find({warpgroup(), thread.products_done++});
      if (++at->second.done == kWarpgroup) thread.block->products.erase(at);
    }
    thread.products_fenced = false;
  }
}

namespace {

template <class Write>
void store_fragments(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3, const Write& write) {
  if (shared_address(row, 16, "stmatrix") % 16) fail("stmatrix: a row that is not aligned to 16 bytes");
  uint64_t rows[32];
  exchange(0xffffffffu, reinterpret_cast<uint64_t>(row), "stmatrix", [&](const uint64_t* slot) {
    std::memcpy(rows, slot, sizeof rows);
    return uint64_t{0};
  });
  const uint32_t pairs[4] = {m0, m1, m2, m3};
  for (uint32_t i = 0; i < 4; ++i) write(rows + 8 * i, pairs[i]);
}

void write_elements(uint64_t row, uint32_t column, const void* from, uint32_t bytes) {
  std::byte* to = reinterpret_cast<std::byte*>(row) + column * 2;
  std::memcpy(to, from, bytes);
  note_tile_write(to, bytes);
}

}  // namespace

void load_matrices(uint32_t (&m)[4], const void* row) {
  if (shared_address(row, 16, "ldmatrix") % 16) fail("ldmatrix: a row that is not aligned to 16 bytes");
  const uint32_t lane = self().lane();
  exchange(0xffffffffu, reinterpret_cast<uint64_t>(row), "ldmatrix", [&](const uint64_t* slot) {
    for (uint32_t i = 0; i < 4; ++i)
      std::memcpy(&m[i], reinterpret_cast<const std::byte*>(slot[8 * i + lane / 4]) + lane % 4 * 4, 4);
    return uint64_t{0};
  });
}

void store_matrices(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t lane = self().lane();
  store_fragments(row, m0, m1, m2, m3, [lane](const uint64_t* rows, uint32_t pair) {
    write_elements(rows[lane / 4], lane % 4 * 2, &pair, 4);
  });
}

void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const uint32_t lane = self().lane();
  store_fragments(row, m0, m1, m2, m3, [lane](const uint64_t* rows, uint32_t pair) {
    for (uint32_t i = 0; i < 2; ++i) {
      const auto element = static_cast<uint16_t>(pair >> 16 * i);
      write_elements(rows[lane % 4 * 2 + i], lane / 4, &element, 2);
    }
  });
}

// Conversions

uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 7;
    bytes |= ((from < 4 ? low : high) >> from % 4 * 8 & 0xff) << 8 * i;
  }
  return bytes;
}

uint32_t add_bf16(uint32_t x, uint32_t y) {
  const auto sum = [=](uint32_t half) {
    return from_bf16(static_cast<uint16_t>(x >> half)) + from_bf16(static_cast<uint16_t>(y >> half));
  };
  return pack_bf16(sum(0), sum(16));
}

uint32_t pack_bf16(float low, float high) {
  const auto half = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return half(low) | half(high) << 16;
}

uint16_t pack_e4m3(float low, float high) {
  const auto byte = [](float x) {
    const uint32_t sign = __float_as_uint(x) >> 31 << 7;
    if (std::isnan(x)) return 0x7fu;
    const double size = std::fmin(std::fabs(static_cast<double>(x)), 448.0);
    const int exponent = size < 0x1p-6 ? -6 : std::ilogb(size);
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // below 2^-6 less than 8
    return sign | (static_cast<uint32_t>(exponent + 6) * 8 + steps);
  };
  return static_cast<uint16_t>(byte(low) | byte(high) << 8);
}

}  // namespace grok::sm90
