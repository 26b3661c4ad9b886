// torch bindings of Hopper's router and grouping, in the library grok_cuda::. grok_kernels/ops has the contract of each
// op and the rest of its checks; grok_kernels/cuda.py decides which calls come here.

#include "cuda/include/grok/route.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <tuple>

#include "tensors.h"

namespace grok {
namespace {

at::Tensor ints(const at::Tensor& like, at::IntArrayRef shape) { return scratch(like, shape, at::kInt); }

// The tensors of a routing, alive until its launch. torch reuses their memory on this stream only, after the kernels.
struct Routing {
  at::Tensor x, router, weights, chosen;
  cuda::RouteTopk params{};
};

Routing routing(const char* op, const at::Tensor& x, const at::Tensor& router, int64_t k, double softcap,
                bool renormalize) {
  const bool is_float = x.scalar_type() == at::kFloat;
  check_tensor(op, "x", x, 2, is_float ? at::kFloat : at::kBFloat16);
  check_tensor(op, "router", router, 2, at::kFloat);
  check_device(op, "router", router, x);
  check(router.size(1) == x.size(1), op, ": router has shape ", router.sizes(), ", expected (E, D) with D=", x.size(1),
        " from x");
  Routing r{readable(x), readable(router), scratch(x, {x.size(0), k}, at::kFloat),
            ints(x, {x.size(0), k})};
  r.params = {r.x.const_data_ptr(), is_float, r.router.const_data_ptr<float>(), r.weights.mutable_data_ptr<float>(),
              r.chosen.mutable_data_ptr<int32_t>(), x.size(0), x.size(1), router.size(0), k, x.size(1),
              static_cast<float>(softcap), renormalize};
  return r;
}

std::tuple<at::Tensor, at::Tensor> route_topk(const at::Tensor& x, const at::Tensor& router, int64_t k, double softcap,
                                              bool renormalize) {
  const c10::cuda::CUDAGuard guard(x.device());
  Routing r = routing("route_topk", x, router, k, softcap, renormalize);
  cuda::route_topk(r.params, c10::cuda::getCurrentCUDAStream());
  return {r.weights, r.chosen};
}

std::tuple<at::Tensor, at::Tensor> group_tokens(const at::Tensor& experts, int64_t num_experts) {
  check_tensor("group_tokens", "experts", experts, 2, at::kInt);
  const c10::cuda::CUDAGuard guard(experts.device());
  const at::Tensor chosen = experts.contiguous(), order = ints(experts, {experts.numel()}),
                   offsets = ints(experts, {num_experts + 1});
  cuda::group_tokens({chosen.const_data_ptr<int32_t>(), order.mutable_data_ptr<int32_t>(),
                      offsets.mutable_data_ptr<int32_t>(), experts.numel(), num_experts},
                     c10::cuda::getCurrentCUDAStream());
  return {order, offsets};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_and_group(
    const at::Tensor& x, const at::Tensor& router, int64_t k, double softcap, bool renormalize,
    const at::Tensor& counter) {
  const char* op = "route_and_group";
  check_tensor(op, "counter", counter, 1, at::kInt);
  check(counter.numel() == 1 && counter.device() == x.device(), op, ": counter has shape ", counter.sizes(), " on ",
        counter.device(), ", expected (1,) on ", x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  Routing r = routing(op, x, router, k, softcap, renormalize);
  const at::Tensor order = ints(x, {x.size(0) * k}), offsets = ints(x, {router.size(0) + 1});
  cuda::route_and_group({r.params, order.mutable_data_ptr<int32_t>(), offsets.mutable_data_ptr<int32_t>(),
                         reinterpret_cast<uint32_t*>(counter.mutable_data_ptr<int32_t>())},
                        c10::cuda::getCurrentCUDAStream());
  return {r.weights, r.chosen, order, offsets};
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cuda, library) {
  library.def("route_topk(Tensor x, Tensor router, int k, float softcap, bool renormalize) -> (Tensor, Tensor)");
  library.def("group_tokens(Tensor experts, int num_experts) -> (Tensor, Tensor)");
  library.def(
      "route_and_group(Tensor x, Tensor router, int k, float softcap, bool renormalize, Tensor(a!) counter)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(grok_cuda, CUDA, library) {
  library.impl("route_topk", grok::route_topk);
  library.impl("group_tokens", grok::group_tokens);
  library.impl("route_and_group", grok::route_and_group);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("torch_version") = TORCH_VERSION;  // of the headers that this was compiled against
}
