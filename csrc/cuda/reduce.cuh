// Sums in a fixed order: lanes of a warp, warps of a block, blocks of a grid. No atomics, so the bits depend on
// neither timing nor device.
#pragma once

#include "types.cuh"

namespace curveball::cuda {

// Every lane gets the sum over the warp. All 32 lanes must call.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Every lane gets the maximum over the warp; a NaN is passed over, as fmax does. All 32 lanes must call.
template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = x > other || other != other ? x : other;
  }
  return x;
}

// Doubles of shared memory that block_sum<N> needs: one for each warp and sum.
template <int N>
constexpr int kBlockSumSize = 32 * N;

// N sums over the block at once; every thread gets them. All threads must call; blockDim.x is a multiple of 32, at
// most 1024. `shared` may be used again afterwards.
template <int N>
__device__ __forceinline__ void block_sum(double (&x)[N], double* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < N; k++) {
    const double sum = warp_sum(x[k]);
    if (lane == 0) shared[warp * N + k] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; k++) x[k] = warp_sum(lane < warps ? shared[lane * N + k] : 0.0);
  __syncthreads();
}

// The one block that adds up what the others have left.
constexpr int kFinishThreads = 512;

// Adds up partials[begin .. end)[N], which other blocks have written, with one block; every thread gets the sums.
template <int N>
__device__ __forceinline__ void sum_partials(const double* partials, int64 begin, int64 end, double (&sums)[N],
                                             double* shared) {
#pragma unroll
  for (int k = 0; k < N; k++) sums[k] = 0.0;
  // Unrolled, so that several loads are under way before the first addition waits.
#pragma unroll 8
  for (int64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < N; k++) sums[k] += partials[i * N + k];
  }
  block_sum(sums, shared);
}

}  // namespace curveball::cuda
