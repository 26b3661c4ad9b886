#include "cpu/route.h"

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/math.h"

namespace grok::cpu {
namespace {

// The terms of a dot product are added into 16 running sums, and these pairwise: one order of the additions for every
// instruction set and number of tokens. Multiplication and addition round apart, since not every instruction set
// fuses them.
constexpr int64_t kLanes = 16;
// Tokens and experts multiplied at a time, so that each load is used several times: the router comes from L2.
constexpr int64_t kTokens = 2, kExperts = 8;

// logits[t][e] = x[t] · router[e] for M tokens and N experts.
template <int64_t M, int64_t N, class X>
GROK_INLINE void products(const RouteTopk& p, int64_t token, int64_t expert, float* __restrict logits) {
  const X* __restrict x = static_cast<const X*>(p.x) + token * p.x_stride;
  const float* __restrict router = p.router + expert * p.router_stride;
  const int64_t x_stride = p.x_stride, stride = p.router_stride, d = p.d;
  float sums[M][N][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    for (int64_t t = 0; t < M; ++t) {
      for (int64_t e = 0; e < N; ++e) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          sums[t][e][lane] += to_float(x[t * x_stride + i + lane]) * router[e * stride + i + lane];
        }
      }
    }
  }
  for (int64_t t = 0; t < M; ++t) {
    for (int64_t e = 0; e < N; ++e) {
      float* sum = sums[t][e];
      for (int64_t lane = 0; i + lane < d; ++lane) {
        sum[lane] += to_float(x[t * x_stride + i + lane]) * router[e * stride + i + lane];
      }
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
      }
      logits[t * p.e + expert + e] = sum[0];
    }
  }
}

template <int64_t M, class X>
GROK_INLINE void all_products(const RouteTopk& p, int64_t token, float* logits) {
  int64_t e = 0;
  for (; e + kExperts <= p.e; e += kExperts) products<M, kExperts, X>(p, token, e, logits);
  for (; e < p.e; ++e) products<M, 1, X>(p, token, e, logits);
}

GROK_INLINE void softmax(float* p, int64_t n) {
  float largest = p[0];
  for (int64_t i = 1; i < n; ++i) largest = p[i] > largest ? p[i] : largest;
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) p[i] = exp_f(p[i] - largest);
  for (int64_t i = 0; i < n; ++i) sum += p[i];
  for (int64_t i = 0; i < n; ++i) p[i] /= sum;  // all NaN if one logit is NaN or +inf
}

// Takes the k largest, overwriting them in p. Either all of p is NaN or none: then it takes the first k.
GROK_INLINE void take_largest(float* p, int64_t n, int64_t k, float* weights, int32_t* experts) {
  constexpr float kTaken = -1.0f;
  for (int64_t a = 0; a < k; ++a) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (p[e] != kTaken && (best < 0 || p[e] > p[best])) best = e;
    }
    weights[a] = p[best];
    experts[a] = static_cast<int32_t>(best);
    p[best] = kTaken;
  }
}

// Not inlined, and called before any vector instruction, for the reason in sample.cpp.
__attribute__((noinline)) float* workspace(int64_t n) {
  thread_local std::vector<float> logits;
  if (static_cast<int64_t>(logits.size()) < n) logits.resize(n);
  return logits.data();
}

GROK_INLINE void choose(const RouteTopk& p, int64_t row, float* logits) {
  if (p.softcap > 0.0f) {
    for (int64_t e = 0; e < p.e; ++e) logits[e] = p.softcap * tanh_f(logits[e] / p.softcap);
  }
  softmax(logits, p.e);
  float* weights = p.weights + row * p.k;
  take_largest(logits, p.e, p.k, weights, p.experts + row * p.k);
  if (!p.renormalize) return;
  float sum = 0.0f;
  for (int64_t a = 0; a < p.k; ++a) sum += weights[a];
  for (int64_t a = 0; a < p.k; ++a) weights[a] /= sum;
}

template <class X>
GROK_INLINE void rows(const RouteTopk& p, int64_t begin, int64_t end) {
  float* logits = workspace(kTokens * p.e);
  for (int64_t row = begin; row < end;) {
    const int64_t count = row + kTokens <= end ? kTokens : 1;
    if (count == kTokens) {
      all_products<kTokens, X>(p, row, logits);
    } else {
      all_products<1, X>(p, row, logits);
    }
    for (int64_t t = 0; t < count; ++t) choose(p, row + t, logits + t * p.e);
    row += count;
  }
}

GROK_ROWS_KERNEL(route_topk, rows, RouteTopk)

}  // namespace

void route_topk(const RouteTopk& p, Executor& executor) {
  check_float("route_topk: x", p.x_type);
  const Isa isa = current_isa();
  const auto kernel = p.x_type == DType::f32 ? route_topk_kernel<float>(isa) : route_topk_kernel<BF16>(isa);
  const int64_t grain = std::max<int64_t>(1, 8 * kElementsPerRange / std::max<int64_t>(1, p.e * p.d));
  executor.parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void group_tokens(const GroupTokens& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t a = 0; a < p.a; ++a) {
      const int32_t e = p.experts[row * p.stride + a];
      check(e >= 0 && e < p.num_experts, "group_tokens: experts[", row, ", ", a, "]=", e,
            ", expected 0..num_experts-1=", p.num_experts - 1);
    }
  }
  // Counts are kept one place to the right, so that after the prefix sum offsets[e] is where expert e begins. Placing
  // a slot advances it, and leaves it where expert e + 1 begins: the entries are shifted back at the end.
  std::fill(p.offsets, p.offsets + p.num_experts + 1, 0);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t a = 0; a < p.a; ++a) ++p.offsets[p.experts[row * p.stride + a] + 1];
  }
  for (int64_t e = 0; e < p.num_experts; ++e) p.offsets[e + 1] += p.offsets[e];
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t a = 0; a < p.a; ++a) {
      p.order[p.offsets[p.experts[row * p.stride + a]]++] = static_cast<int32_t>(row * p.a + a);
    }
  }
  std::copy_backward(p.offsets, p.offsets + p.num_experts, p.offsets + p.num_experts + 1);
  p.offsets[0] = 0;
}

}  // namespace grok::cpu
