#include "cpu/probe.h"

#include <atomic>
#include <cstring>

#include "common/check.h"
#include "cpu/isa.h"

#if GROK_X86
#include <immintrin.h>
#elif GROK_ARM
#include <arm_neon.h>
#endif

namespace grok::cpu {
namespace {

// Makes a value unknown to the compiler, at no cost: what depends on it cannot be folded, hoisted out of a loop, or
// merged with another chain.
#define GROK_OPAQUE(register_class, value) asm volatile("" : "+" register_class(value))

uint64_t words_sum(const char* data, size_t bytes) {
  uint64_t sum = 0, word;
  for (; bytes >= sizeof word; data += sizeof word, bytes -= sizeof word) {
    std::memcpy(&word, data, sizeof word);
    sum += word;
  }
  word = 0;
  std::memcpy(&word, data, bytes);
  return sum + word;
}

uint64_t read_portable(const void* data, size_t bytes) { return words_sum(static_cast<const char*>(data), bytes); }

// Unrolled completely, so that each chain has a register of its own.
#define GROK_UNROLL _Pragma("GCC unroll 24")

constexpr int kChains = 24;        // of 32 registers: enough to hide the latency, with room for the operands
constexpr int kNarrowChains = 12;  // of 16 registers

#if GROK_X86
#define GROK_NARROW "x"
#elif defined(__aarch64__)
#define GROK_NARROW "w"
#else
#define GROK_NARROW "m"
#endif

typedef float Four __attribute__((vector_size(16)));  // the baseline of x86-64, and of 64-bit ARM

void peak_portable(int64_t steps) {
  Four a = {0.7f, 0.7f, 0.7f, 0.7f}, sums[kNarrowChains] = {};
  GROK_UNROLL for (Four& sum : sums) GROK_OPAQUE(GROK_NARROW, sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE(GROK_NARROW, a);
    GROK_UNROLL for (Four& sum : sums) sum = a * (a + sum);
  }
  GROK_UNROLL for (Four& sum : sums) GROK_OPAQUE(GROK_NARROW, sum);
}

#if GROK_X86

// Far enough ahead to cover the latency of memory, near enough to stay in L1. Non-temporal: a read of gigabytes should
// not evict from L2 and L3 the code and data that run next. But on Intel's CPUs such a prefetch bypasses L2, which can
// have more lines under way than L1: Cascade Lake reads 1.4 times as fast when it prefetches into L2.
constexpr size_t kAhead = 4096;
constexpr int kIntoL2 = 2, kNonTemporal = 0;  // of __builtin_prefetch

template <int kLocality>
GROK_AVX2 uint64_t read_avx2(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  __m256i sums[4] = {};
  for (; bytes >= 128; at += 128, bytes -= 128) {
    __builtin_prefetch(at + kAhead, 0, kLocality);
    __builtin_prefetch(at + kAhead + 64, 0, kLocality);
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm256_add_epi64(sums[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at) + i));
    }
  }
  uint64_t lanes[16], sum = words_sum(at, bytes);
  std::memcpy(lanes, sums, sizeof lanes);
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}

#ifndef GROK_EMULATE_AVX512
template <int kLocality>
GROK_AVX512 uint64_t read_avx512(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  __m512i sums[4] = {};
  for (; bytes >= 256; at += 256, bytes -= 256) {
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(at + kAhead + 64 * i, 0, kLocality);
      sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(at + 64 * i));
    }
  }
  uint64_t lanes[32], sum = words_sum(at, bytes);
  std::memcpy(lanes, sums, sizeof lanes);
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}
#endif

GROK_AVX2 void peak_avx2(int64_t steps) {
  __m256 a = _mm256_set1_ps(0.7f), b = _mm256_set1_ps(1.3f), sums[kNarrowChains] = {};
  GROK_UNROLL for (__m256& sum : sums) GROK_OPAQUE("x", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("x", a);
    GROK_UNROLL for (__m256& sum : sums) sum = _mm256_fmadd_ps(a, b, sum);
  }
  GROK_UNROLL for (__m256& sum : sums) GROK_OPAQUE("x", sum);
}

// 32 products of 8 bits, added up in pairs in 16 bits. Its result is the next one's operand.
GROK_AVX2 void peak_int8_avx2(int64_t steps) {
  __m256i a = _mm256_set1_epi32(0x5a3c9617), sums[kNarrowChains] = {};
  GROK_UNROLL for (__m256i& sum : sums) GROK_OPAQUE("x", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("x", a);
    GROK_UNROLL for (__m256i& sum : sums) sum = _mm256_maddubs_epi16(a, sum);
  }
  GROK_UNROLL for (__m256i& sum : sums) GROK_OPAQUE("x", sum);
}

#ifndef GROK_EMULATE_AVX512
GROK_AVX512 void peak_avx512(int64_t steps) {
  __m512 a = _mm512_set1_ps(0.7f), b = _mm512_set1_ps(1.3f), sums[kChains] = {};
  GROK_UNROLL for (__m512& sum : sums) GROK_OPAQUE("v", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("v", a);
    GROK_UNROLL for (__m512& sum : sums) sum = _mm512_fmadd_ps(a, b, sum);
  }
  GROK_UNROLL for (__m512& sum : sums) GROK_OPAQUE("v", sum);
}

