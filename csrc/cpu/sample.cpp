#include "cpu/sample.h"

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/math.h"

namespace grok::cpu {
namespace {

// Inverse CDF without sorting, by radix selection: the place of a token in the order depends on its probability alone.
// Logits become integers with the same order, and probabilities are summed by the leading digit of their integer. One
// pass over these sums finds the digit at which the running sum reaches its target; the few logits with that digit
// continue with their second digit, and then with their third. Those that are left are equal, in the order of the
// tokens.
//
// That fixes the order of the additions: the sum of a digit adds its tokens in the order of their indices; a running
// sum adds whole digits from the largest down, then the digits below the one at which it stops, then equal tokens one
// by one. All of it in double, not normalised.
constexpr int kDigits = 3;
constexpr int kBits[kDigits] = {13, 10, 9};  // the first: sign, exponent and 4 bits of the mantissa
constexpr int kShift[kDigits] = {19, 9, 0};
constexpr int64_t kTile = 256;   // probabilities computed at a time, on the stack
constexpr int64_t kGlance = 64;  // keys tested at a time for a digit
constexpr uint32_t kNan = 0xffffffffu;  // the largest key: NaN comes first, as in torch's order

GROK_INLINE uint32_t key_of(float logit) {
  const uint32_t bits = float_to_bits(logit + 0.0f);  // −0 becomes 0
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return logit == logit ? key : kNan;
}

GROK_INLINE float logit_of(uint32_t key) {
  return bits_to_float(key ^ (~static_cast<uint32_t>(static_cast<int32_t>(key) >> 31) | 0x80000000u));
}

GROK_INLINE uint32_t digit(uint32_t key, int level) { return (key >> kShift[level]) & ((1u << kBits[level]) - 1u); }

struct Workspace {
  std::vector<uint32_t> keys;        // of every token
  std::vector<uint32_t> left, from;  // the candidates of a search: keys, and their tokens
  double sums[1 << kBits[0]];        // by the first digit
  double more[1 << kBits[1]];        // by a later one
};

// Unnormalised probabilities: exp((logit − largest) / temperature).
struct Softmax {
  double largest;
  double inverse;  // 1 / temperature
};

GROK_INLINE double weight_of(uint32_t key, const Softmax& s) {
  return exp_d((static_cast<double>(logit_of(key)) - s.largest) * s.inverse);
}

template <class X>
GROK_INLINE uint32_t read_keys(const X* __restrict logits, int64_t v, uint32_t* __restrict keys) {
  uint32_t largest = 0;
  for (int64_t start = 0; start < v; start += kTile) {
    const int64_t end = std::min(v, start + kTile);
    for (int64_t i = start; i < end; ++i) keys[i] = key_of(to_float(logits[i]));
    for (int64_t i = start; i < end; ++i) largest = keys[i] > largest ? keys[i] : largest;
  }
  return largest;
}

GROK_INLINE void sum_by_digit(const uint32_t* keys, int64_t n, int level, const Softmax& s, double* sums) {
  std::fill(sums, sums + (1 << kBits[level]), 0.0);
  double weights[kTile];
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t count = std::min(kTile, n - start);
    for (int64_t i = 0; i < count; ++i) weights[i] = weight_of(keys[start + i], s);
    for (int64_t i = 0; i < count; ++i) sums[digit(keys[start + i], level)] += weights[i];
  }
}

// Selects the tokens whose first digit is `wanted`; most stretches of the keys have none.
GROK_INLINE int64_t pick_first(const uint32_t* keys, int64_t n, uint32_t wanted, uint32_t* left, uint32_t* from) {
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += kGlance) {
    const int64_t end = std::min(n, start + kGlance);
    uint32_t any = 0;
    for (int64_t i = start; i < end; ++i) any |= digit(keys[i], 0) == wanted;
    if (!any) continue;
    for (int64_t i = start; i < end; ++i) {
      left[found] = keys[i];
      from[found] = static_cast<uint32_t>(i);
      found += digit(keys[i], 0) == wanted;
    }
  }
  return found;
}

// Keeps the candidates whose digit at this level is `wanted`.
GROK_INLINE int64_t pick_next(uint32_t* left, uint32_t* from, int64_t n, int level, uint32_t wanted) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = left[i];
    left[found] = key;
    from[found] = from[i];
    found += digit(key, level) == wanted;
  }
  return found;
}

