// The key of the validated-call cache (kernels/grok_kernels/registry.py).

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "bindings.h"

namespace grok {
namespace {

PyObject* weight_type = nullptr;  // owned

template <class T>
void put(std::string& key, char tag, T value) {
  char raw[1 + sizeof value];
  raw[0] = tag;
  std::memcpy(raw + 1, &value, sizeof value);
  key.append(raw, sizeof raw);
}

void put_text(std::string& key, char tag, const char* text, size_t size) {
  put(key, tag, size);
  key.append(text, size);
}

bool put_tensor(std::string& key, const at::Tensor& tensor) {
  if (!is_plain(tensor)) return false;
  if (tensor.requires_grad() && at::GradMode::is_enabled()) return false;
  if (tensor._fw_grad(0).defined()) return false;  // a tangent of forward-mode differentiation; there is one level
  if (tensor.dim() == 0) return false;  // torch takes it for a number, and then its value counts
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  put(key, 't', static_cast<int16_t>(tensor.scalar_type()));
  put(key, 'd', static_cast<int32_t>(sizes.size()));
  key.append(reinterpret_cast<const char*>(sizes.data()), sizes.size() * sizeof(int64_t));
  key.append(reinterpret_cast<const char*>(strides.data()), strides.size() * sizeof(int64_t));
  return true;
}

// A Weight computes its part of the key once: bytes, or None where a plane is not a plain CPU tensor.
bool put_weight(std::string& key, PyObject* weight) {
  static PyObject* const name = PyUnicode_InternFromString("signature");
  const auto signature = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(weight, name));
  if (!signature) throw pybind11::error_already_set();
  if (!PyBytes_Check(signature.ptr())) return false;
  put_text(key, 'w', PyBytes_AS_STRING(signature.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(signature.ptr())));
  return true;
}

// Types are compared exactly: a subclass may mean something else, and True is not 1.
bool put_argument(std::string& key, PyObject* arg) {
  if (THPVariable_CheckExact(arg)) return put_tensor(key, THPVariable_Unpack(arg));
  if (weight_type && reinterpret_cast<PyObject*>(Py_TYPE(arg)) == weight_type) return put_weight(key, arg);
  if (arg == Py_None) {
    key += 'n';
  } else if (PyBool_Check(arg)) {
    put(key, 'b', arg == Py_True);
  } else if (PyLong_CheckExact(arg)) {
    int overflow = 0;
    put(key, 'i', PyLong_AsLongLongAndOverflow(arg, &overflow));
    return !overflow;
  } else if (PyFloat_CheckExact(arg)) {
    put(key, 'f', PyFloat_AS_DOUBLE(arg));
  } else if (PyUnicode_CheckExact(arg)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(arg, &size);
    if (!text) {  // a lone surrogate
      PyErr_Clear();
      return false;
    }
    put_text(key, 's', text, size);
  } else if (THPDtype_Check(arg)) {
    put(key, 'y', static_cast<int16_t>(reinterpret_cast<THPDtype*>(arg)->scalar_type));
  } else {
    return false;
  }
  return true;
}

bool plain_thread() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::default_included_set.has_all(included) && !at::impl::torch_function_mode_enabled();
}

// Everything that an op's checks and the choice of its kernel may depend on, as bytes: the dtype, sizes and strides
// of a tensor, never its values; a number, text or dtype itself; GROK_KERNELS_BACKEND. Equal bytes, equal verdict.
// None where an argument is of another type, or a tensor of another kind than those of a plain call on the CPU.
pybind11::object key(const pybind11::tuple& args) {
  // The buffer is kept for the next call, but belongs to this one: a Weight that is keyed for the first time calls this
  // function again.
  static thread_local std::string kept;
  std::string key = std::move(kept);
  key.clear();
  for (const auto& arg : args) {
    if (!put_argument(key, arg.ptr())) return pybind11::none();
  }
  if (const char* forced = std::getenv("GROK_KERNELS_BACKEND")) put_text(key, 's', forced, std::strlen(forced));
  pybind11::bytes bytes(key);
  kept = std::move(key);
  return bytes;
}

// The key, or None where the dispatcher would do more than run the CPU's kernel: gradients, a mode, tracing.
pybind11::object signature(const pybind11::tuple& args) {
  if (!plain_thread()) return pybind11::none();
  return key(args);
}

// Returns the class that was set before, or None.
pybind11::object set_weight_type(const pybind11::object& type) {
  PyObject* const before = weight_type;
  pybind11::object owned = type;
  weight_type = type.is_none() ? nullptr : owned.release().ptr();
  return before ? pybind11::reinterpret_steal<pybind11::object>(before) : pybind11::none();
}

}  // namespace

void define_signature(pybind11::module_& module) {
  module.def("signature", &signature, pybind11::arg("args"),
             "What the checks of a plain call on the CPU depend on, as bytes; None for any other call.");
  module.def("key", &key, pybind11::arg("args"),
             "As signature, but also under a mode of the thread, such as a recording's.");
  module.def("set_weight_type", &set_weight_type, pybind11::arg("type"),
             "Set the class of weights, whose objects are keyed by their attribute `signature` (bytes, or None for no "
             "key). Returns the class set before.");
}

}  // namespace grok
