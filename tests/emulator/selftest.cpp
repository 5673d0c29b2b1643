// Kernels with the mistakes that the emulator must notice, or must make visible.
#include <stdexcept>

#include "cuda_on_cpu.h"

namespace {

__global__ void leaves_before_barrier() {
  if (threadIdx.x < 10) return;
  __syncthreads();
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_missing_from_shuffle() {
  if (threadIdx.x % 32 != 5) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void lane_at_barrier_instead() {
  if (threadIdx.x == 5) __syncthreads();
  __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void lane_outside_its_mask() {
  if (threadIdx.x < 32) __shfl_sync(0xffffu, 1, 0);
}

__global__ void shared_overrun() {
  if (threadIdx.x == 0) static_cast<char*>(emulator::running.dynamic_shared)[64] = 1;
}

__global__ void reads_unset_shared(double* result) {
  __shared__ double values[64];
  if (threadIdx.x != 3) values[threadIdx.x] = 1.0;
  __syncthreads();
  result[threadIdx.x] = values[threadIdx.x];
}

// Sums of neighbors with all shuffles and, without the barrier, in an order that a seed decides.
__global__ void no_barrier(double* result) {
  __shared__ double values[64];
  values[threadIdx.x] = threadIdx.x;
  result[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void shuffles(double* result) {
  const double mine = threadIdx.x;
  result[threadIdx.x] = __shfl_xor_sync(0xffffffffu, mine, 3) + 100 * __shfl_down_sync(0xffffffffu, mine, 2) +
                        1e4 * __shfl_up_sync(0xffffffffu, mine, 1, 8) + 1e6 * __shfl_sync(0xffffffffu, mine, 33, 16);
  __syncwarp();
}

}  // namespace

// The results of a kernel of 64 threads; throws what the emulator finds.
std::vector<double> selftest(const std::string& name) {
  using emulator::launch;
  std::vector<double> result(64);
  if (name == "leaves before barrier") {
    launch(leaves_before_barrier, 1, 64, 0, 0);
  } else if (name == "different barriers") {
    launch(different_barriers, 1, 64, 0, 0);
  } else if (name == "lane missing from shuffle") {
    launch(lane_missing_from_shuffle, 1, 64, 0, 0);
  } else if (name == "lane at barrier instead") {
    launch(lane_at_barrier_instead, 1, 64, 0, 0);
  } else if (name == "lane outside its mask") {
    launch(lane_outside_its_mask, 1, 64, 0, 0);
  } else if (name == "shared overrun") {
    launch(shared_overrun, 1, 64, 64, 0);
  } else if (name == "too much shared") {
    launch(shared_overrun, 1, 64, 49 * 1024, 0);
  } else if (name == "reads unset shared") {
    launch(reads_unset_shared, 1, 64, 0, 0, result.data());
  } else if (name == "no barrier") {
    launch(no_barrier, 1, 64, 0, 0, result.data());
  } else if (name == "shuffles") {
    launch(shuffles, 1, 64, 0, 0, result.data());
  } else {
    throw std::invalid_argument(name);
  }
  return result;
}
