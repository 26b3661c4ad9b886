// Every op of csrc/cpu on every instruction set of this machine, beside portable's result. Without torch, so that it
// runs where Python does not: compiled for another architecture, under an emulator. Prints a digest of portable's
// results of each op, which must be the same on every architecture.

#include "isa_checks.h"

#include "isa_codes.h"

namespace grok::cpu::checks {
namespace {

constexpr DType kFloats[] = {DType::f32, DType::bf16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::string join(const std::string& op, std::initializer_list<DType> types, const std::string& more = "") {
  std::string text = op;
  for (DType type : types) text += std::string(" ") + name(type);
  return text + (more.empty() ? "" : " " + more);
}

// What the operands of a product hold.
//   integers  every sum is an integer below 2²⁴: exact on every path
//   codes     rows with a single 1, so that the result is the weights: all codes of a type, and one NaN
//   reals     normal numbers
enum class Values { integers, codes, reals };
constexpr const char* kValues[] = {"integers", "codes", "reals"};

// Weights (experts, n, k), in rows or packed. A row's padding in memory is NaN, or the largest code.
struct Matrices {
  Array values, packed;
  std::vector<float> scale;
  Weights weights{};

  Matrices(Random& random, DType type, int64_t experts, int64_t n, int64_t k, int64_t groups, Layout layout,
           Values kind, Executor& executor)
      : values(type, experts * n * (k + 3)), packed(type, experts * n * k), scale(experts * groups * n) {
    const int64_t stride = k + 3, most = type == DType::e4m3 ? 16 : 127;
    values.fill([&](int64_t i) {
      const int64_t column = i % stride, output = i / stride % n;
      if (column >= k) return kNan;
      if (kind == Values::integers) return static_cast<float>(random.integer(type == DType::int8 ? -128 : -most, most));
      if (kind == Values::reals) return random.normal() * (type == DType::int8 ? 40.0f : 1.0f);
      const uint8_t code = static_cast<uint8_t>(output + 64 * column);
      if (type == DType::int8) return static_cast<float>(static_cast<int8_t>(code));
      if (output == 5 && column == 7) return kNan;
      return (code & 0x7f) == 0x7f ? 1.0f : from_e4m3(code);
    });
    for (float& x : scale) x = kind == Values::reals ? 0.5f + random.uniform() : 1.0f;
    weights.type = type;
    weights.layout = layout;
    weights.experts = experts;
    weights.n = n;
    weights.k = k;
    weights.row_stride = stride;
    weights.expert_stride = n * stride;
    weights.data = values.data();
    weights.groups = groups;
    if (size_of(type) == 1) weights.scales = Plane::by_groups(scale.data(), ScaleType::f32, groups, n);
    if (layout == Layout::rows) return;
    PackWeight p{};
    p.w = values.data();
    p.packed = packed.data();
    p.experts = experts;
    p.n = p.packed_n = n;
    p.k = k;
    p.expert_stride = weights.expert_stride;
    p.row_stride = stride;
    p.column_stride = 1;
    p.item = size_of(type);
    pack_weight(p, executor);
    weights.data = packed.data();
  }
};

struct Size {
  int64_t n, k, groups;
  Layout layout;
};

void products(Judge& judge) {
  ThreadPool pool(1);
  const int32_t offsets[] = {0, 0, 13, 20};  // of experts
  const int64_t rows = offsets[3];
  const Size sizes[] = {{67, 75, 1, Layout::rows},         // padded by every path
                        {64, 780, 1, Layout::panels},      // a partial last column block
                        {64, 152, 2, Layout::panels},      // groups that the int8 path does not take
                        {128, 1280, 2, Layout::panels},    // groups that end inside a column block
                        {66, 768, 3, Layout::rows}};
  for (const Size& size : sizes) {
    for (DType xt : {DType::f32, DType::bf16, DType::int8, DType::e4m3}) {
      for (DType wt : {DType::f32, DType::bf16, DType::int8, DType::e4m3}) {
        if (size.layout == Layout::panels && wt == DType::f32) continue;
        if (size.groups > 1 && size_of(wt) > 1) continue;
        for (Values kind : {Values::integers, Values::codes, Values::reals}) {
          if (kind == Values::codes && (size_of(wt) > 1 || size.n != 64)) continue;
          Random random{static_cast<uint64_t>(size.k)};
          Matrices w(random, wt, 3, size.n, size.k, size.groups, size.layout, kind, pool);
          const int64_t stride = size.k + 5, scales = (size.k + kScaleGroup - 1) / kScaleGroup;
          Array x(xt, rows * stride);
          x.fill([&](int64_t i) {
            const int64_t column = i % stride;
            if (column >= size.k) return kNan;
            if (kind == Values::integers) return static_cast<float>(random.integer(-8, 8));
            if (kind == Values::codes) return column == i / stride * 37 % size.k ? 1.0f : 0.0f;
            return random.normal() * (xt == DType::int8 ? 40.0f : 1.0f);
          });
          std::vector<float> scale(rows * scales, 1.0f);
          if (kind == Values::reals) {
            for (float& value : scale) value = 0.5f + random.uniform();
          }
          const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
            int32_t part[4];
            for (int i = 0; i < 4; ++i) part[i] = std::clamp<int32_t>(offsets[i], begin, end) - begin;
            Result y((end - begin) * size.n);
            GroupedGemm p{};
            p.x.data = x.bytes.data() + begin * stride * size_of(xt);
            p.x.type = xt;
            p.x.stride = stride;
            if (size_of(xt) == 1) {
              p.x.scale = scale.data() + begin * scales;
              p.x.groups = scales;
            }
            p.w = w.weights;
            p.offsets = part;
            p.rows = end - begin;
            p.y = y.data();
            p.y_type = DType::f32;
            grouped_gemm(p, executor);
            return y;
          };
          const std::string more = std::string(kValues[static_cast<int>(kind)]) + " k=" + std::to_string(size.k);
          judge.check(join("grouped_gemm", {xt, wt}, more), rows, kind == Values::reals ? 1e-6 : 0, compute);
        }
      }
    }
  }
}

void expert_layers(Judge& judge) {
  ThreadPool pool(1);
  constexpr int64_t kTokens = 9, kDim = 128, kWidth = 192, kExperts = 4, kActive = 2;
  Random random{1};
  std::vector<int32_t> experts(kTokens * kActive);
  std::vector<float> weights(kTokens * kActive);
  for (size_t i = 0; i < experts.size(); ++i) {
    experts[i] = static_cast<int32_t>((i * 5 / 2 + i % 2) % (kExperts - 1));  // the last has no tokens
    weights[i] = random.uniform();
  }
  for (DType type : kFloats) {
    for (DType row_type : {type, DType::int8, DType::e4m3}) {
      for (DType wt : {DType::bf16, DType::int8, DType::e4m3}) {
        const Matrices w13(random, wt, kExperts, 2 * kWidth, kDim, 1, Layout::panels, Values::reals, pool);
        const Matrices w2(random, wt, kExperts, kDim, kWidth, 1, Layout::panels, Values::reals, pool);
        Array x(type, kTokens * kDim);
        x.fill([&](int64_t) { return random.normal() * (wt == DType::int8 ? 0.005f : 0.1f); });
        const bool plain = row_type == type && wt == DType::int8;
        for (Activation activation : {Activation::gelu_tanh, Activation::gelu, Activation::silu}) {
          if (activation != Activation::gelu_tanh && !plain) continue;
          const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
            Array y(type, (end - begin) * kDim);
            Moe p{};
            p.x = x.bytes.data() + begin * kDim * size_of(type);
            p.x_type = type;
            p.x_stride = kDim;
            p.tokens = end - begin;
            p.active = kActive;
            p.experts = experts.data() + begin * kActive;
            p.weights = weights.data() + begin * kActive;
            p.w13 = w13.weights;
            p.w2 = w2.weights;
            p.activation = activation;
            p.row_type = row_type;
            p.y = y.data();
            moe(p, executor);
            Result result(y.bytes.size() / size_of(type));
            for (size_t i = 0; i < result.size(); ++i) result[i] = y.get(i);
            return result;
          };
          // what is rounded between the products may round to the neighbour
          const double tolerance = row_type == DType::e4m3   ? 1e-2
                                   : row_type == DType::int8 ? 5e-3
                                   : type == DType::bf16     ? 3e-3
                                                             : 2e-6;
          const std::string more = "activation " + std::to_string(static_cast<int>(activation));
          judge.check(join("moe", {type, row_type, wt}, more), kTokens, tolerance, compute);
        }
      }
    }
  }
}

// Three requests over pages whose other slots, and all pages of nobody, are NaN.
void attention(Judge& judge) {
  constexpr int64_t kHeads = 4, kGroups = 2, kPage = 16, kPages = 64, kColumns = 40;
  const int64_t queries[] = {9, 1, 5}, lengths[] = {9, 530, 70}, tokens = 15;
  struct Variant {
    int64_t head_size;
    float softcap;
    int64_t window, temperature_len;
  };
  for (const Variant& v : {Variant{64, 0, 0, 0}, Variant{40, 30, 0, 64}, Variant{64, 0, 20, 0}}) {
    for (DType qt : kFloats) {
      for (DType kt : {DType::f32, DType::bf16, DType::e4m3}) {
        Random random{7};
        const int64_t c = v.head_size, slots = kPages * kGroups * kPage;
        Array q(qt, tokens * kHeads * c), k(kt, slots * c), values(kt, slots * c);
        std::vector<float> k_scale(slots, kNan), v_scale(slots, kNan);
        q.fill([&](int64_t) { return random.normal(); });
        k.fill([](int64_t) { return kNan; });
        values.fill([](int64_t) { return kNan; });
        std::vector<int32_t> table(3 * kColumns, -1);
        int32_t page = 1;
        for (int64_t b = 0; b < 3; ++b) {
          for (int64_t at = 0; at < lengths[b]; ++at) {
            if (at % kPage == 0) table[b * kColumns + at / kPage] = page++;
            for (int64_t g = 0; g < kGroups; ++g) {
              const int64_t slot = ((page - 1) * kGroups + g) * kPage + at % kPage;
              for (int64_t i = 0; i < c; ++i) {
                k.set(slot * c + i, random.normal());
                values.set(slot * c + i, random.normal());
              }
              k_scale[slot] = 0.5f + random.uniform();
              v_scale[slot] = 0.5f + random.uniform();
            }
          }
        }
        const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
          std::vector<int32_t> start(4), seq(3);
          for (int64_t b = 0, at = 0; b < 3; at += queries[b++]) {
            const int64_t last = std::clamp(end - at, int64_t{0}, queries[b]);
            const int64_t first = std::clamp(begin - at, int64_t{0}, last);
            seq[b] = static_cast<int32_t>(lengths[b] - queries[b] + last);
            start[b + 1] = static_cast<int32_t>(start[b] + last - first);
          }
          Array out(qt, (end - begin) * kHeads * c);
          PagedAttention p{};
          p.q = q.bytes.data() + begin * kHeads * c * size_of(qt);
          p.q_type = qt;
          p.q_token_stride = kHeads * c;
          p.q_head_stride = c;
          p.keys.data = k.data();
          p.values.data = values.data();
          for (KvPages* pages : {&p.keys, &p.values}) {
            pages->page_stride = kGroups * kPage * c;
            pages->group_stride = kPage * c;
            pages->slot_stride = c;
            pages->scale_page_stride = kGroups * kPage;
            pages->scale_group_stride = kPage;
          }
          if (kt == DType::e4m3) {
            p.keys.scale = k_scale.data();
            p.values.scale = v_scale.data();
          }
          p.kv_type = kt;
          p.block_table = table.data();
          p.table_stride = p.table_columns = kColumns;
          p.query_start = start.data();
          p.seq_lens = seq.data();
          p.out = out.data();
          p.tokens = end - begin;
          p.requests = 3;
          p.pages = kPages;
          p.heads = kHeads;
          p.groups = kGroups;
          p.head_size = c;
          p.page_size = kPage;
          p.scale = 0.125f;
          p.softcap = v.softcap;
          p.window = v.window;
          p.temperature_len = v.temperature_len;
          paged_attention(p, executor);
          Result result(out.bytes.size() / size_of(qt));
          for (size_t i = 0; i < result.size(); ++i) result[i] = out.get(i);
          return result;
        };
        const std::string more = "C=" + std::to_string(c) + " window=" + std::to_string(v.window);
        judge.check(join("paged_attention", {qt, kt}, more), tokens, qt == DType::f32 ? 2e-6 : 2e-3, compute);
      }
    }
  }
}

