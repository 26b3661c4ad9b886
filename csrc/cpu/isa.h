#pragma once

#include <string>
#include <vector>

// Which instruction set the CPU kernels run on. Everything is compiled for the baseline of the architecture, except
// functions marked with one of the targets below, which are called only where the CPU supports it.

#if defined(__x86_64__)
#define GROK_X86 1
#define GROK_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GROK_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl"
#define GROK_VNNI_FEATURES ",avx512vnni"
#define GROK_BF16_FEATURES GROK_VNNI_FEATURES ",avx512bf16,avx512vbmi"
#if defined(GROK_EMULATE_AVX512)  // for tests: cpu/avx512.h
#define GROK_AVX512 GROK_AVX2
#define GROK_AVX512_VNNI GROK_AVX2
#define GROK_AVX512_BF16 GROK_AVX2
#elif defined(__clang__)
#define GROK_AVX512 __attribute__((target(GROK_AVX512_FEATURES), min_vector_width(512)))
#define GROK_AVX512_VNNI __attribute__((target(GROK_AVX512_FEATURES GROK_VNNI_FEATURES), min_vector_width(512)))
#define GROK_AVX512_BF16 __attribute__((target(GROK_AVX512_FEATURES GROK_BF16_FEATURES), min_vector_width(512)))
#else
#define GROK_AVX512 __attribute__((target(GROK_AVX512_FEATURES ",prefer-vector-width=512")))
#define GROK_AVX512_VNNI __attribute__((target(GROK_AVX512_FEATURES GROK_VNNI_FEATURES ",prefer-vector-width=512")))
#define GROK_AVX512_BF16 __attribute__((target(GROK_AVX512_FEATURES GROK_BF16_FEATURES ",prefer-vector-width=512")))
#endif
#elif defined(__aarch64__)
#define GROK_ARM 1
#define GROK_NEON_BF16 __attribute__((target("arch=armv8.2-a+bf16+i8mm")))
#endif

namespace grok::cpu {

// Of one architecture, each includes those before it. A kernel that has no version for one uses the version for the one
// before it.
//   portable     the architecture's baseline, without fused multiply-adds: the same bits on every architecture
//   avx2         AVX2, FMA and F16C
//   avx512       F, BW, DQ, VL
//   avx512_vnni  those and VNNI: products of int8 quadruples
//   avx512_bf16  those and BF16, VBMI: products of bf16 pairs
//   neon         the baseline of 64-bit Arm, with fused multiply-adds
//   neon_bf16    that and BF16, I8MM (Armv8.6): products of matrices of bf16 and of int8
enum class Isa { portable, avx2, avx512, avx512_vnni, avx512_bf16, neon, neon_bf16 };

std::string name(Isa isa);

// The instruction sets that this machine supports, best first.
std::vector<Isa> available_isas();

// The one in use: set by use_isa, else by GROK_CPU_ISA as it was at the first call, else the best.
// Throws std::invalid_argument for a name that is unknown or that this machine does not support.
Isa current_isa();

// Sets it for the whole process, since kernels run on a pool of threads. An empty name restores the default.
void use_isa(const std::string& name);

}  // namespace grok::cpu
