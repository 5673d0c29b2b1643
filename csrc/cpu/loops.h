// The loops over one block of memory, the CPU's kernels: update, dots and squares, for every offered combination of
// dtypes, and the table of all loops.
//
// loops_*.cpp include this, and the other *_loops.h, after choosing an instruction set. Everything has internal
// linkage: the linker must never merge a function compiled for AVX-512 with its namesake for older processors.
#pragma once

#include "../formulas.h"
#include "basis_loops.h"
#include "cross_entropy_loops.h"
#include "elementwise_loss_loops.h"
#include "kernels.h"
#include "preconditioner_loops.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

template <typename W, typename Z, typename R>
CURVEBALL_LANES void update_round(W* w, Z* z, const R* r, const UpdateFactors<Z>& factors, Sum& sum) {
  for (int64_t group = 0; group < kGroups; group++) {
    const int64_t i = group * kLanes;
    const auto new_z = next_z(load(z + i), load(r + i), factors);
    const auto new_w = next_w(load(w + i), new_z, factors);
    store(z + i, new_z);
    store(w + i, new_w);
    sum.groups[group] = add_product(sum.groups[group], new_z, new_z);
  }
}

// z <- keep z - beta r;  w <- shrink w + lr z;  returns the sum of z^2.
template <typename W, typename Z, typename R>
double update_block(void* w_, void* z_, const void* r_, int64_t n, const UpdateArguments& a) {
  W* w = static_cast<W*>(w_);
  Z* z = static_cast<Z*>(z_);
  const R* r = static_cast<const R*>(r_);
  const auto factors = update_factors<Z>(a.beta, a.rho, a.direction_damping, a.lr, a.weight_decay);
  Sum sum;
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(w + i, z + i, r + i);
    update_round(w + i, z + i, r + i, factors, sum);
  }
  if (i < n) {
    Padded<W> last_w(w + i, n - i);
    Padded<Z> last_z(z + i, n - i);
    const Padded<R> last_r(r + i, n - i);
    update_round(last_w.data, last_z.data, last_r.data, factors, sum);
    copy_some(w + i, last_w.data, n - i);
    copy_some(z + i, last_z.data, n - i);
  }
  return sum.total();
}

template <typename Z, typename R>
CURVEBALL_LANES void dots_round(const Z* z, const R* r, Sum& zz, Sum& zr, Sum& rr) {
  for (int64_t group = 0; group < kGroups; group++) {
    const auto a = load(z + group * kLanes);
    const auto b = load(r + group * kLanes);
    zz.groups[group] = add_product(zz.groups[group], a, a);
    zr.groups[group] = add_product(zr.groups[group], a, b);
    rr.groups[group] = add_product(rr.groups[group], b, b);
  }
}

// result = [z.z, z.r, r.r], products and sums in double.
template <typename Z, typename R>
void dots_block(const void* z_, const void* r_, int64_t n, double* result) {
  const Z* z = static_cast<const Z*>(z_);
  const R* r = static_cast<const R*>(r_);
  Sum zz, zr, rr;
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(z + i, r + i);
    dots_round(z + i, r + i, zz, zr, rr);
  }
  if (i < n) dots_round(Padded<Z>(z + i, n - i).data, Padded<R>(r + i, n - i).data, zz, zr, rr);
  result[0] = zz.total();
  result[1] = zr.total();
  result[2] = rr.total();
}

template <typename Z>
CURVEBALL_LANES void squares_round(const Z* z, Sum& sum) {
  for (int64_t group = 0; group < kGroups; group++) {
    const auto a = load(z + group * kLanes);
    sum.groups[group] = add_product(sum.groups[group], a, a);
  }
}

template <typename Z>
double squares_block(const void* z_, int64_t n) {
  const Z* z = static_cast<const Z*>(z_);
  Sum sum;
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(z + i);
    squares_round(z + i, sum);
  }
  if (i < n) squares_round(Padded<Z>(z + i, n - i).data, sum);
  return sum.total();
}

template <typename T>
constexpr void add_losses(LossKernels& k, DType dtype) {
  k.cross_entropy_cotangent[dtype] = cross_entropy_cotangent_block<T>;
  k.cross_entropy_products[dtype] = cross_entropy_products_block<T>;
  k.mse_cotangent[dtype] = element_cotangent_block<SquaredError, T>;
  k.mse_products[dtype] = element_products_block<SquaredError, T>;
  k.bce_cotangent[dtype] = element_cotangent_block<BinaryCrossEntropy, T>;
  k.bce_products[dtype] = element_products_block<BinaryCrossEntropy, T>;
}

template <typename T>
constexpr void add_metric(MetricKernels& k, DType dtype) {
  k.precondition[dtype][kFloat16] = precondition_block<T, Float16>;
  k.precondition[dtype][kBFloat16] = precondition_block<T, BFloat16>;
  k.precondition[dtype][dtype] = precondition_block<T, T>;
  k.average[dtype] = average_block<T>;
  k.tile[dtype] = tile_block<T>;
  k.gram[dtype] = gram_block<T>;
}

// z is float32 for weights of at most 32 bits and float64 for float64; r has the dtype of w or of z.
constexpr Kernels make_kernels(const char* name) {
  Kernels k{name, {}, {}, {}, {}, {}};
  add_metric<float>(k.metric, kFloat32);
  add_metric<double>(k.metric, kFloat64);
  add_losses<Float16>(k.losses, kFloat16);
  add_losses<BFloat16>(k.losses, kBFloat16);
  add_losses<float>(k.losses, kFloat32);
  add_losses<double>(k.losses, kFloat64);
  k.update[kFloat16][kFloat16] = update_block<Float16, float, Float16>;
  k.update[kFloat16][kFloat32] = update_block<Float16, float, float>;
  k.update[kBFloat16][kBFloat16] = update_block<BFloat16, float, BFloat16>;
  k.update[kBFloat16][kFloat32] = update_block<BFloat16, float, float>;
  k.update[kFloat32][kFloat32] = update_block<float, float, float>;
  k.update[kFloat64][kFloat64] = update_block<double, double, double>;
  k.dots[kFloat32][kFloat16] = dots_block<float, Float16>;
  k.dots[kFloat32][kBFloat16] = dots_block<float, BFloat16>;
  k.dots[kFloat32][kFloat32] = dots_block<float, float>;
  k.dots[kFloat32][kFloat64] = dots_block<float, double>;
  k.dots[kFloat64][kFloat16] = dots_block<double, Float16>;
  k.dots[kFloat64][kBFloat16] = dots_block<double, BFloat16>;
  k.dots[kFloat64][kFloat32] = dots_block<double, float>;
  k.dots[kFloat64][kFloat64] = dots_block<double, double>;
  k.squares[kFloat32] = squares_block<float>;
  k.squares[kFloat64] = squares_block<double>;
  return k;
}

}  // namespace
}  // namespace curveball::cpu
