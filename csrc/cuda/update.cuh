// The update of all parameters, one pass over w, z and r, and the sums of z.z that it gives for free.
#pragma once

#include "../formulas.h"
#include "lists.cuh"
#include "reduce.cuh"
#include "solve.cuh"

namespace curveball::cuda {

// w, z and r, and each tensor's group and its rates.
template <int Capacity>
struct UpdateList : TensorList<3, Capacity> {
  int group[Capacity];
  double lr[Capacity], weight_decay[Capacity];
};
static_assert(kFits<UpdateList>);

template <int N, typename W, typename Z, typename R>
struct UpdateVectors {
  Vector<W, N> w;
  Vector<Z, N> z;
  Vector<R, N> r;
};

// z <- (rho - beta s) z - beta r;  w <- (1 - lr weight_decay) w + lr z.  Returns this thread's part of z.z.
template <typename W, typename Z, typename R>
__device__ __forceinline__ double update_chunk(W* w, Z* z, const R* r, int count, const UpdateFactors<Z>& factors) {
  // 6 to 12 loads of 16 bytes under way for each thread.
  constexpr int N = kVectorLength<W>, unroll = sizeof(W) == 4 ? 4 : 2;
  double sum = 0.0;
  for_each_element<N, unroll>(
      count, unaligned_head<N>(count, w, z, r),
      [&](auto length, int i) {
        constexpr int n = decltype(length)::value;
        return UpdateVectors<n, W, Z, R>{load_vector<n>(w + i), load_vector<n>(z + i), load_vector<n>(r + i)};
      },
      [&](auto length, int i, const auto& old) {
        constexpr int n = decltype(length)::value;
        Vector<Z, n> new_w, new_z;
#pragma unroll
        for (int k = 0; k < n; k++) {
          new_z.v[k] = next_z(old.z.v[k], to<Z>(old.r.v[k]), factors);
          new_w.v[k] = next_w(to<Z>(old.w.v[k]), new_z.v[k], factors);
          const double square = static_cast<double>(new_z.v[k]) * static_cast<double>(new_z.v[k]);
          sum += square;
        }
        store_vector(z + i, new_z);
        store_vector(w + i, from<W>(new_w));
      });
  return sum;
}

// This thread's part of z.z, where nothing is to be changed.
template <typename Z>
__device__ __forceinline__ double square_chunk(const Z* z, int count) {
  constexpr int N = kVectorLength<Z>;
  double sum = 0.0;
  for_each_element<N, 4>(
      count, unaligned_head<N>(count, z),
      [&](auto length, int i) { return load_vector<decltype(length)::value>(z + i); },
      [&](auto length, int, const auto& old) {
#pragma unroll
        for (int k = 0; k < decltype(length)::value; k++) {
          sum += static_cast<double>(old.v[k]) * static_cast<double>(old.v[k]);
        }
      });
  return sum;
}

// A block updates one chunk and writes its sum of z^2. If beta or rho is not finite (solve's signal for a step to
// skip), w and z stay as they are.
template <typename W, typename Z, typename R, int Capacity>
__global__ void __launch_bounds__(kListThreads, 2)
    update_kernel(const UpdateList<Capacity> __grid_constant__ list, const double* scalars, Numbers lr_tensor,
                  double* partials) {
  __shared__ double shared[kBlockSumSize<1>];
  const Chunk chunk = find_chunk(list, static_cast<int>(blockIdx.x));
  const int t = chunk.tensor;
  W* w = static_cast<W*>(list.data[0][t]) + chunk.begin;
  Z* z = static_cast<Z*>(list.data[1][t]) + chunk.begin;
  const R* r = static_cast<const R*>(list.data[2][t]) + chunk.begin;
  const double beta = scalars[kBeta], rho = scalars[kRho];
  double sum[1];
  if (is_finite(beta) && is_finite(rho)) {
    const double lr = learning_rate(lr_tensor, list.group[t], list.lr[t]);
    sum[0] = update_chunk(w, z, r, chunk.count,
                          update_factors<Z>(beta, rho, scalars[kDirectionDamping], lr, list.weight_decay[t]));
  } else {
    sum[0] = square_chunk(z, chunk.count);
  }
  block_sum(sum, shared);
  if (threadIdx.x == 0) partials[chunk.partial] = sum[0];
}

// ---------------------------------------------------------------------------------------------- the end

constexpr int kGroupsPerLaunch = 256;

// A stretch of the groups: `begin` is its first one.
struct GroupList {
  int begin, count;
  bool last;                          // no groups after these: finish the update
  int first_partial;                  // of the first group
  int end_partial[kGroupsPerLaunch];  // behind the last of each group
  double lr[kGroupsPerLaunch];
};

// One block: every group's z.z from the chunks' sums, in a fixed order, and at last the new scalars.
template <int Threads>
__global__ void __launch_bounds__(Threads, 1)
    finish_update_kernel(const GroupList __grid_constant__ groups, const double* partials, Numbers lr_tensor,
                         const double* scalars, double* squares, double* lr, double* result) {
  __shared__ double shared[kBlockSumSize<1>];
  int begin = groups.first_partial;
  for (int g = 0; g < groups.count; g++) {
    const int end = groups.end_partial[g];
    double sum[1];
    sum_partials(partials, begin, end, sum, shared);
    if (threadIdx.x == 0) {
      squares[groups.begin + g] = sum[0];
      lr[groups.begin + g] = learning_rate(lr_tensor, groups.begin + g, groups.lr[g]);
    }
    begin = end;
  }
  if (groups.last && threadIdx.x == 0) {
    Scalars next;
    finish_update(scalars, squares, lr, groups.begin + groups.count, next.v);
    store_scalars(result, next);
  }
}

}  // namespace curveball::cuda
