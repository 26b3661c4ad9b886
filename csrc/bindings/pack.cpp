#include "cpu/gemm/pack_weight.h"

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
  check(weight.device().is_cpu() && packed.device().is_cpu(), op, ": weight is on ", weight.device(), ", packed on ",
        packed.device(), ", expected cpu");
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
  check(row >= 0 && row % kPanel == 0 && n % kPanel == 0 && row + n <= panels * kPanel, op, ": rows ", row, "..",
        row + n, ", expected multiples of 64 within 0..", panels * kPanel);
  cpu::PackWeight p{};
  p.w = weight.const_data_ptr();
  p.packed = packed.mutable_data_ptr();
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
  check(packed.device().is_cpu() && rows.device().is_cpu(), op, ": packed is on ", packed.device(), ", rows on ",
        rows.device(), ", expected cpu");
  check(packed.dim() == kPackedDims && packed.is_contiguous() && packed.size(0) == 1 &&
            packed.size(3) * packed.size(4) == kPanel && packed.size(5) * packed.element_size() == 4,
        op, ": packed has shape ", packed.sizes(), ", expected what pack_weight returns for one matrix");
  check(rows.dim() == 1 && rows.scalar_type() == at::kInt && rows.is_contiguous(), op, ": rows has shape ",
        rows.sizes(), " and dtype ", c10::toString(rows.scalar_type()), ", expected (R,) of Int, contiguous");
  const int64_t item = packed.element_size(), n = packed.size(1) * kPanel, k = packed.size(2) * packed.size(5);
  const int32_t* row = rows.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    check(row[i] >= 0 && row[i] < n, op, ": row ", row[i], " is not in 0..", n - 1);
  }
  at::Tensor out = empty({rows.size(0), k}, packed.scalar_type());
  cpu::UnpackRows p{};
  p.packed = packed.const_data_ptr();
  p.rows = row;
  p.out = out.mutable_data_ptr();
  p.count = rows.size(0);
  p.k = k;
  p.item = item;
  cpu::unpack_rows(p, executor());
  return out;
}

}  // namespace

void define_pack(pybind11::module_& module) {
  define_native_op(module, "pack_into", pack_into);
  define_native_op(module, "packed_rows", packed_rows);
}

}  // namespace grok
