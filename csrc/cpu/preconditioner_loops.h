// The loop of Adam's diagonal over one block of memory.
#pragma once

#include "../formulas.h"
#include "kernels.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

struct DiagonalSums {
  Sum zpz, zr, ru;
};

// A group of r, in the type of V that computes with it.
template <typename V, typename R>
CURVEBALL_LANES auto load_as(const R* r) {
  if constexpr (sizeof(V) == sizeof(double)) return widen(load(r));
  if constexpr (sizeof(V) != sizeof(double)) return load(r);
}

template <typename V, typename R>
CURVEBALL_LANES void precondition_round(V* u, V* v, const R* r, const V* z, const DiagonalFactors<V>& factors,
                                        bool keep_v, DiagonalSums& sums) {
  for (int64_t group = 0; group < kGroups; group++) {
    const int64_t i = group * kLanes;
    const auto r_i = load_as<V>(r + i);
    const auto new_v = next_v(load(v + i), r_i, factors);
    const auto p = diagonal(square_root(new_v), factors);
    const auto new_u = preconditioned<V>(r_i, new_v, p);
    store(u + i, new_u);
    if (keep_v) store(v + i, new_v);
    sums.ru.groups[group] = add_product(sums.ru.groups[group], r_i, new_u);
    if (z) {
      const auto z_i = load(z + i);
      sums.zr.groups[group] = add_product(sums.zr.groups[group], z_i, r_i);
      sums.zpz.groups[group] += widen(z_i) * widen(z_i) * widen(p);
    }
  }
}

// v' = decay v + (1 - decay) r^2;  p = sqrt(v' / weight) + eps;  u <- r / p;  v <- v' if it is kept;
// result = [z.Pz, z.r, r.u], products and sums in double.
template <typename V, typename R>
void precondition_block(void* u_, void* v_, const void* r_, const void* z_, int64_t n, const DiagonalArguments& a,
                        double* result) {
  V* u = static_cast<V*>(u_);
  V* v = static_cast<V*>(v_);
  const R* r = static_cast<const R*>(r_);
  const V* z = static_cast<const V*>(z_);
  const auto factors = diagonal_factors<V>(a.decay, a.weight, a.eps);
  DiagonalSums sums;
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(u + i, v + i, r + i);
    if (z) prefetch(z + i);
    precondition_round(u + i, v + i, r + i, z ? z + i : nullptr, factors, a.keep_v, sums);
  }
  if (i < n) {
    const int64_t rest = n - i;
    Padded<V> last_v(v + i, rest);
    const Padded<R> last_r(r + i, rest);
    const Padded<V> last_z(z ? z + i : v + i, z ? rest : 0);
    V last_u[kRound];
    precondition_round(last_u, last_v.data, last_r.data, z ? last_z.data : nullptr, factors, a.keep_v, sums);
    copy_some(u + i, last_u, rest);
    if (a.keep_v) copy_some(v + i, last_v.data, rest);
  }
  result[0] = sums.zpz.total();
  result[1] = sums.zr.total();
  result[2] = sums.ru.total();
}

}  // namespace
}  // namespace curveball::cpu
