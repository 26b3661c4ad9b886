#pragma once

#include <pybind11/pybind11.h>

namespace grok {

// All of a call's arguments that an op's checks and the choice of its kernel may depend on, as bytes: the type, sizes
// and strides of a tensor, never its values; a number, text or dtype itself; GROK_KERNELS_BACKEND. Equal bytes, equal
// verdict. None where the call is not a plain one on the CPU: where the dispatcher, were it asked, would do more than
// run the CPU's kernel (gradients, a mode, tracing, a tensor of another kind), or an argument is of another type.
pybind11::object signature(const pybind11::tuple& args);

}  // namespace grok
