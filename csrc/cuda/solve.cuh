// The 2x2 system, the rule for lambda and a step between solves, each by one thread: a few hundred instructions, and
// nothing visits the host.
#pragma once

#include "../formulas.h"
#include "types.cuh"

namespace curveball::cuda {

// The new scalars, collected in registers and written at the end: through a pointer that might overlap the old ones,
// every load would have to wait for the store before it.
struct Scalars {
  double v[kScalarCount];
};

__device__ __forceinline__ void store_scalars(double* p, const Scalars& scalars) {
#pragma unroll
  for (int i = 0; i < kScalarCount; i++) p[i] = scalars.v[i];
}

// The rate of a group: from a tensor, if there is one, so that a captured graph sees it change.
__device__ __forceinline__ double learning_rate(const Numbers& lr_tensor, int group, double lr) {
  return lr_tensor.data ? read(lr_tensor, group) : lr;
}

struct SolveArguments {
  const double *previous, *products, *dots;  // dots: null for the adjoint identities
  Numbers loss, lr_tensor;                   // lr_tensor.data: null for the number lr
  double lr, beta, rho, theta, average;
  bool beta_is_fixed, rho_is_fixed, bounded;
  double* next;
};

__global__ void solve_kernel(const SolveArguments __grid_constant__ a) {
  Scalars next;
  const SolveOptions options{a.beta_is_fixed ? &a.beta : nullptr,
                             a.rho_is_fixed ? &a.rho : nullptr,
                             learning_rate(a.lr_tensor, 0, a.lr),
                             a.theta,
                             a.average,
                             a.bounded};
  solve(a.previous, read(a.loss, 0), a.products, a.dots, options, next.v);
  store_scalars(a.next, next);
}

__global__ void adapt_damping_kernel(const double* previous, Numbers new_loss, DampingRule rule, double* result) {
  Scalars next;
  adapt_damping(previous, read(new_loss, 0), rule, next.v);
  store_scalars(result, next);
}

// room.data: null where there is none.
__global__ void keep_coefficients_kernel(const double* previous, Numbers loss, const double* slope, Numbers room,
                                         double sign, double* result) {
  Scalars next;
  const bool bounded = room.data;
  keep_coefficients(previous, read(loss, 0), *slope, bounded, bounded ? read(room, 0) : 0.0, sign, next.v);
  store_scalars(result, next);
}

}  // namespace curveball::cuda
