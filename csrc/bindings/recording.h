#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace grok {

// Calls of native ops (native_op.h) kept with their arguments, to be replayed on the same tensors: what a CUDA graph
// is to a GPU. No Python runs between the calls of a replay: streaming weights evicts the interpreter from the
// caches, so Python between kernels runs cold. A replayed call writes its results into the tensors of the recording,
// so that views of them stay valid.
class Recording {
 public:
  // The recording that records or replays on this thread, or null.
  static Recording*& active();

  // Calls `op`; a recording that records on this thread keeps the call.
  template <class Result, class... Args>
  static Result call(const char* name, Result (*op)(Args...), Args... args) {
    Recording* recording = active();
    if (!recording || recording->now_) return op(std::forward<Args>(args)...);
    const std::tuple<Kept<Args>...> kept(args...);
    const Making making(*recording, name, [op, kept] { std::apply(op, kept); });
    return op(std::forward<Args>(args)...);
  }

  // A new tensor; in a replay, the one that the same call made when it was recorded.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

  void start();  // on this thread, until stop()
  void stop();
  int64_t calls() const { return static_cast<int64_t>(calls_.size()); }

  // Replays the calls first .. last − 1.
  void replay(int64_t first, int64_t last);

  // For every op, the seconds spent in its replays so far.
  std::vector<std::pair<std::string, double>> seconds() const;

 private:
  // Text belongs to the caller: it is copied.
  template <class T>
  using Kept = std::conditional_t<std::is_convertible_v<T, c10::string_view>, std::string, std::decay_t<T>>;

  struct Call {
    const char* name;
    std::function<void()> run;
    std::vector<at::Tensor> made;
    double seconds = 0.0;
  };

  // Keeps a call for as long as it runs, and after it unless it throws.
  struct Making {
    Making(Recording& recording, const char* name, std::function<void()> run);
    ~Making();
    Recording& recording;
    const int exceptions = std::uncaught_exceptions();
  };

  std::vector<Call> calls_;
  Call* now_ = nullptr;  // the call that is running
  bool replays_ = false;
  size_t taken_ = 0;     // tensors of this call that a replay has used
};

}  // namespace grok
