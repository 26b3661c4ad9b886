#pragma once

#include "common/check.h"
#include "common/types.h"
#include "cpu/isa.h"

// A kernel's body is a template marked GROK_INLINE. It is compiled once for each instruction set, by a function that
// has the instruction set as its target and its name as a suffix; GROK_PICK finds the one to call.

namespace grok::cpu {

// Kernels are compiled for activations and norm weights of f32 and bf16. `what`: the op and the argument.
inline void check_float(const char* what, DType type) {
  check(type == DType::f32 || type == DType::bf16, what, " is ", name(type), ", expected f32 or bf16");
}

// The best version for `isa`. avx512_vnni and avx512_bf16 take the avx512 one, neon_bf16 the neon one: kernels with a
// version of their own for these say so.
#if GROK_X86
template <class T>
const T& pick(Isa isa, const T& portable, const T& avx2, const T& avx512) {
  return isa >= Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : portable;
}
#define GROK_PICK(ISA, NAME) ::grok::cpu::pick(ISA, NAME##_portable, NAME##_avx2, NAME##_avx512)
#elif GROK_ARM
#define GROK_PICK(ISA, NAME) ((ISA) == ::grok::cpu::Isa::portable ? NAME##_portable : NAME##_neon)
#else
#define GROK_PICK(ISA, NAME) ((void)(ISA), NAME##_portable)
#endif

// Computes rows begin..end−1 of an op with these parameters.
template <class Params>
using RowsKernel = void (*)(const Params&, int64_t begin, int64_t end);

// GROK_ROWS_KERNEL(op, body, Params) compiles body<Types...>(const Params&, begin, end) for each instruction set, and
// defines op_kernel<Types...>(isa), which returns the version for `isa`. Its bits do not depend on the instruction set,
// so it must not fuse multiply-adds. On 64-bit Arm the baseline has vector registers of the only width, and one version
// serves all.
#define GROK_COMPILE_ROWS(NAME, TARGET, BODY, PARAMS)                       \
  template <class... Types>                                                \
  TARGET void NAME(const PARAMS& p, int64_t begin, int64_t end) {          \
    BODY<Types...>(p, begin, end);                                         \
  }
#if GROK_X86
#define GROK_ROWS_KERNEL(NAME, BODY, PARAMS)                                                          \
  GROK_COMPILE_ROWS(NAME##_portable, , BODY, PARAMS)                                                  \
  GROK_COMPILE_ROWS(NAME##_avx2, GROK_AVX2, BODY, PARAMS)                                             \
  GROK_COMPILE_ROWS(NAME##_avx512, GROK_AVX512, BODY, PARAMS)                                         \
  template <class... Types>                                                                           \
  RowsKernel<PARAMS> NAME##_kernel(Isa isa) {                                                         \
    return pick<RowsKernel<PARAMS>>(isa, NAME##_portable<Types...>, NAME##_avx2<Types...>,            \
                                    NAME##_avx512<Types...>);                                         \
  }
#else
#define GROK_ROWS_KERNEL(NAME, BODY, PARAMS)                                       \
  GROK_COMPILE_ROWS(NAME##_portable, , BODY, PARAMS)                               \
  template <class... Types>                                                        \
  RowsKernel<PARAMS> NAME##_kernel(Isa) {                                          \
    return NAME##_portable<Types...>;                                              \
  }
#endif

}  // namespace grok::cpu
