#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "cpu/fp8.h"
#include "cpu/include/grok/cpu.h"

// What isa_checks.cpp draws its inputs with, and how it judges results. Inputs are the same bits on every architecture:
// they come from integers and exact operations alone.

namespace grok::cpu::checks {

struct Random {
  uint64_t state;

  uint32_t bits() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24f; }
  float normal() {  // nearly: variance 1
    return ((uniform() - uniform()) + (uniform() - uniform())) * 1.75f;
  }
  int64_t integer(int64_t low, int64_t high) { return low + bits() % (high - low + 1); }
};

// Elements of one of the kernels' types.
struct Array {
  DType type;
  std::vector<uint8_t> bytes;

  Array(DType type_, int64_t count) : type(type_), bytes(count * size_of(type_)) {}

  void* data() { return bytes.data(); }
  void set(int64_t i, float value) {
    uint8_t* to = bytes.data() + i * size_of(type);
    const BF16 half = from_float<BF16>(value);
    if (type == DType::f32) std::memcpy(to, &value, 4);
    if (type == DType::bf16) std::memcpy(to, &half, 2);
    if (type == DType::int8) *to = static_cast<uint8_t>(static_cast<int>(std::clamp(value, -128.0f, 127.0f)));
    if (type == DType::e4m3) *to = to_e4m3(value);
  }
  float get(int64_t i) const {
    const uint8_t* from = bytes.data() + i * size_of(type);
    float value;
    BF16 half;
    std::memcpy(&half, from, std::min<int64_t>(2, size_of(type)));
    if (type == DType::bf16) return to_float(half);
    if (type == DType::int8) return static_cast<float>(static_cast<int8_t>(*from));
    if (type == DType::e4m3) return from_e4m3(*from);
    std::memcpy(&value, from, 4);
    return value;
  }
  template <class Draw>
  Array& fill(const Draw& draw) {
    for (int64_t i = 0; i < static_cast<int64_t>(bytes.size()) / size_of(type); ++i) set(i, draw(i));
    return *this;
  }
};

// Bits, with one NaN for all: the architectures disagree on its sign and payload.
inline uint32_t bits_of(float value) { return value == value ? float_to_bits(value) : 0x7fc00000u; }

using Result = std::vector<float>;  // row after row

inline bool same(const Result& a, const Result& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) { return bits_of(x) == bits_of(y); });
}

// The RMS of a − b as a part of the RMS of b, over the finite elements; infinite where one is NaN or infinite and the
// other is not the same.
inline double distance(const Result& a, const Result& b) {
  double error = 0, size = 1e-300;
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::isfinite(b[i]) && std::isfinite(a[i])) {
      error += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
      size += double{b[i]} * b[i];
    } else if (bits_of(a[i]) != bits_of(b[i])) {
      return std::numeric_limits<double>::infinity();
    }
  }
  return std::sqrt(error / size);
}

class Judge {
 public:
  int failures = 0;

  // compute(executor, begin, end): rows begin..end − 1 of `rows`, in a call with these rows alone. On every instruction
  // set all rows must have portable's bits, or come within `tolerance` if it is not 0; and no row's bits may depend on
  // the number of threads or on the other rows.
  void check(const std::string& what, int64_t rows, double tolerance,
             const std::function<Result(Executor&, int64_t, int64_t)>& compute) {
    use_isa("portable");
    const Result expected = compute(one_, 0, rows);
    const size_t width = expected.size() / rows;
    for (float value : expected) digest_of(what) = (digest_of(what) ^ bits_of(value)) * 0x100000001b3u;
    for (Isa isa : available_isas()) {
      use_isa(name(isa));
      const Result all = compute(several_, 0, rows);
      const double error = distance(all, expected);
      const bool near = tolerance == 0 || isa == Isa::portable ? same(all, expected) : error <= tolerance;
      if (!near) fail(isa, what, "is not portable's result: relative error ", error);
      double& worst = worst_[name(isa)];
      if (tolerance != 0 && tolerance < 1e-5) worst = std::max(worst, error);
      if (!same(compute(one_, 0, rows), all)) fail(isa, what, "depends on the threads", 0);
      for (int64_t count = 1, begin = 0; begin < rows; begin += count, count = count % 7 + 1) {
        const int64_t end = std::min(rows, begin + count);
        const Result part(all.begin() + begin * width, all.begin() + end * width);
        if (!same(compute(one_, begin, end), part)) fail(isa, what, "depends on the other rows: first row ", begin);
      }
    }
    ++checks_;
  }

  // One line for each op and instruction set.
  void report() const {
    for (const auto& [op, digest] : digests_) std::printf("portable %s %016llx\n", op.c_str(), digest);
    for (const auto& [isa, error] : worst_) {
      std::printf("%s: %d checks, relative error to portable at most %.1e\n", isa.c_str(), checks_, error);
    }
  }

 private:
  unsigned long long& digest_of(const std::string& what) { return digests_[what.substr(0, what.find(' '))]; }

  void fail(Isa isa, const std::string& what, const char* reason, double number) {
    ++failures;
    std::printf("FAILED %s: %s %s%g\n", name(isa).c_str(), what.c_str(), reason, number);
  }

  ThreadPool several_{3}, one_{1};
  int checks_ = 0;
  std::map<std::string, unsigned long long> digests_;
  std::map<std::string, double> worst_;
};

}  // namespace grok::cpu::checks
