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

// Calls of the functions of direct.h, kept with their arguments, to be made again on the same tensors: what a CUDA graph is
// to a GPU. No Python runs between them, whose code and data would have to come from memory again after the weights of
// the call before. New tensors are those of the recording, so that views taken of them then stay right.
class Recording {
 public:
  // The one that records or replays in this thread, or null.
  static Recording*& active();

  // Makes a call; where a recording records here, it keeps that.
  template <class Result, class... Args>
  static Result call(const char* name, Result (*op)(Args...), Args... args) {
    Recording* recording = active();
    if (!recording || recording->now_) return op(std::forward<Args>(args)...);
    const std::tuple<Kept<Args>...> kept(args...);
    const Making making(*recording, name, [op, kept] { std::apply(op, kept); });
    return op(std::forward<Args>(args)...);
  }

  // A new tensor of a call: one of the recording's own in a replay.
  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

  void start();  // in this thread, until stop()
  void stop();
  int64_t calls() const { return static_cast<int64_t>(calls_.size()); }

  // Makes the calls first .. last−1 again.
  void replay(int64_t first, int64_t last);

  // Of every function that was called, the seconds in its replays so far.
  std::vector<std::pair<std::string, double>> seconds() const;

 private:
  // Text is somebody else's: it is copied.
  template <class T>
  using Kept = std::conditional_t<std::is_convertible_v<T, c10::string_view>, std::string, std::decay_t<T>>;

  struct Call {
    const char* name;
    std::function<void()> run;
    std::vector<at::Tensor> made;
    double seconds = 0.0;
  };

  // While it is there the call is made; one that fails is not kept.
  struct Making {
    Making(Recording& recording, const char* name, std::function<void()> run);
    ~Making();
    Recording& recording;
    const int exceptions = std::uncaught_exceptions();
  };

  std::vector<Call> calls_;
  Call* now_ = nullptr;   // the call that is being made
  bool replays_ = false;
  size_t taken_ = 0;      // of its tensors
};

// Adds the class to the Python module.
void define_recording(pybind11::module_& module);

}  // namespace grok
