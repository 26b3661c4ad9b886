#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "common/check.h"

namespace grok::cpu {
namespace {

#if GROK_ARM
constexpr Isa kAll[] = {Isa::neon_bf16, Isa::neon, Isa::portable};
#else
constexpr Isa kAll[] = {Isa::avx512_bf16, Isa::avx512_vnni, Isa::avx512, Isa::avx2, Isa::portable};
#endif
constexpr int kDefault = -1;
std::atomic<int> chosen{kDefault};

bool runs_here(Isa isa) {
#if GROK_X86
#if defined(GROK_EMULATE_AVX512)
  if (isa >= Isa::avx512) return runs_here(Isa::avx2);
#endif
  // these ask the operating system too, which must save the wide registers on a context switch
  if (isa == Isa::avx512_bf16) {
    return runs_here(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  }
  if (isa == Isa::avx512_vnni) return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::avx512) {
    return runs_here(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#elif GROK_ARM
  if (isa == Isa::neon) return true;
#if defined(__linux__)
  // bits of <asm/hwcap.h>, which old headers lack
  constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14;
  if (isa == Isa::neon_bf16) return (~getauxval(AT_HWCAP2) & (kI8mm | kBf16)) == 0;
#endif
#endif
  return isa == Isa::portable;
}

template <class List>
std::string join(const List& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + name(isa);
  return text;
}

Isa parse(const std::string& text, const char* source) {
  for (Isa isa : kAll) {
    if (text != name(isa)) continue;
    check(runs_here(isa), source, "='", text, "' cannot run on this machine, which has ", join(available_isas()));
    return isa;
  }
  check(false, source, "='", text, "' is not an instruction set: expected one of ", join(kAll));
  return Isa::portable;
}

Isa from_environment() {
  const char* text = std::getenv("GROK_CPU_ISA");
  return text && *text ? parse(text, "GROK_CPU_ISA") : available_isas().front();
}

}  // namespace

std::string name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::neon_bf16: return "neon_bf16";
    case Isa::neon: return "neon";
    case Isa::portable: return "portable";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAll) {
    if (runs_here(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa current_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  if (isa != kDefault) return static_cast<Isa>(isa);
  static const Isa initial = from_environment();
  return initial;
}

void use_isa(const std::string& text) {
  chosen = text.empty() ? kDefault : static_cast<int>(parse(text, "isa"));
}

}  // namespace grok::cpu
