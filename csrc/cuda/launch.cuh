#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/check.h"
#include "sm90.cuh"

// The host side: tensor maps, launches, and errors that name the op, its shape and CUDA's reason.

namespace grok::cuda {

using sm90::TensorMap;

enum class Element { byte, bf16 };  // byte: e4m3 or int8

// A tensor in global memory that tiles are copied from or to. Dimensions innermost first.
struct Tiles {
  const void* data;  // aligned to 16 bytes
  Element element;
  int rank;                // 2 or 3
  uint64_t size[3];        // elements; outside, loads give zeros and stores write nothing
  uint64_t stride[3];      // bytes between neighbours of a dimension, multiples of 16; [0] is not read
  uint32_t box[3];         // elements of a tile: 1 to 256 in each dimension, the innermost exactly 128 bytes
};

struct Launch {
  const char* op;
  std::string shape;  // of the problem, for messages
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;  // blocks, along x
  cudaStream_t stream;
};

}  // namespace grok::cuda

#ifdef GROK_HOST_EMULATION
#include "host_emulation/launch.h"
#else

#include <cuda_runtime.h>

namespace grok::cuda {

inline void check_cuda(cudaError_t error, const char* op, const std::string& shape, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " of " + shape + ": " + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "device", "any", "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device", "any",
             "cudaDeviceGetAttribute");
  return count;
}

// The driver's encoder, looked up by name, so that nothing links against libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "device", "any", "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

inline TensorMap tensor_map(const char* op, const std::string& shape, const Tiles& t) {
  TensorMap map;
  const cuuint32_t every[3] = {1, 1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, t.element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8,
      static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.data), t.size, t.stride + 1, t.box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + " of " + shape + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(result));
  return map;
}

template <class... Params, class... Args>
void launch_kernel(const Launch& launch, void (*kernel)(Params...), const Args&... args) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(launch.shared_bytes)),
             launch.op, launch.shape, "shared memory");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {launch.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), launch.op, launch.shape, "launch");
}

}  // namespace grok::cuda

#endif
