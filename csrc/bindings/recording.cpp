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
  if (replays_) return now_->made.at(taken_++);
  at::Tensor made(at::detail::empty_cpu(sizes, dtype));
  if (now_) now_->made.push_back(made);
  return made;
}

void Recording::start() {
  check(!active(), "Recording: another one is active in this thread");
  active() = this;
}

void Recording::stop() { active() = nullptr; }

Recording::Making::Making(Recording& of, const char* name, std::function<void()> run) : recording(of) {
  of.calls_.push_back({name, std::move(run), {}});
  of.now_ = &of.calls_.back();
}

Recording::Making::~Making() {
  recording.now_ = nullptr;
  if (std::uncaught_exceptions() > exceptions) recording.calls_.pop_back();
}

void Recording::replay(int64_t first, int64_t last) {
  check(first >= 0 && first <= last && last <= calls(), "Recording: replay of the calls ", first, " to ", last,
        ", there are ", calls());
  start();
  replays_ = true;
  struct End {
    Recording& recording;
    ~End() {
      recording.stop();
      recording.replays_ = false;
      recording.now_ = nullptr;
    }
  } end{*this};
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

std::vector<std::pair<std::string, double>> Recording::seconds() const {
  std::map<std::string, double> sums;
  for (const Call& call : calls_) sums[call.name] += call.seconds;
  return {sums.begin(), sums.end()};
}

void define_recording(pybind11::module_& module) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<Recording>(module, "Recording", "Calls of this module's ops, to be replayed on the same tensors.")
      .def(pybind11::init<>())
      .def("start", &Recording::start, "Keep the calls on this thread from now on.")
      .def("stop", &Recording::stop)
      .def_property_readonly("calls", &Recording::calls, "How many are kept.")
      .def("replay", &Recording::replay, pybind11::arg("first"), pybind11::arg("last"), Free(),
           "Replay the calls first .. last-1; their results are in the tensors that they returned when recorded.")
      .def("seconds", &Recording::seconds, "For every op, the seconds spent in its replays so far.");
}

}  // namespace grok
