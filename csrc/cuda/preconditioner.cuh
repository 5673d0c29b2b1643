// Adam's diagonal in one pass over v, r and z, with the sums z.Pz, z.r and r.u.
#pragma once

#include "../formulas.h"
#include "lists.cuh"
#include "reduce.cuh"

namespace curveball::cuda {

// u, v, r and z. Without a list z its addresses are null.
template <int Capacity>
using DiagonalList = TensorList<4, Capacity>;
static_assert(kFits<DiagonalList>);

template <int N, typename V, typename R>
struct DiagonalVectors {
  Vector<V, N> v, z;
  Vector<R, N> r;
};

// v' = decay v + (1 - decay) r^2;  p = sqrt(v' / weight) + eps;  u <- r / p;  v <- v', if `stores_v`. `sums` gets this
// thread's part of z.Pz, z.r and r.u. u may be r itself: each element is read before it is written, by one thread.
template <typename V, typename R>
__device__ __forceinline__ void precondition_chunk(V* u, V* v, const R* r, const V* z, int count, bool stores_v,
                                                   const DiagonalFactors<V>& factors, double (&sums)[3]) {
  // Vectors have 16 bytes of the narrower, but no more than two doubles, whose arithmetic takes many registers. 5 or 6
  // loads are under way for each thread.
  constexpr int N = sizeof(V) == 8 ? 2 : kVectorLength<R>, unroll = N > 4 ? 1 : 2;
  for_each_element<N, unroll>(
      count, unaligned_head<N>(count, u, v, r, z ? z : v),
      [&](auto length, int i) {
        constexpr int n = decltype(length)::value;
        DiagonalVectors<n, V, R> old;
        old.v = load_vector<n>(v + i);
        old.z = z ? load_vector<n>(z + i) : Vector<V, n>{};
        old.r = load_vector<n>(r + i);
        return old;
      },
      [&](auto length, int i, const auto& old) {
        constexpr int n = decltype(length)::value;
        Vector<V, n> new_u, new_v;
#pragma unroll
        for (int k = 0; k < n; k++) {
          const V r_k = to<V>(old.r.v[k]), v_k = next_v(old.v.v[k], r_k, factors);
          const V p = diagonal(static_cast<V>(sqrt(v_k)), factors);
          new_v.v[k] = v_k;
          new_u.v[k] = preconditioned<V>(r_k, v_k, p);
          const double a = static_cast<double>(old.z.v[k]), b = static_cast<double>(r_k);
          if (z) {
            sums[0] += a * a * static_cast<double>(p);
            sums[1] += a * b;
          }
          sums[2] += b * static_cast<double>(new_u.v[k]);
        }
        store_vector(u + i, new_u);
        if (stores_v) store_vector(v + i, new_v);
      });
}

// A block does one chunk and writes its three sums. v is written if there are scalars, with finite beta and rho. Roots
// and quotients of doubles are subroutines: with 64 registers for each thread they would spill.
template <typename V, typename R, int Capacity>
__global__ void __launch_bounds__(kListThreads, sizeof(V) == 8 ? 1 : 2)
    precondition_kernel(const DiagonalList<Capacity> __grid_constant__ list, const double* weight, double decay,
                        double eps, const double* scalars, double* partials) {
  __shared__ double shared[kBlockSumSize<3>];
  const Chunk chunk = find_chunk(list, static_cast<int>(blockIdx.x));
  const int t = chunk.tensor;
  V* u = static_cast<V*>(list.data[0][t]) + chunk.begin;
  V* v = static_cast<V*>(list.data[1][t]) + chunk.begin;
  const R* r = static_cast<const R*>(list.data[2][t]) + chunk.begin;
  const V* z = list.data[3][t] ? static_cast<const V*>(list.data[3][t]) + chunk.begin : nullptr;
  const bool stores_v = scalars && is_finite(scalars[kBeta]) && is_finite(scalars[kRho]);
  double sums[3] = {};
  precondition_chunk(u, v, r, z, chunk.count, stores_v, diagonal_factors<V>(decay, *weight, eps), sums);
  block_sum(sums, shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < 3; k++) partials[3 * static_cast<int64>(chunk.partial) + k] = sums[k];
  }
}

}  // namespace curveball::cuda
