// How the host reaches the device. The only file that differs between a GPU and its emulation on the CPU: the .cu files
// compile unchanged for both.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if defined(CURVEBALL_EMULATE)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace curveball::cuda {

#if defined(CURVEBALL_EMULATE)

#define CURVEBALL_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(curveball_emulated, CPU, library)

using emulator::DeviceGuard, emulator::Stream, emulator::current_stream, emulator::launch, emulator::max_shared_bytes,
    emulator::raise_shared_limit;

#else

#define CURVEBALL_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CUDA, library)

using Stream = cudaStream_t;
using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<Stream>(stream);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "too many elements for one launch: ", blocks, " blocks.");
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The most dynamic shared memory that a block may have, once raise_shared_limit has asked for it.
inline int max_shared_bytes(int device) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Needed once for each kernel and device before a launch with more than 48 KiB.
template <typename... Parameters>
void raise_shared_limit(void (*kernel)(Parameters...), int bytes) {
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

#endif

}  // namespace curveball::cuda