GROK_AVX512_BF16 void peak_bf16_avx512(int64_t steps) {
  __m512i a = _mm512_set1_epi32(0x3f333fa6), b = _mm512_set1_epi32(0x3fa63f33);  // pairs of 0.7 and 1.3
  __m512 sums[kChains] = {};
  GROK_UNROLL for (__m512& sum : sums) GROK_OPAQUE("v", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("v", a);
    GROK_UNROLL for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  GROK_UNROLL for (__m512& sum : sums) GROK_OPAQUE("v", sum);
}

GROK_AVX512_VNNI void peak_int8_avx512(int64_t steps) {
  __m512i a = _mm512_set1_epi32(0x5a3c9617), b = _mm512_set1_epi32(0x1d62c3f5), sums[kChains] = {};
  GROK_UNROLL for (__m512i& sum : sums) GROK_OPAQUE("v", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("v", a);
    GROK_UNROLL for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
  }
  GROK_UNROLL for (__m512i& sum : sums) GROK_OPAQUE("v", sum);
}
#endif

#elif GROK_ARM

void peak_neon(int64_t steps) {
  float32x4_t a = vdupq_n_f32(0.7f), b = vdupq_n_f32(1.3f), sums[kChains] = {};
  GROK_UNROLL for (float32x4_t& sum : sums) GROK_OPAQUE("w", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("w", a);
    GROK_UNROLL for (float32x4_t& sum : sums) sum = vfmaq_f32(sum, a, b);
  }
  GROK_UNROLL for (float32x4_t& sum : sums) GROK_OPAQUE("w", sum);
}

GROK_NEON_BF16 void peak_bf16_neon(int64_t steps) {
  uint32x4_t a = vdupq_n_u32(0x3f333fa6);  // pairs of 0.7 and 1.3
  float32x4_t sums[kChains] = {};
  GROK_UNROLL for (float32x4_t& sum : sums) GROK_OPAQUE("w", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("w", a);
    const bfloat16x8_t x = vreinterpretq_bf16_u32(a);
    GROK_UNROLL for (float32x4_t& sum : sums) sum = vbfmmlaq_f32(sum, x, x);
  }
  GROK_UNROLL for (float32x4_t& sum : sums) GROK_OPAQUE("w", sum);
}

GROK_NEON_BF16 void peak_int8_neon(int64_t steps) {
  int8x16_t a = vreinterpretq_s8_u32(vdupq_n_u32(0x5a3c9617));
  int32x4_t sums[kChains] = {};
  GROK_UNROLL for (int32x4_t& sum : sums) GROK_OPAQUE("w", sum);
  for (int64_t step = 0; step < steps; ++step) {
    GROK_OPAQUE("w", a);
    GROK_UNROLL for (int32x4_t& sum : sums) sum = vmmlaq_s32(sum, a, a);
  }
  GROK_UNROLL for (int32x4_t& sum : sums) GROK_OPAQUE("w", sum);
}

#endif

using Read = uint64_t (*)(const void* data, size_t bytes);

Read read_for([[maybe_unused]] Isa isa) {
#if GROK_X86
  const bool intel = __builtin_cpu_is("intel");
#ifndef GROK_EMULATE_AVX512
  if (isa >= Isa::avx512) return intel ? read_avx512<kIntoL2> : read_avx512<kNonTemporal>;
#endif
  if (isa >= Isa::avx2) return intel ? read_avx2<kIntoL2> : read_avx2<kNonTemporal>;
#endif
  return read_portable;
}

}  // namespace

uint64_t probe_read(const void* data, size_t bytes, Executor& executor) {
  const Read read = read_for(current_isa());
  const int64_t size = static_cast<int64_t>(bytes);
  constexpr int64_t kBlock = 4096;
  std::atomic<uint64_t> sum{0};
  executor.parallel_for((size + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t count = std::min(end * kBlock, size) - begin * kBlock;
    sum += read(static_cast<const char*>(data) + begin * kBlock, static_cast<size_t>(count));
  });
  return sum;
}

ProbePeak probe_peak(const std::string& kind) {
  check(kind == "fp32" || kind == "bf16" || kind == "int8", "probe: kind='", kind, "', expected fp32, bf16 or int8");
#if GROK_X86
  const Isa isa = current_isa();
#ifndef GROK_EMULATE_AVX512
  if (isa == Isa::avx512_bf16 && kind == "bf16") return {"vdpbf16ps", kChains * 16 * 4, peak_bf16_avx512};
  if (isa >= Isa::avx512_vnni && kind == "int8") return {"vpdpbusd", kChains * 16 * 8, peak_int8_avx512};
  if (isa >= Isa::avx512 && kind != "int8") return {"vfmadd231ps, 512 bits", kChains * 16 * 2, peak_avx512};
#endif
  if (isa >= Isa::avx2 && kind == "int8") return {"vpmaddubsw, 256 bits", kNarrowChains * 32 * 2, peak_int8_avx2};
  if (isa >= Isa::avx2) return {"vfmadd231ps, 256 bits", kNarrowChains * 8 * 2, peak_avx2};
#elif GROK_ARM
  const Isa isa = current_isa();
  if (isa == Isa::neon_bf16 && kind == "bf16") return {"bfmmla", kChains * 16 * 2, peak_bf16_neon};
  if (isa == Isa::neon_bf16 && kind == "int8") return {"smmla", kChains * 32 * 2, peak_int8_neon};
  if (isa != Isa::portable) return {"fmla, 128 bits", kChains * 4 * 2, peak_neon};
#endif
  return {"multiply, add, 128 bits", kNarrowChains * 4 * 2, peak_portable};
}

int64_t run_probe_peak(const ProbePeak& probe, int64_t steps, Executor& executor) {
  check(steps > 0, "probe_peak: iterations=", steps, ", expected at least 1");
  const int64_t threads = executor.threads();
  executor.run(threads, [&](int64_t) { probe.run(steps); });
  return threads * steps * probe.operations_per_step;
}

}  // namespace grok::cpu
