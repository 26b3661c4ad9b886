#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/executor.h"

// What the machine can do at best, on the executor's threads and with the current instruction set: the ceilings against
// which benchmarks hold the kernels.

namespace grok::cpu {

// Reads every byte, each thread a contiguous part. Returns the sum modulo 2⁶⁴ of the little-endian words of 8 bytes;
// the last one is filled up with zeros.
uint64_t probe_read(const void* data, size_t bytes, Executor& executor);

// The fastest multiply-add for operands of `kind`: fp32, bf16 or int8. A machine without one for bf16 or int8
// converts to fp32 first, so that its ceiling is that of fp32. Throws std::invalid_argument for another kind.
struct ProbePeak {
  const char* instruction;
  int64_t operations_per_step;  // a multiplication and an addition count as two
  void (*run)(int64_t steps);   // chains of multiply-adds that never leave the registers
};
ProbePeak probe_peak(const std::string& kind);

// Runs `steps` steps on every thread. Returns the operations done by all of them.
int64_t run_probe_peak(const ProbePeak& probe, int64_t steps, Executor& executor);

}  // namespace grok::cpu
