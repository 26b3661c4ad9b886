#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include "weight.h"

namespace grok {

// Calls of native ops (native_op.h) kept with their arguments, to be replayed on the same tensors: what a CUDA graph
// is to a GPU. No Python runs between the calls of a replay: streaming weights evicts the interpreter from the
// caches, so Python between kernels runs cold. A replayed call writes its results into the tensors of the recording,
// so that views of them stay valid.
//
// A replay repeats what was decided from the tensors' shapes and uses views of their memory. `verify` therefore
// compares all arguments with what they were, and a replayed call compares the results that it asks for with those of
// the recording. One thread at a time may use a recording; others are refused before anything is touched.
class Recording {
 public:
  // The recording that records or replays on this thread, or null.
  static Recording*& active();

  // Calls `op`; a recording that records on this thread keeps the call.
  template <class Result, class... Args>
  static Result call(const char* name, const std::array<const char*, sizeof...(Args)>& names, Result (*op)(Args...),
                     Args... args) {
    Recording* recording = active();
    if (!recording || recording->now_) return op(std::forward<Args>(args)...);
    const std::tuple<Kept<Args>...> kept(args...);
    const Making making(*recording, name, [op, kept] { std::apply(op, kept); });
    size_t i = 0;
    (recording->watch_argument(name, names[i++], args), ...);
    return op(std::forward<Args>(args)...);
  }

  // A new tensor; in a replay, the one that the same call made when it was recorded.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

  // Calls `run`, and keeps the native calls that it makes on this thread. Returns what it returns.
  pybind11::object record(const pybind11::function& run);

  // Makes verify() compare this tensor too. `label` names it.
  void watch(const std::string& label, const at::Tensor& tensor);

  // ValueError where an argument of the recorded calls, or a tensor of watch(), has another shape, dtype or memory.
  void verify();

  // Replays the calls first .. last − 1.
  void replay(int64_t first, int64_t last);

  int64_t calls() const { return count_; }

  // For every op, the seconds spent in its replays so far.
  std::vector<std::pair<std::string, double>> seconds();

 private:
  // Text belongs to the caller: it is copied.
  template <class T>
  using Kept = std::conditional_t<std::is_convertible_v<T, c10::string_view>, std::string, std::decay_t<T>>;

  // A tensor, and what it was when it was recorded.
  struct Watched {
    std::string label;
    at::Tensor tensor;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    const void* data;
  };

  struct Made {
    at::Tensor tensor;
    const void* data;
  };

  struct Call {
    const char* name;
    std::function<void()> run;
    std::vector<Made> made;
    double seconds = 0.0;
  };

  // Keeps a call for as long as it runs, and after it unless it throws.
  struct Making {
    Making(Recording& recording, const char* name, std::function<void()> run);
    ~Making();
    Recording& recording;
    const int exceptions = std::uncaught_exceptions();
  };

  // The use of a recording by one thread. ValueError where another use has not ended.
  struct Use {
    explicit Use(Recording& recording);
    ~Use() { recording.in_use_ = false; }
    Recording& recording;
  };

  // The use that makes it the active one of this thread. ValueError where another is.
  struct Activation {
    explicit Activation(Recording& recording);
    ~Activation();
    Use use;
  };

  template <class T>
  void watch_argument(const char* op, const char* name, const T& argument) {
    if constexpr (std::is_same_v<T, at::Tensor>) {
      watch(std::string(op) + ": " + name, argument);
    } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
      if (argument) watch_argument(op, name, *argument);
    } else if constexpr (std::is_same_v<T, WeightArg>) {
      for (const at::Tensor& plane : argument.planes) watch_argument(op, name, plane);
    }
  }

  std::vector<Call> calls_;
  std::atomic<int64_t> count_{0};  // of calls_
  std::vector<Watched> watched_;
  std::unordered_set<const c10::TensorImpl*> known_;  // the tensors of watched_
  std::atomic<bool> in_use_{false};
  Call* now_ = nullptr;  // the call that is running
  bool replays_ = false;
  size_t taken_ = 0;     // tensors of this call that a replay has used
};

}  // namespace grok