// The ops whose bits do not depend on the instruction set.
void norms(Judge& judge) {
  constexpr int64_t kRows = 5;
  Random random{3};
  for (int64_t d : {1, 37, 96}) {
    for (DType type : kFloats) {
      for (DType weight_type : kFloats) {
        Array x(type, kRows * d), delta(type, kRows * d), weight(weight_type, d);
        for (Array* array : {&x, &delta, &weight}) array->fill([&](int64_t) { return random.normal(); });
        const auto rms = [&](Executor& executor, int64_t begin, int64_t end) {
          Array y(type, (end - begin) * d);
          RmsNorm p{};
          p.x = x.bytes.data() + begin * d * size_of(type);
          p.weight = weight.data();
          p.y = y.data();
          p.x_type = type;
          p.weight_type = weight_type;
          p.x_stride = p.d = d;
          p.rows = end - begin;
          p.eps = 1e-5f;
          rms_norm(p, executor);
          Result result((end - begin) * d);
          for (size_t i = 0; i < result.size(); ++i) result[i] = y.get(i);
          return result;
        };
        judge.check(join("rms_norm", {type, weight_type}, std::to_string(d)), kRows, 0, rms);
        const auto sandwich = [&](Executor& executor, int64_t begin, int64_t end) {
          Array sum(type, (end - begin) * d), y(type, (end - begin) * d);
          SandwichNorm p{};
          p.h = x.bytes.data() + begin * d * size_of(type);
          p.delta = delta.bytes.data() + begin * d * size_of(type);
          p.post_weight = p.pre_weight = weight.data();
          p.sum = sum.data();
          p.y = y.data();
          p.type = type;
          p.post_type = p.pre_type = weight_type;
          p.h_stride = p.delta_stride = p.d = d;
          p.rows = end - begin;
          p.eps = 1e-5f;
          sandwich_norm(p, executor);
          Result result;
          for (int64_t i = 0; i < (end - begin) * d; ++i) {
            result.push_back(sum.get(i));
            result.push_back(y.get(i));
          }
          return result;
        };
        judge.check(join("sandwich_norm", {type, weight_type}, std::to_string(d)), kRows, 0, sandwich);
      }
    }
  }
}

