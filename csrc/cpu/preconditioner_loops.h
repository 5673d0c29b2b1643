// The loop of Adam's diagonal over one block of memory.
#pragma once

#include "../formulas.h"
#include "kernels.h"
#include "registers.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

struct DiagonalSums {
  Sum zpz, zr, ru;
};

// A round of r as numbers of type V: r itself, or converted into `room`.
template <typename V>
CURVEBALL_LANES const V* as_numbers(const V* r, V*) {
  return r;
}

template <typename V, typename R>
CURVEBALL_LANES const V* as_numbers(const R* r, V* room) {
  for (int64_t i = 0; i < kRound; i += kLanes) {
    if constexpr (sizeof(V) == sizeof(double)) store(room + i, widen(load(r + i)));
    if constexpr (sizeof(V) != sizeof(double)) store(room + i, load(r + i));
  }
  return room;
}

// Whole registers for roots and quotients, which take the most time, and then groups for the sums in double. u, which
// may be r, is written at the end.
template <bool kHasZ, typename V, typename R>
CURVEBALL_LANES void precondition_round(V* u, V* v, const R* r_, const V* z, const DiagonalFactors<V>& factors,
                                        bool keep_v, DiagonalSums& sums) {
  V room[kRound], p[kRound], new_u[kRound];
  const V* const r = as_numbers(r_, room);
  for (int64_t i = 0; i < kRound; i += kWidth<V>) {
    const auto r_i = read<Register<V>>(r + i);
    const auto new_v = next_v(read<Register<V>>(v + i), r_i, factors);
    const auto p_i = diagonal(square_root<V>(new_v), factors);
    if (keep_v) write(v + i, new_v);
    write(p + i, p_i);
    write(new_u + i, preconditioned<V>(r_i, new_v, p_i));
  }
  for (int64_t group = 0; group < kGroups; group++) {
    const int64_t i = group * kLanes;
    sums.ru.groups[group] = add_product(sums.ru.groups[group], load(r + i), load(new_u + i));
    if constexpr (kHasZ) {
      const auto z_i = load(z + i);
      sums.zr.groups[group] = add_product(sums.zr.groups[group], z_i, load(r + i));
      sums.zpz.groups[group] += widen(z_i) * widen(z_i) * widen(load(p + i));
    }
  }
  for (int64_t i = 0; i < kRound; i += kWidth<V>) write(u + i, read<Register<V>>(new_u + i));
}

// v' = decay v + (1 - decay) r^2;  p = sqrt(v' / weight) + eps;  u <- r / p;  v <- v' if it is kept.
template <bool kHasZ, typename V, typename R>
CURVEBALL_LANES DiagonalSums precondition_all(V* u, V* v, const R* r, const V* z, int64_t n,
                                              const DiagonalArguments& a) {
  const auto factors = diagonal_factors<V>(a.decay, a.weight, a.eps);
  DiagonalSums sums;
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(u + i, v + i, r + i);
    if constexpr (kHasZ) prefetch(z + i);
    precondition_round<kHasZ>(u + i, v + i, r + i, kHasZ ? z + i : nullptr, factors, a.keep_v, sums);
  }
  if (i < n) {
    const int64_t rest = n - i;
    V last_u[kRound];
    Padded<V> last_v(v + i, rest);
    const Padded<R> last_r(r + i, rest);
    const Padded<V> last_z(kHasZ ? z + i : nullptr, kHasZ ? rest : 0);
    precondition_round<kHasZ>(last_u, last_v.data, last_r.data, last_z.data, factors, a.keep_v, sums);
    copy_some(u + i, last_u, rest);
    if (a.keep_v) copy_some(v + i, last_v.data, rest);
  }
  return sums;
}

// result = [z.Pz, z.r, r.u], products and sums in double.
template <typename V, typename R>
void precondition_block(void* u_, void* v_, const void* r_, const void* z_, int64_t n, const DiagonalArguments& a,
                        double* result) {
  V* u = static_cast<V*>(u_);
  V* v = static_cast<V*>(v_);
  const R* r = static_cast<const R*>(r_);
  const V* z = static_cast<const V*>(z_);
  const DiagonalSums sums = z ? precondition_all<true>(u, v, r, z, n, a) : precondition_all<false>(u, v, r, z, n, a);
  result[0] = sums.zpz.total();
  result[1] = sums.zr.total();
  result[2] = sums.ru.total();
}

}  // namespace
}  // namespace curveball::cpu
