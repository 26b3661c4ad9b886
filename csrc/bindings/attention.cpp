#include "cpu/attention/attention.h"

#include <cstring>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/rope.h"
#include "native_op.h"

namespace grok {
namespace {

std::vector<int32_t> copy_vector(const char* op, const char* name, const at::Tensor& tensor, const char* symbol,
                                 int64_t size) {
  std::vector<int32_t> copy = copy_indices(op, name, tensor, 1);
  check_size(op, name, tensor, 0, symbol, size);
  return copy;
}

DType kv_type(const char* op, const at::Tensor& cache) {
  if (cache.scalar_type() == at::kFloat) return DType::f32;
  if (cache.scalar_type() == at::kBFloat16) return DType::bf16;
  check(cache.scalar_type() == at::kFloat8_e4m3fn, op, ": k_cache has dtype ", c10::toString(cache.scalar_type()),
        ", expected Float, BFloat16 or Float8_e4m3fn");
  return DType::e4m3;
}

// The pages of a cache; `like` is the other cache, whose shape and dtype this one must have.
cpu::KvPages kv_pages(const char* op, const char* name, const at::Tensor& cache, const at::Tensor& like,
                      const char* scale_name, const OptionalTensor& scale, bool written) {
  check_tensor(op, name, cache, 4);
  check_dtype(op, name, cache, like.scalar_type());
  check(cache.sizes() == like.sizes(), op, ": ", name, " has shape ", cache.sizes(), ", expected ", like.sizes());
  cpu::KvPages pages{};
  pages.data = written ? cache.mutable_data_ptr() : const_cast<void*>(cache.const_data_ptr());
  pages.page_stride = cache.stride(0);
  pages.group_stride = cache.stride(1);
  pages.slot_stride = cache.stride(2);
  const bool scaled = cache.scalar_type() == at::kFloat8_e4m3fn;
  check(scaled == scale.has_value(), op, ": ", scale_name, scaled ? " is None" : " is given", " for a cache of ",
        c10::toString(cache.scalar_type()));
  if (written) check_written(op, name, cache);
  if (!scaled) return pages;
  check_tensor(op, scale_name, *scale, 3);
  check_dtype(op, scale_name, *scale, at::kFloat);
  check(scale->sizes() == cache.sizes().slice(0, 3), op, ": ", scale_name, " has shape ", scale->sizes(),
        ", expected ", cache.sizes().slice(0, 3));
  if (written) check_written(op, scale_name, *scale);
  pages.scale = written ? scale->mutable_data_ptr<float>() : const_cast<float*>(scale->const_data_ptr<float>());
  pages.scale_page_stride = scale->stride(0);
  pages.scale_group_stride = scale->stride(1);
  return pages;
}

cpu::Heads heads(const char* op, const char* name, const at::Tensor& x, const at::Tensor& q) {
  check_tensor(op, name, x, 3);
  check_dtype(op, name, x, q.scalar_type());
  check_size(op, name, x, 0, "T", q.size(0));
  check_size(op, name, x, 2, "C", q.size(2));
  return {x.const_data_ptr(), x.size(1), x.stride(0), x.stride(1)};
}

at::Tensor rope_store_kv(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache,
                         at::Tensor v_cache, const at::Tensor& positions, const at::Tensor& slots,
                         const at::Tensor& cos_sin, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const char* op = "rope_store_kv";
  check_tensor(op, "q", q, 3);
  cpu::RopeStoreKv p{};
  p.type = float_dtype(op, "q", q);
  p.kv_type = kv_type(op, k_cache);
  p.tokens = q.size(0);
  p.q = heads(op, "q", q, q);
  p.k = heads(op, "k", k, q);
  p.v = heads(op, "v", v, q);
  p.k_pages = kv_pages(op, "k_cache", k_cache, k_cache, "k_scale", k_scale, true);
  p.v_pages = kv_pages(op, "v_cache", v_cache, k_cache, "v_scale", v_scale, true);
  p.head_size = q.size(2);
  p.page_size = k_cache.size(2);
  check(p.head_size % 2 == 0, op, ": q has shape ", q.sizes(), ", expected an even head size");
  check_size(op, "v", v, 1, "G", p.k.count);
  check_size(op, "k_cache", k_cache, 1, "G", p.k.count);
  check_size(op, "k_cache", k_cache, 3, "C", p.head_size);
  check_tensor(op, "cos_sin", cos_sin, 2);
  check_dtype(op, "cos_sin", cos_sin, at::kFloat);
  check_size(op, "cos_sin", cos_sin, 1, "C", p.head_size);
  p.cos_sin = cos_sin.const_data_ptr<float>();
  p.cos_sin_stride = cos_sin.stride(0);
  const int64_t count = q.size(0), length = cos_sin.size(0), places = k_cache.size(0) * p.page_size;
  const auto positions_T = copy_vector(op, "positions", positions, "T", count);
  const auto slots_T = copy_vector(op, "slots", slots, "T", count);
  p.positions = positions_T.data();
  p.slots = slots_T.data();
  for (int64_t t = 0; t < count; ++t) {
    check(p.positions[t] >= 0 && p.positions[t] < length, op, ": positions[", t, "] is ", p.positions[t],
          ", expected 0 or more and less than L=", length, " of cos_sin");
    check(p.slots[t] >= -1 && p.slots[t] < places, op, ": slots[", t, "] is ", p.slots[t],
          ", expected -1 or more and less than P*S=", places, " of k_cache");
  }
  check_apart(op,
              {{"k_cache", &k_cache}, {"v_cache", &v_cache}, {"k_scale", k_scale ? &*k_scale : nullptr},
               {"v_scale", v_scale ? &*v_scale : nullptr}, {"q", &q}, {"k", &k}, {"v", &v}, {"cos_sin", &cos_sin}},
              4);
  at::Tensor out = empty(q.sizes(), q.scalar_type());
  p.out = out.mutable_data_ptr();
  cpu::rope_store_kv(p, executor());
  return out;
}

// The columns of a block table that its requests read.
struct BlockTable {
  std::vector<int32_t> pages;  // (B, columns)
  int64_t columns = 0;
};

BlockTable copy_table(const at::Tensor& table, const std::vector<int32_t>& lengths, int64_t page_size) {
  BlockTable copy;
  for (const int64_t length : lengths) copy.columns = std::max(copy.columns, (length - 1) / page_size + 1);
  copy.columns = std::min(copy.columns, table.size(1));
  copy.pages.resize(lengths.size() * copy.columns);
  for (size_t b = 0; copy.columns && b < lengths.size(); ++b) {
    std::memcpy(copy.pages.data() + b * copy.columns, table.const_data_ptr<int32_t>() + b * table.stride(0),
                copy.columns * sizeof(int32_t));
  }
  return copy;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_table, const at::Tensor& query_start, const at::Tensor& seq_lens,
                           int64_t, double scale, double softcap, int64_t window, int64_t temperature_len,
                           const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const char* op = "paged_attention";
  check_tensor(op, "q", q, 3);
  check_tensor(op, "block_table", block_table, 2);
  check_dtype(op, "block_table", block_table, at::kInt);
  cpu::PagedAttention p{};
  p.q_type = float_dtype(op, "q", q);
  p.kv_type = kv_type(op, k_cache);
  p.keys = kv_pages(op, "k_cache", k_cache, k_cache, "k_scale", k_scale, false);
  p.values = kv_pages(op, "v_cache", v_cache, k_cache, "v_scale", v_scale, false);
  p.requests = block_table.size(0);
  p.heads = q.size(1);
  p.head_size = q.size(2);
  p.groups = k_cache.size(1);
  p.page_size = k_cache.size(2);
  check_size(op, "k_cache", k_cache, 3, "C", p.head_size);
  check(p.groups > 0 && p.heads % p.groups == 0, op, ": q has H=", p.heads,
        " heads, expected a multiple of the cache's G=", p.groups);
  check(window >= 0 && temperature_len >= 0, op, ": window=", window, " and temperature_len=", temperature_len,
        ", expected 0 or more");
  const auto starts = copy_vector(op, "query_start", query_start, "B + 1", p.requests + 1);
  const auto lengths = copy_vector(op, "seq_lens", seq_lens, "B", p.requests);
  const BlockTable table = copy_table(block_table, lengths, std::max<int64_t>(1, p.page_size));
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.block_table = table.pages.data();
  p.table_stride = table.columns;
  p.query_start = starts.data();
  p.seq_lens = lengths.data();
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = window;
  p.temperature_len = temperature_len;
  p.tokens = q.size(0);
  p.pages = k_cache.size(0);
  p.table_columns = block_table.size(1);
  at::Tensor out = empty(q.sizes(), q.scalar_type());
  p.out = out.mutable_data_ptr();
  cpu::paged_attention(p, executor());
  return out;
}

}  // namespace

void define_attention(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "rope_store_kv", rope_store_kv, arg("q"), arg("k"), arg("v"), arg("k_cache"), arg("v_cache"),
                   arg("positions"), arg("slots"), arg("cos_sin"), arg("k_scale"), arg("v_scale"));
  define_native_op(module, "paged_attention", paged_attention, arg("q"), arg("k_cache"), arg("v_cache"),
                   arg("block_table"), arg("query_start"), arg("seq_lens"), arg("max_query_len"), arg("scale"),
                   arg("softcap"), arg("window"), arg("temperature_len"), arg("k_scale"), arg("v_scale"));
}

}  // namespace grok
