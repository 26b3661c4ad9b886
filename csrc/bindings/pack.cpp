#include "bindings.h"
#include "direct.h"
#include "cpu/pack.h"

namespace grok {
namespace {

constexpr int64_t kPanel = 64, kPackedDims = 6;

// Rows of E matrices (E, rows, K), of any strides, become rows row.. of a packed weight.
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
  cpu::Pack p{};
  p.n = n;
  p.k = k;
  p.row = weight.stride(1) * item;
  p.col = weight.stride(2) * item;
  p.item = item;
  for (int64_t expert = 0; expert < experts; ++expert) {
    p.w = static_cast<const char*>(weight.const_data_ptr()) + expert * weight.stride(0) * item;
    p.out = static_cast<char*>(packed.mutable_data_ptr()) + (expert * panels * kPanel + row) * k * item;
    const int64_t steps = cpu::pack_steps(p), bytes = std::max<int64_t>(1, n * k * item / std::max<int64_t>(1, steps));
    at::parallel_for(0, steps, std::max<int64_t>(1, kElementsPerTask / bytes),
                     [&](int64_t begin, int64_t end) { cpu::pack(p, begin, end); });
  }
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
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, rows.size(0), std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, k)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) cpu::unpack_row(from, row[i], k, item, to + i * k * item);
                   });
  return out;
}

const Direct kDirect[] = {{"pack_into", pack_into}, {"packed_rows", packed_rows}};

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cpu, library) {
  library.def("pack_into(Tensor weight, Tensor(a!) packed, int row) -> ()");
  library.def("packed_rows(Tensor packed, Tensor rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) {
  library.impl("pack_into", grok::pack_into);
  library.impl("packed_rows", grok::packed_rows);
}