void quantisation(Judge& judge) {
  constexpr int64_t kRows = 5, kColumns = 300, kGroup = 128, kCount = 3;
  Random random{4};
  for (DType type : kFloats) {
    for (DType q_type : {DType::int8, DType::e4m3}) {
      Array x(type, kRows * kColumns);
      x.fill([&](int64_t i) { return i < kGroup ? 0.0f : i == 2 * kColumns ? kNan : random.normal() * 3.0f; });
      judge.check(join("quantize_rows", {type, q_type}), kRows, 0, [&](Executor& executor, int64_t begin, int64_t end) {
        Array q(q_type, (end - begin) * kColumns);
        std::vector<float> scale((end - begin) * kCount);
        QuantizeRows p{};
        p.x = x.bytes.data() + begin * kColumns * size_of(type);
        p.x_type = type;
        p.q_type = q_type;
        p.x_stride = p.d = kColumns;
        p.rows = end - begin;
        p.group = kGroup;
        p.groups = kCount;
        p.q = q.data();
        p.scale = scale.data();
        quantize_rows(p, executor);
        Result result;
        for (int64_t r = 0; r < end - begin; ++r) {
          for (int64_t i = 0; i < kColumns; ++i) result.push_back(q.get(r * kColumns + i));
          result.insert(result.end(), scale.begin() + r * kCount, scale.begin() + (r + 1) * kCount);
        }
        return result;
      });
    }
  }
}

