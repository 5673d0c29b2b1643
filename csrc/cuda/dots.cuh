// z.z, z.r and r.r in one pass over both lists: products and sums in double.
#pragma once

#include "lists.cuh"
#include "reduce.cuh"

namespace curveball::cuda {

template <int Capacity>
using DotsList = TensorList<2, Capacity>;  // z and r

template <int N, typename Z, typename R>
struct DotsVectors {
  Vector<Z, N> z;
  Vector<R, N> r;
};

// A block writes the three sums of one chunk.
template <typename Z, typename R, int Capacity>
__global__ void __launch_bounds__(kListThreads, 2)
    dots_kernel(const DotsList<Capacity> __grid_constant__ list, double* partials) {
  __shared__ double shared[kBlockSumSize<3>];
  const Chunk chunk = find_chunk(list, static_cast<int>(blockIdx.x));
  const Z* z = static_cast<const Z*>(list.data[0][chunk.tensor]) + chunk.begin;
  const R* r = static_cast<const R*>(list.data[1][chunk.tensor]) + chunk.begin;
  // Vectors have 16 bytes of the narrower and up to 64 of the wider; 8 to 10 loads of 16 bytes are under way.
  constexpr int narrow = sizeof(Z) < sizeof(R) ? sizeof(Z) : sizeof(R), N = 16 / narrow;
  constexpr int loads = N * (sizeof(Z) + sizeof(R)) / 16, unroll = loads > 4 ? 2 : 8 / loads;
  double sums[3] = {};
  for_each_element<N, unroll>(
      chunk.count, unaligned_head<N>(chunk.count, z, r),
      [&](auto length, int i) {
        constexpr int n = decltype(length)::value;
        return DotsVectors<n, Z, R>{load_vector<n>(z + i), load_vector<n>(r + i)};
      },
      [&](auto length, int, const auto& loaded) {
#pragma unroll
        for (int k = 0; k < decltype(length)::value; k++) {
          const double a = to<double>(loaded.z.v[k]), b = to<double>(loaded.r.v[k]);
          sums[0] += a * a;
          sums[1] += a * b;
          sums[2] += b * b;
        }
      });
  block_sum(sums, shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < 3; k++) partials[3 * static_cast<int64>(chunk.partial) + k] = sums[k];
  }
}

// One block adds up all chunks.
template <int Threads>
__global__ void __launch_bounds__(Threads, 1) finish_dots_kernel(const double* partials, int count, double* dots) {
  __shared__ double shared[kBlockSumSize<3>];
  double sums[3];
  sum_partials(partials, 0, count, sums, shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < 3; k++) dots[k] = sums[k];
  }
}

}  // namespace curveball::cuda
