#include "cpu/gemm/pack_weight.h"

#include <vector>

#include "bindings.h"
#include "cpu/gemm/layout.h"
#include "native_op.h"

namespace grok {
namespace {

using cpu::kPanel;

constexpr int64_t kPackedDims = 6;

// Writes weight (E, N, K), of any strides, to the rows row .. row + N − 1 of a packed weight.
void pack_into(const at::Tensor& weight, const at::Tensor& packed, int64_t row) {
  const char* op = "pack_into";
  check_memory(op, "weight", weight);
  check_memory(op, "packed", packed);
  check(weight.dim() == 3, op, ": weight has shape ", weight.sizes(), ", expected 3 dimensions");
  check(packed.dim() == kPackedDims && packed.is_contiguous(), op, ": packed has shape ", packed.sizes(),
        ", expected what pack_weight returns");
  const int64_t item = weight.element_size(), run = item == 1 || item == 2 ? 4 / item : 0;
  check(weight.scalar_type() == packed.scalar_type() && run, op, ": weight has dtype ",
        c10::toString(weight.scalar_type()), ", packed ", c10::toString(packed.scalar_type()),
        ", expected one of 8 or 16 bits for both");
  const int64_t experts = weight.size(0), n = weight.size(1), k = weight.size(2), panels = packed.size(1);
  check(packed.size(0) == experts && packed.size(2) * run == k && packed.size(3) * packed.size(4) == kPanel &&
            packed.size(5) == run,
        op, ": packed has shape ", packed.sizes(), " and does not hold rows of weight ", weight.sizes());
  check(row >= 0 && row % kPanel == 0 && n % kPanel == 0 && row <= panels * kPanel - n, op, ": row=", row, " for ",
        n, " rows, expected multiples of 64 within 0..", panels * kPanel);
  cpu::PackWeight p{};
  p.packed = packed.mutable_data_ptr();
  p.w = weight.const_data_ptr();
  check_apart(op, {{"packed", &packed}, {"weight", &weight}}, 1);
  p.experts = experts;
  p.n = n;
  p.k = k;
  p.expert_stride = weight.stride(0);
  p.row_stride = weight.stride(1);
  p.column_stride = weight.stride(2);
  p.packed_n = panels * kPanel;
  p.first_row = row;
  p.item = item;
  cpu::pack_weight(p, executor());
}

// Rows (R,) of the one matrix of a packed weight.
at::Tensor packed_rows(const at::Tensor& packed, const at::Tensor& rows) {
  const char* op = "packed_rows";
  check_memory(op, "packed", packed);
  check(packed.dim() == kPackedDims && packed.is_contiguous() && packed.size(0) == 1 &&
            packed.size(3) * packed.size(4) == kPanel && packed.size(5) * packed.element_size() == 4,
        op, ": packed has shape ", packed.sizes(), ", expected what pack_weight returns for one matrix");
  const std::vector<int32_t> row = copy_indices(op, "rows", rows, 1);
  const int64_t item = packed.element_size(), n = packed.size(1) * kPanel, k = packed.size(2) * packed.size(5);
  for (const int32_t i : row) check(i >= 0 && i < n, op, ": row ", i, " is not in 0..", n - 1);
  const int64_t count = static_cast<int64_t>(row.size());
  at::Tensor out = empty({count, k}, packed.scalar_type());
  cpu::UnpackRows p{};
  p.packed = packed.const_data_ptr();
  p.rows = row.data();
  p.out = out.mutable_data_ptr();
  p.count = count;
  p.k = k;
  p.item = item;
  cpu::unpack_rows(p, executor());
  return out;
}

}  // namespace

void define_pack(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "pack_into", pack_into, arg("weight"), arg("packed"), arg("row"));
  define_native_op(module, "packed_rows", packed_rows, arg("packed"), arg("rows"));
}

}  // namespace grok