void rotation(Judge& judge) {
  constexpr int64_t kTokens = 6, kHeads = 2, kGroups = 1, kSize = 36, kPage = 4;
  Random random{5};
  std::vector<float> cos_sin(kTokens * kSize);
  for (float& value : cos_sin) value = random.uniform() * 2.0f - 1.0f;
  for (DType type : kFloats) {
    for (DType kt : {DType::f32, DType::bf16, DType::e4m3}) {
      Array q(type, kTokens * kHeads * kSize), k(type, kTokens * kSize), v(type, kTokens * kSize);
      for (Array* array : {&q, &k, &v}) array->fill([&](int64_t) { return random.normal(); });
      const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
        const int64_t count = end - begin, slots = (count + kPage - 1) / kPage * kPage;
        Array out(type, count * kHeads * kSize), k_pages(kt, slots * kSize), v_pages(kt, slots * kSize);
        std::vector<float> k_scale(slots), v_scale(slots);
        std::vector<int32_t> positions(count), at(count);
        for (int64_t i = 0; i < count; ++i) {
          positions[i] = static_cast<int32_t>(kTokens - 1 - begin - i);
          at[i] = static_cast<int32_t>(i);
        }
        const int64_t first = begin * kSize * size_of(type);
        RopeStoreKv p{};
        p.q = {q.bytes.data() + first * kHeads, kHeads, kHeads * kSize, kSize};
        p.k = {k.bytes.data() + first, kGroups, kSize, kSize};
        p.v = {v.bytes.data() + first, kGroups, kSize, kSize};
        p.out = out.data();
        p.k_pages = {k_pages.data(), k_scale.data(), kPage * kSize, kPage * kSize, kSize, kPage, kPage};
        p.v_pages = {v_pages.data(), v_scale.data(), kPage * kSize, kPage * kSize, kSize, kPage, kPage};
        if (kt != DType::e4m3) p.k_pages.scale = p.v_pages.scale = nullptr;
        p.type = type;
        p.kv_type = kt;
        p.positions = positions.data();
        p.slots = at.data();
        p.cos_sin = cos_sin.data();
        p.cos_sin_stride = p.head_size = kSize;
        p.tokens = count;
        p.page_size = kPage;
        rope_store_kv(p, executor);
        Result result;
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t i = 0; i < kHeads * kSize; ++i) result.push_back(out.get(t * kHeads * kSize + i));
          for (int64_t i = t * kSize; i < (t + 1) * kSize; ++i) {
            result.push_back(k_pages.get(i));
            result.push_back(v_pages.get(i));
          }
          result.push_back(k_scale[t] + v_scale[t]);
        }
        return result;
      };
      judge.check(join("rope_store_kv", {type, kt}), kTokens, 0, compute);
    }
  }
}

