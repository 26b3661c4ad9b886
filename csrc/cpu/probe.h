#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

// What a machine can do at best: the ceilings that benchmarks hold kernels against.

namespace grok::cpu {

// Reads every byte. Returns the sum modulo 2^64 of its little-endian words of 8 bytes, the last one filled with zeros.
using ProbeRead = uint64_t (*)(const void* data, size_t bytes);
ProbeRead probe_read(Isa isa);

enum class Arithmetic { fp32, bf16, int8 };

struct ProbePeak {
  const char* instruction;
  int64_t operations_per_step;  // a multiplication and an addition count as two
  void (*run)(int64_t steps);   // chains of multiply-adds that never leave the registers
};

// The fastest multiply-add for numbers of that type. A machine without one for bf16 or int8 converts to fp32 first, so
// that its ceiling is that of fp32.
ProbePeak probe_peak(Isa isa, Arithmetic kind);

}  // namespace grok::cpu
