#include "recording.h"

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>

#include <chrono>
#include <map>

#include "bindings.h"

namespace grok {

Recording*& Recording::active() {
  static thread_local Recording* recording = nullptr;
  return recording;
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  if (Recording* recording = Recording::active()) return recording->empty(sizes, dtype);
  return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}

at::Tensor Recording::empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  if (!replays_) {
    at::Tensor made(at::detail::empty_cpu(sizes, dtype));
    if (now_) now_->made.push_back({made, made.const_data_ptr()});
    return made;
  }
  check(taken_ < now_->made.size(), now_->name, ": a replay has more results than the recording's ", taken_);
  const auto& [made, data] = now_->made[taken_++];
  check(made.sizes() == sizes && made.scalar_type() == dtype, now_->name, ": a result of the replay has shape ", sizes,
        " and dtype ", c10::toString(dtype), ", expected that of the recording, ", made.sizes(), " and ",
        c10::toString(made.scalar_type()));
  check_memory(now_->name, "a result of the recording", made);
  check(made.is_contiguous() && made.const_data_ptr() == data, now_->name,
        ": a result of the recording has other strides or other memory since");
  return made;
}

Recording::Use::Use(Recording& of) : recording(of) {
  check(!of.in_use_.exchange(true), "Recording: it is in use, by another thread or by a caller of this one");
}

Recording::Activation::Activation(Recording& of) : use(of) {
  check(!active(), "Recording: another one is active in this thread");
  active() = &of;
}

Recording::Activation::~Activation() {
  active() = nullptr;
  use.recording.replays_ = false;
  use.recording.now_ = nullptr;
}

Recording::Making::Making(Recording& of, const char* name, std::function<void()> run) : recording(of) {
  of.calls_.push_back({name, std::move(run), {}});
  of.now_ = &of.calls_.back();
  ++of.count_;
}

Recording::Making::~Making() {
  recording.now_ = nullptr;
  if (std::uncaught_exceptions() == exceptions) return;
  recording.calls_.pop_back();
  --recording.count_;
}

pybind11::object Recording::record(const pybind11::function& run) {
  const Activation activation(*this);
  return run();
}

void Recording::watch(const std::string& label, const at::Tensor& tensor) {
  const bool recording = active() == this;  // then this thread uses it already
  std::optional<Use> use;
  if (!recording) use.emplace(*this);
  if (!is_plain(tensor) || !known_.insert(tensor.unsafeGetTensorImpl()).second) return;
  watched_.push_back({label, tensor, tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type(),
                      tensor.const_data_ptr()});
}

void Recording::verify() {
  const Use use(*this);
  for (const Watched& w : watched_) {
    const at::Tensor& now = w.tensor;
    const bool alike = now.sizes() == w.sizes && now.strides() == w.strides && now.scalar_type() == w.dtype;
    if (alike && now.const_data_ptr() == w.data) continue;
    check(alike, w.label, " has shape ", now.sizes(), ", strides ", now.strides(), " and dtype ",
          c10::toString(now.scalar_type()), " in a replay, expected those of the recording: ",
          at::IntArrayRef(w.sizes), ", ", at::IntArrayRef(w.strides), " and ", c10::toString(w.dtype));
    check(false, w.label, " lies in other memory than when it was recorded");
  }
}

void Recording::replay(int64_t first, int64_t last) {
  const Activation activation(*this);
  check(first >= 0 && first <= last && last <= calls(), "Recording: replay of the calls ", first, " to ", last,
        ", there are ", calls());
  replays_ = true;
  using Clock = std::chrono::steady_clock;
  auto began = Clock::now();
  for (int64_t i = first; i < last; ++i) {
    now_ = &calls_[i];
    taken_ = 0;
    {
      RECORD_FUNCTION(now_->name, c10::ArrayRef<const c10::IValue>{});
      now_->run();
    }
    const auto ended = Clock::now();
    now_->seconds += std::chrono::duration<double>(ended - began).count();
    began = ended;
  }
}

std::vector<std::pair<std::string, double>> Recording::seconds() {
  const Use use(*this);
  std::map<std::string, double> sums;
  for (const Call& call : calls_) sums[call.name] += call.seconds;
  return {sums.begin(), sums.end()};
}

void define_recording(pybind11::module_& module) {
  using pybind11::arg;
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<Recording>(module, "Recording", "Calls of this module's ops, to be replayed on the same tensors.")
      .def(pybind11::init<>())
      .def("record", &Recording::record, arg("run"), "Call `run`, keep its calls on this thread, return its result.")
      .def_property_readonly("calls", &Recording::calls, "How many are kept.")
      .def("watch", &Recording::watch, arg("label"), arg("tensor"), "Make `verify` compare this tensor too.")
      .def("verify", &Recording::verify, Free(),
           "ValueError where an argument of a call, or what `watch` was given, has another shape, dtype or memory.")
      .def("replay", &Recording::replay, arg("first"), arg("last"), Free(),
           "Replay the calls first .. last-1; their results are in the tensors that they returned when recorded.")
      .def("seconds", &Recording::seconds, "For every op, the seconds spent in its replays so far.");
}

}  // namespace grok