void routing(Judge& judge) {
  constexpr int64_t kRows = 7, kColumns = 83, kActive = 2;
  Random random{6};
  for (DType type : kFloats) {
    for (int64_t experts : {8, 11}) {
      Array x(type, kRows * kColumns), router(DType::f32, experts * kColumns);
      x.fill([&](int64_t) { return random.normal(); });
      router.fill([&](int64_t) { return random.normal() * 0.2f; });
      const auto compute = [&](Executor& executor, int64_t begin, int64_t end) {
        std::vector<float> weights((end - begin) * kActive);
        std::vector<int32_t> chosen(weights.size());
        RouteTopk p{};
        p.x = x.bytes.data() + begin * kColumns * size_of(type);
        p.x_type = type;
        p.router = static_cast<const float*>(router.data());
        p.weights = weights.data();
        p.experts = chosen.data();
        p.x_stride = p.router_stride = p.d = kColumns;
        p.rows = end - begin;
        p.e = experts;
        p.k = kActive;
        p.softcap = experts == 8 ? 30.0f : 0.0f;
        p.renormalize = experts == 11;
        route_topk(p, executor);
        Result result;
        for (size_t i = 0; i < weights.size(); ++i) {
          result.push_back(weights[i]);
          result.push_back(static_cast<float>(chosen[i]));
        }
        return result;
      };
      judge.check(join("route_topk", {type}, std::to_string(experts)), kRows, 0, compute);
    }
  }
}

void sampling(Judge& judge) {
  constexpr int64_t kRows = 12, kTokens = 999;
  Random random{8};
  std::vector<float> temperature(kRows), top_p(kRows), uniform(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    temperature[i] = i == 0 ? 0.0f : 0.3f + random.uniform();
    top_p[i] = i % 3 ? random.uniform() : 1.0f;
    uniform[i] = random.uniform();
  }
  for (DType type : kFloats) {
    Array logits(type, kRows * kTokens);
    logits.fill([&](int64_t) { return random.normal() * 4.0f; });
    judge.check(join("sample_top_p", {type}), kRows, 0, [&](Executor& executor, int64_t begin, int64_t end) {
      std::vector<int64_t> tokens(end - begin);
      SampleTopP p{};
      p.logits = logits.bytes.data() + begin * kTokens * size_of(type);
      p.logits_type = type;
      p.logits_stride = p.v = kTokens;
      p.temperature = temperature.data() + begin;
      p.top_p = top_p.data() + begin;
      p.uniform = uniform.data() + begin;
      p.tokens = tokens.data();
      p.rows = end - begin;
      sample_top_p(p, executor);
      return Result(tokens.begin(), tokens.end());
    });
  }
}

}  // namespace
}  // namespace grok::cpu::checks

int main() {
  using namespace grok::cpu::checks;
  Judge judge;
  products_of_codes(judge);
  for (auto* op : {products, expert_layers, attention, norms, quantisation, rotation, routing, sampling}) op(judge);
  judge.report();
  return judge.failures ? 1 : 0;
}
