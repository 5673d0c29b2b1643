// Losses that are a sum over the elements of x: squared error, and binary cross-entropy of logits. Their Hessian is
// diagonal, h, so one pass over the elements gives all.
#pragma once

#include "loss_parts.cuh"

namespace curveball::cuda {

constexpr int kElementThreads = 512;
constexpr int kElementBatch = 2;  // vectors of each operand that a thread has under way

// Value, first and second derivative of the loss of one element.
template <typename C>
struct Derivatives {
  C loss, g, h;
};

// (x - y)^2
template <typename C>
struct SquaredError {
  template <int N>
  struct Constants {};
  template <int N>
  __device__ Constants<N> constants(int64) const {
    return {};
  }

  template <int N>
  __device__ __forceinline__ Derivatives<C> operator()(C x, C y, const Constants<N>&, int) const {
    const C difference = x - y;
    return {difference * difference, 2 * difference, 2};
  }
};

// w [(1-y) x + k softplus(-x)] with k = 1 + (pos_weight - 1) y; element i uses entry i % count of the weights. With
// negative = 1-y and positive = pos_weight y, so that k = negative + positive, nothing cancels where sigmoid saturates:
//     loss = w [negative softplus(x) + positive softplus(-x)],   g = w [negative sigmoid(x) - positive sigmoid(-x)]
template <typename C>
struct BinaryCrossEntropy {
  const C *weight, *pos_weight;  // null: ones
  int64 weight_count, pos_weight_count;

  // The weights of N neighbors.
  template <int N>
  struct Constants {
    C weight[N], pos_weight[N];
  };

  template <int N>
  __device__ __forceinline__ Constants<N> constants(int64 i) const {
    Constants<N> result;
    gather(weight, weight_count, i, result.weight);
    gather(pos_weight, pos_weight_count, i, result.pos_weight);
    return result;
  }

  template <int N>
  __device__ static __forceinline__ void gather(const C* values, int64 count, int64 i, C (&result)[N]) {
    int64 place = values ? i % count : 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
      result[k] = values ? values[place] : C(1);
      if (++place == count) place = 0;
    }
  }

  template <int N>
  __device__ __forceinline__ Derivatives<C> operator()(C x, C y, const Constants<N>& constants, int k) const {
    const C w = constants.weight[k], negative = 1 - y, positive = constants.pos_weight[k] * y;
    const C e = exp(x < 0 ? x : -x);  // exp(-|x|): never overflows
    const C large = 1 / (1 + e), small = e * large;
    const C above = x < 0 ? small : large, below = x < 0 ? large : small;  // sigmoid(x), sigmoid(-x)
    const C rest = log1p(e);
    const C softplus = (x < 0 ? 0 : x) + rest, softplus_of_minus = (x < 0 ? -x : 0) + rest;
    return {w * (negative * softplus + positive * softplus_of_minus), w * (negative * above - positive * below),
            w * (negative + positive) * above * below};
  }
};

template <typename T, template <typename> class Loss>
struct Elements {
  const T *x, *v, *u, *y;
  T* c;
  double* partials;  // [blocks, 3]
  int64 n;
  double scale, sign;  // scale: 1/n for the mean
  Loss<Compute<T>> loss;
};

// take(element, pieces of the arrays) for all elements of the grid's share.
template <int arrays, typename T, typename Take>
__device__ __forceinline__ void walk_elements(const Split<T, int64>& parts, const T* const (&base)[arrays], Take take) {
  const int64 rank = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
  walk<kElementBatch>(
      rank, parts.vectors, step,
      [&](int64 i) { return load_pieces<kVectorLength<T>, arrays>(base, parts.vector_place(i)); },
      [&](int64 i, const auto& piece) { take(parts.vector_place(i), piece); });
  walk<1>(
      rank, parts.singles(), step, [&](int64 i) { return load_pieces<1, arrays>(base, parts.single_place(i)); },
      [&](int64 i, const auto& piece) { take(parts.single_place(i), piece); });
}

// Loss, c = g + Hv, g.v, v.Hv. Sums are in Compute<T> within a vector, then in double.
template <typename T, template <typename> class Loss>
__global__ void __launch_bounds__(kElementThreads)
    element_cotangent_kernel(const Elements<T, Loss> __grid_constant__ a) {
  using C = Compute<T>;
  __shared__ double shared[kBlockSumSize<3>];
  const C factor = a.sign * a.scale;
  double sums[3] = {0.0, 0.0, 0.0};
  const T* const base[3] = {a.x, a.v, a.y};
  walk_elements(split(a.n, a.x, a.v, a.y, a.c), base, [&](int64 i, const auto& piece) {
    const auto x = piece.of[0].unpacked(), v = piece.of[1].unpacked(), y = piece.of[2].unpacked();
    auto c = x;
    C loss = 0, gv = 0, vhv = 0;
    constexpr int length = sizeof(x.v) / sizeof(C);
    const auto constants = a.loss.template constants<length>(i);
#pragma unroll
    for (int k = 0; k < length; k++) {
      const Derivatives<C> d = a.loss(x.v[k], y.v[k], constants, k);
      const C hv = d.h * v.v[k];
      loss += d.loss;
      gv += d.g * v.v[k];
      vhv += hv * v.v[k];
      c.v[k] = factor * (d.g + hv);
    }
    sums[0] += loss;
    sums[1] += gv;
    sums[2] += vhv;
    store_packed(a.c + i, c);
  });
  block_sum(sums, shared);
  store_partials({a.scale * sums[0], a.sign * a.scale * sums[1], a.sign * a.scale * sums[2]}, a.partials);
}

// g.u, v.Hu, u.Hu.
template <typename T, template <typename> class Loss>
__global__ void __launch_bounds__(kElementThreads)
    element_products_kernel(const Elements<T, Loss> __grid_constant__ a) {
  using C = Compute<T>;
  __shared__ double shared[kBlockSumSize<3>];
  double sums[3] = {0.0, 0.0, 0.0};
  const T* const base[4] = {a.x, a.v, a.y, a.u};
  walk_elements(split(a.n, a.x, a.v, a.y, a.u), base, [&](int64 i, const auto& piece) {
    const auto x = piece.of[0].unpacked(), v = piece.of[1].unpacked(), y = piece.of[2].unpacked(),
               u = piece.of[3].unpacked();
    C gu = 0, vhu = 0, uhu = 0;
    constexpr int length = sizeof(x.v) / sizeof(C);
    const auto constants = a.loss.template constants<length>(i);
#pragma unroll
    for (int k = 0; k < length; k++) {
      const Derivatives<C> d = a.loss(x.v[k], y.v[k], constants, k);
      const C hu = d.h * u.v[k];
      gu += d.g * u.v[k];
      vhu += hu * v.v[k];
      uhu += hu * u.v[k];
    }
    sums[0] += gu;
    sums[1] += vhu;
    sums[2] += uhu;
  });
  block_sum(sums, shared);
  for (double& sum : sums) sum *= a.sign * a.scale;
  store_partials(sums, a.partials);
}

}  // namespace curveball::cuda