struct Place {
  double sum;  // of the probabilities up to and including this token
  uint32_t token;
};

// The first token, in falling order of probability, whose running sum exceeds the target (or, with `equal`, reaches
// it); else the last token whose probability is not 0.
GROK_INLINE Place find(Workspace& w, int64_t v, const Softmax& s, double target, bool equal) {
  const auto passed = [&](double sum) { return equal ? !(sum < target) : !(sum <= target); };  // NaN passes
  uint32_t* left = w.left.data();
  double before = 0.0;  // the probability of all tokens above the candidates
  int64_t n = v;
  for (int level = 0; level < kDigits; ++level) {
    double* sums = level ? w.more : w.sums;
    if (level) sum_by_digit(left, n, level, s, sums);
    uint32_t wanted = 0;
    double reached = before;
    for (int64_t d = (1 << kBits[level]) - 1; d >= 0; --d) {
      if (!(sums[d] > 0.0)) continue;
      wanted = static_cast<uint32_t>(d);
      before = reached;
      reached += sums[d];
      if (passed(reached)) break;
    }
    n = level ? pick_next(left, w.from.data(), n, level, wanted)
              : pick_first(w.keys.data(), v, wanted, left, w.from.data());
    int64_t same = 1;
    while (same < n && left[same] == left[0]) ++same;
    if (same == n) break;
  }
  const double weight = weight_of(left[0], s);
  double sum = before + weight;
  int64_t i = 0;
  for (; i + 1 < n && !passed(sum); ++i) sum += weight;
  return {sum, w.from[i]};
}

GROK_INLINE int64_t first(const uint32_t* keys, uint32_t wanted) {
  int64_t i = 0;
  while (keys[i] != wanted) ++i;
  return i;
}

GROK_INLINE bool is_finite(double value) { return value - value == 0.0; }

template <class X>
GROK_INLINE int64_t sample(const X* logits, int64_t v, float temperature, float top_p, float uniform, Workspace& w) {
  const uint32_t largest = read_keys(logits, v, w.keys.data());
  // greedy; or NaN or infinite logits, which have no distribution
  if (!(temperature > 0.0f) || !is_finite(logit_of(largest))) return first(w.keys.data(), largest);
  const Softmax s{logit_of(largest), 1.0 / static_cast<double>(temperature)};
  sum_by_digit(w.keys.data(), v, 0, s, w.sums);
  double kept = 0.0;
  for (int64_t d = (1 << kBits[0]) - 1; d >= 0; --d) kept += w.sums[d];
  if (!is_finite(kept)) return first(w.keys.data(), largest);
  if (!(top_p >= 1.0f)) kept = find(w, v, s, static_cast<double>(top_p) * kept, true).sum;
  constexpr float kLast = 0.99999994f;  // below 1, so that a target is below what is kept
  return find(w, v, s, static_cast<double>(uniform >= 1.0f ? kLast : uniform) * kept, false).token;
}

// Not inlined, and called before any vector instruction: after a call from within vector code to a function of this
// file that it can see through, GCC 12 leaves out vzeroupper, and all later SSE code pays for the transition.
__attribute__((noinline)) Workspace& workspace(int64_t v) {
  thread_local Workspace w;
  if (static_cast<int64_t>(w.keys.size()) < v) {
    for (auto* list : {&w.keys, &w.left, &w.from}) list->resize(v);
  }
  return w;
}

template <class X>
GROK_INLINE void rows(const SampleTopP& p, int64_t begin, int64_t end) {
  Workspace& w = workspace(p.v);
  for (int64_t row = begin; row < end; ++row) {
    const X* logits = static_cast<const X*>(p.logits) + row * p.logits_stride;
    p.tokens[row] = sample(logits, p.v, p.temperature[row], p.top_p[row], p.uniform[row], w);
  }
}

GROK_ROWS_KERNEL(sample_top_p, rows, SampleTopP)

}  // namespace

void sample_top_p(const SampleTopP& p, Executor& executor) {
  check_float("sample_top_p: logits", p.logits_type);
  const Isa isa = current_isa();
  const auto kernel = p.logits_type == DType::f32 ? sample_top_p_kernel<float>(isa) : sample_top_p_kernel<BF16>(isa);
  const int64_t grain = std::max<int64_t>(1, kElementsPerRange / 4 / p.v);
  executor.parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace grok::cpu
