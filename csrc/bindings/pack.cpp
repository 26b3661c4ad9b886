#include "cpu/gemm/pack_codes.h"
#include "cpu/gemm/pack_weight.h"

#include <vector>

#include "bindings.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/gather_rows.h"
#include "native_op.h"
#include "weight.h"

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

// The bits of codes in panels; ValueError for another tensor.
int bits_of(const char* op, const at::Tensor& packed) {
  check_memory(op, "packed", packed);
  check_dtype(op, "packed", packed, at::kByte);
  check(packed.dim() == kPackedDims && packed.is_contiguous() && packed.size(3) >= 4 && packed.size(3) <= 6 &&
            packed.size(4) == kPanel && packed.size(5) == 4,
        op, ": packed has shape ", packed.sizes(), ", expected (E, N / 64, K / 32, bits, 64, 4) with 4, 5 or 6 bits");
  return static_cast<int>(packed.size(3));
}

int checked_zero_point(const char* op, int64_t zero_point, int bits) {
  check(zero_point == 0 || zero_point == int64_t{1} << (bits - 1), op, ": zero_point=", zero_point, ", expected 0 or ",
        1 << (bits - 1), " for ", bits, " bits");
  return static_cast<int>(zero_point);
}

// Writes values (E, N, K) int8, of any strides, as codes values + zero_point, to rows row .. row + N − 1 of codes in
// panels.
void pack_codes(const at::Tensor& values, const at::Tensor& packed, int64_t row, int64_t zero_point) {
  const char* op = "pack_codes";
  check_memory(op, "values", values);
  check_dtype(op, "values", values, at::kChar);
  cpu::PackCodes p{};
  p.bits = bits_of(op, packed);
  p.zero_point = checked_zero_point(op, zero_point, p.bits);
  check(values.dim() == 3 && packed.size(0) == values.size(0) && packed.size(2) * cpu::kCodeColumns == values.size(2),
        op, ": packed has shape ", packed.sizes(), " and does not hold rows of values ", values.sizes());
  p.experts = values.size(0);
  p.n = values.size(1);
  p.k = values.size(2);
  p.packed_n = packed.size(1) * kPanel;
  check(row >= 0 && row % kPanel == 0 && p.n % kPanel == 0 && row <= p.packed_n - p.n, op, ": row=", row, " for ",
        p.n, " rows, expected multiples of 64 within 0..", p.packed_n);
  check_apart(op, {{"packed", &packed}, {"values", &values}}, 1);
  p.values = static_cast<const int8_t*>(values.const_data_ptr());
  p.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  p.expert_stride = values.stride(0);
  p.row_stride = values.stride(1);
  p.column_stride = values.stride(2);
  p.first_row = row;
  cpu::pack_codes(p, executor());
}

// Rows (R,) of the one matrix of a weight, dequantised, times multiplier, in fp32, rounded to out_dtype.
at::Tensor weight_rows(const WeightArg& weight, const at::Tensor& rows, double multiplier, at::ScalarType out_dtype) {
  const char* op = "weight_rows";
  const KernelWeight own = kernel_weight(op, "weight", weight);
  check(own.w.experts == 1, op, ": weight has ", own.w.experts, " matrices, expected 1");
  const std::vector<int32_t> row = copy_indices(op, "rows", rows, 1);
  for (const int32_t i : row) check(i >= 0 && i < own.w.n, op, ": row ", i, " is not in 0..", own.w.n - 1);
  cpu::GatherRows p{};
  p.w = own.w;
  p.rows = row.data();
  p.count = static_cast<int64_t>(row.size());
  p.multiplier = static_cast<float>(multiplier);
  p.out_type = float_dtype(op, "out_dtype", out_dtype);
  at::Tensor out = empty({p.count, p.w.k}, out_dtype);
  p.out = out.mutable_data_ptr();
  cpu::gather_rows(p, executor());
  return out;
}

}  // namespace

void define_pack(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "pack_into", pack_into, arg("weight"), arg("packed"), arg("row"));
  define_native_op(module, "pack_codes", pack_codes, arg("values"), arg("packed"), arg("row"), arg("zero_point"));
  define_native_op(module, "weight_rows", weight_rows, arg("weight"), arg("rows"), arg("multiplier"), arg("out_dtype"));
}

}  // namespace grok
