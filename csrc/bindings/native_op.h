#pragma once

#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <utility>

#include "recording.h"

namespace grok {

// Defines a kernel as a function of the module that is called without torch's dispatcher: once weights have streamed
// through the caches, the dispatcher's code comes from memory again at each call, which takes longer than many a
// kernel. The profiler sees the call, and a recording keeps it. `arguments`: a pybind11::arg for each.
template <class Result, class... Args, class... Arguments>
void define_native_op(pybind11::module_& module, const char* name, Result (*op)(Args...),
                      const Arguments&... arguments) {
  static_assert(sizeof...(Args) == sizeof...(Arguments));
  const std::array<const char*, sizeof...(Args)> names{arguments.name...};
  const auto call = [name, names, op](Args... args) -> Result {
    RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{});
    return Recording::call<Result, Args...>(name, names, op, std::forward<Args>(args)...);
  };
  module.def(name, call, arguments..., pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace grok
