#pragma once

#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <utility>
#include <vector>

#include "recording.h"

namespace grok {

// A plain function of the module beside an op of that name, with its arguments in their order, for calls that torch's
// dispatcher need not see: where weights have streamed through the caches, its code must come from memory again, which
// takes longer than many a kernel. Its profiler sees them.
class Direct {
 public:
  template <class Result, class... Args>
  Direct(const char* name, Result (*op)(Args...)) {
    all().push_back([name, op](pybind11::module_& module) {
      const auto call = [name, op](Args... args) -> Result {
        RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{});
        return Recording::call<Result, Args...>(name, op, std::forward<Args>(args)...);
      };
      module.def(name, call, pybind11::call_guard<pybind11::gil_scoped_release>());
    });
  }

  static void define_all(pybind11::module_& module) {
    for (const auto& define : all()) define(module);
  }

 private:
  static std::vector<std::function<void(pybind11::module_&)>>& all() {
    static std::vector<std::function<void(pybind11::module_&)>> ops;
    return ops;
  }
};

}  // namespace grok
