#pragma once

#include <string>

#include "builtins.h"

// The host side of launch.cuh, for the emulation.

namespace grok::cuda {

// Few multiprocessors by default, so that persistent kernels process several tiles per block.
inline int& multiprocessor_count() {
  static int count = 4;
  return count;
}
inline int multiprocessors() { return multiprocessor_count(); }

inline TensorMap tensor_map(const char* op, const std::string& shape, const Tiles& t) {
  const std::string where = std::string(op) + " of " + shape + ": tensor map: ";
  const uint32_t element_bytes = t.element == Element::bf16 ? 2 : 1;
  check(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, where, "data is not aligned to 16 bytes");
  check(t.rank == 2 || t.rank == 3, where, "rank ", t.rank, ", expected 2 or 3");
  check(t.box[0] * element_bytes == 128, where, "rows of ", t.box[0] * element_bytes, " bytes, expected 128");
  for (int i = 0; i < t.rank; ++i) {
    check(t.size[i] >= 1 && t.size[i] <= 1ull << 32, where, "size ", t.size[i], " of dimension ", i);
    check(t.box[i] >= 1 && t.box[i] <= 256, where, "box of ", t.box[i], " in dimension ", i, ", expected 1..256");
    check(i == 0 || (t.stride[i] % 16 == 0 && t.stride[i] < 1ull << 40), where, "stride of ", t.stride[i],
          " bytes in dimension ", i, ", expected a multiple of 16 below 2^40");
  }
  TensorMap map = {};
  map.data = static_cast<std::byte*>(const_cast<void*>(t.data));
  map.element_bytes = element_bytes;
  map.rank = t.rank;
  for (int i = 0; i < 3; ++i) {
    map.size[i] = i < t.rank ? static_cast<int64_t>(t.size[i]) : 1;
    map.stride[i] = i < t.rank ? static_cast<int64_t>(t.stride[i]) : 0;
    map.box[i] = i < t.rank ? t.box[i] : 1;
  }
  return map;
}

template <class... Params, class... Args>
void launch_kernel(const Launch& launch, void (*kernel)(Params...), const Args&... args) {
  const auto whole = [](dim3 d) { return emulation::Dim3(d.x, d.y, d.z); };
  const emulation::LaunchShape shape = {whole(launch.grid), whole(launch.block), emulation::Dim3(launch.cluster),
                                        launch.shared_bytes};
  try {
    emulation::run_grid(shape, [&] { kernel(static_cast<Params>(args)...); });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(launch.op) + " of " + launch.shape + ": " + error.what());
  }
}

}  // namespace grok::cuda
