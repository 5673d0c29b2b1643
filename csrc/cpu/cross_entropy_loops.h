// Cross-entropy: loss, gradient and Gauss-Newton products in the logits.
//
// x logits, v = Jz, u = Jr, all [N, C]; p = softmax(x), v' = v - <p, v>, u' = u - <p, u>. With own_n the weight of the
// target's class (0 where the target is ignored), t = (1-e) own onehot + e/C weight, s = sum_c t_c, and D = sum_n own_n
// for the mean, 1 for the sum:
//     loss = -1/D sum t log p,   g = sign (s p - t)/D,   Hv = sign s p v'/D,   c = g + Hv
// so that, as <p, v'> = 0,   g.v' = -sign/D sum t v',   v'.Hv' = sign/D sum s p v' v',   and likewise with u'.
//
// A row is swept three times: for its maximum, for sum exp(x - max) and <p, v>, and for the rest. Only the first touch
// of x and of v goes to memory; then they, and the exponentials, are in the caches.
#pragma once

#include "exponentials.h"
#include "loss_kernels.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

template <typename T>
CURVEBALL_LANES Compute<T> number(const T* p) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) return *p;
  return load(Padded<T>(p, 1).data)[0];
}

template <typename T>
CURVEBALL_LANES void set_number(T* p, Compute<T> value) {
  T round[kRound];
  store(round, decltype(load(p)){} + value);
  *p = round[0];
}

template <typename T>
CURVEBALL_LANES void fill(T* p, int64_t n, Compute<T> value) {
  for (int64_t i = 0; i < n; i++) set_number(p + i, value);
}

template <typename Vector>
CURVEBALL_LANES Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

// Halves against halves, as a chain would take longer than the rest of a short row.
template <typename Vector, typename C>
CURVEBALL_LANES C largest(Vector m, C) {
  C top[kLanes];
  memcpy(top, &m, sizeof(m));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < half; i++) top[i] = top[i] > top[i + half] ? top[i] : top[i + half];
  }
  return top[0];
}

// Copies a row to `e`, which it pads with -inf to a full round, and returns the maximum. As that begins at the lowest
// finite number, x = -inf simply adds nothing later. A NaN or +inf in x will make the sums NaN.
template <typename T, typename C>
CURVEBALL_LANES C copy_row(const T* x, int64_t n, C* e) {
  using Vector = decltype(load(x));
  constexpr C kLowest = sizeof(C) == 8 ? -1.7976931348623157e308 : -3.4028234663852886e38f;
  Vector maxima = Vector{} + kLowest, lane{};
  for (int64_t k = 0; k < kLanes; k++) lane[k] = static_cast<C>(k);
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(x + i);
    for (int64_t k = i; k < i + kRound; k += kLanes) {
      const Vector logits = load(x + k);
      maxima = larger(logits, maxima);
      store(e + k, logits);
    }
  }
  if (i < n) {
    const Padded<T> last(x + i, n - i);
    for (int64_t k = 0; k < kRound; k += kLanes) {
      const Vector logits = lane < static_cast<C>(n - i - k) ? load(last.data + k) : Vector{} - C(INFINITY);
      maxima = larger(logits, maxima);
      store(e + i + k, logits);
    }
  }
  return largest(maxima, C{});
}

struct SoftmaxSums {
  double sum, dot;
};

// e <- exp(e - maximum), 0 in the padding; returns the sums of e and of e v.
template <typename T, typename C>
CURVEBALL_LANES SoftmaxSums exponentiate(C* e, C maximum, const T* v, int64_t n) {
  Sum sum, dot;
  const auto round = [&](C* e, const T* v) __attribute__((always_inline)) {
    for (int64_t group = 0; group < kGroups; group++) {
      const int64_t i = group * kLanes;
      const auto exponentials = exp_of(load(e + i) - maximum);
      store(e + i, exponentials);
      sum.groups[group] += widen(exponentials);
      dot.groups[group] = add_product(dot.groups[group], exponentials, load(v + i));
    }
  };
  int64_t i = 0;
  for (; i + kRound <= n; i += kRound) {
    prefetch(v + i);
    round(e + i, v + i);
  }
  if (i < n) round(e + i, Padded<T>(v + i, n - i).data);
  return {sum.total(), dot.total()};
}

// What an ignored target, or one that is no class, puts in the place of numbers: 0, or NaN.
template <typename C>
CURVEBALL_LANES C no_class(const CrossEntropy& a, int64_t target) {
  return target == a.ignore_index ? C(0) : static_cast<C>(NAN);
}

template <typename T, bool smoothed>
void cross_entropy_cotangent_rows(const CrossEntropy& a, int64_t begin, int64_t end, void* scratch, double* sums) {
  using C = Compute<T>;
  C* const e = static_cast<C*>(scratch);
  const C* const weight = static_cast<const C*>(a.weight);
  const int64_t classes = a.classes;
  double loss = 0.0, gv = 0.0, vhv = 0.0;  // without 1/D and sign
  for (int64_t n = begin; n < end; n++) {
    const T *x = static_cast<const T*>(a.x) + n * classes, *v = static_cast<const T*>(a.v) + n * classes;
    T* const c = static_cast<T*>(a.c) + n * classes;
    C* const row = static_cast<C*>(a.row_stats) + 3 * n;
    const int64_t y = a.target[n];
    if (y == a.ignore_index || y < 0 || y >= classes) {
      const C value = no_class<C>(a, y);
      fill(c, classes, value);
      row[0] = row[1] = row[2] = value;
      loss += value;
      continue;
    }
    const double hit = a.keep * (weight ? weight[y] : C(1)), s = hit + a.smooth * a.weights;
    const C c_hit = static_cast<C>(a.sign * hit * a.inverse), c_smooth = static_cast<C>(a.sign * a.smooth * a.inverse);

    const C maximum = copy_row(x, classes, e);
    const C own_x = e[y] - maximum;
    const SoftmaxSums softmax = exponentiate(e, maximum, v, classes);
    const C mean_v = static_cast<C>(softmax.dot / softmax.sum), own_v = number(v + y) - mean_v;
    const C scale = static_cast<C>(a.sign * s * a.inverse / softmax.sum);  // c = scale e (1 + v') - sign t/D
    Sum row_vhv, smooth_x, smooth_v;
    const auto round = [&](const C* e, const T* x, const T* v, const C* w, T* c) __attribute__((always_inline)) {
      for (int64_t group = 0; group < kGroups; group++) {
        const int64_t i = group * kLanes;
        const auto exponentials = load(e + i), centered = load(v + i) - mean_v, product = exponentials * centered;
        auto out = scale * (exponentials + product);
        row_vhv.groups[group] = add_product(row_vhv.groups[group], product, centered);
        if constexpr (smoothed) {
          const auto weights = load(w + i);
          smooth_x.groups[group] = add_product(smooth_x.groups[group], weights, load(x + i) - maximum);
          smooth_v.groups[group] = add_product(smooth_v.groups[group], weights, centered);
          out -= c_smooth * weights;
        }
        store(c + i, out);
      }
    };
    const C own_e = e[y];
    int64_t i = 0;
    for (; i + kRound <= classes; i += kRound) round(e + i, x + i, v + i, weight + i, c + i);
    if (i < classes) {
      const int64_t rest = classes - i;
      T last_c[kRound];
      round(e + i, Padded<T>(x + i, smoothed ? rest : 0).data, Padded<T>(v + i, rest).data,
            Padded<C>(weight + i, smoothed ? rest : 0).data, last_c);
      copy_some(c + i, last_c, rest);
    }
    // As in `round`, and less what belongs to the target, before it is rounded.
    C own_c = scale * (own_e + own_e * own_v);
    if (smoothed) own_c -= c_smooth * weight[y];
    set_number(c + y, own_c - c_hit);

    const double log_sum = log(softmax.sum);
    loss += s * log_sum - hit * own_x;
    gv -= hit * own_v;
    vhv += row_vhv.total() * (s / softmax.sum);
    if (smoothed) {
      loss -= a.smooth * smooth_x.total();
      gv -= a.smooth * smooth_v.total();
    }
    row[0] = static_cast<C>(maximum + log_sum);
    row[1] = mean_v;
    row[2] = static_cast<C>(s * a.inverse);
  }
  sums[0] = loss;
  sums[1] = gv;
  sums[2] = vhv;
}

// The logits are normalized again, so that the rounding of their normalizer, which grows with |x|, does not matter.
template <typename T, bool smoothed>
void cross_entropy_products_rows(const CrossEntropy& a, int64_t begin, int64_t end, void* scratch, double* sums) {
  using C = Compute<T>;
  C* const e = static_cast<C*>(scratch);
  const C* const weight = static_cast<const C*>(a.weight);
  const int64_t classes = a.classes;
  double gu = 0.0, vhu = 0.0, uhu = 0.0;  // without the sign
  for (int64_t n = begin; n < end; n++) {
    const int64_t y = a.target[n];
    if (y == a.ignore_index || y < 0 || y >= classes) {
      gu += no_class<C>(a, y);
      continue;
    }
    const T *x = static_cast<const T*>(a.x) + n * classes, *v = static_cast<const T*>(a.v) + n * classes,
            *u = static_cast<const T*>(a.u) + n * classes;
    const C* const row = static_cast<const C*>(a.row_stats) + 3 * n;
    const C mean_v = row[1], share = row[2];
    const SoftmaxSums softmax = exponentiate(e, copy_row(x, classes, e), u, classes);
    const C mean_u = static_cast<C>(softmax.dot / softmax.sum);
    Sum row_vhu, row_uhu, smooth_u;
    const auto round = [&](const C* e, const T* v, const T* u, const C* w) __attribute__((always_inline)) {
      for (int64_t group = 0; group < kGroups; group++) {
        const int64_t i = group * kLanes;
        const auto centered = load(u + i) - mean_u, product = load(e + i) * centered;
        row_vhu.groups[group] = add_product(row_vhu.groups[group], product, load(v + i) - mean_v);
        row_uhu.groups[group] = add_product(row_uhu.groups[group], product, centered);
        if constexpr (smoothed) smooth_u.groups[group] = add_product(smooth_u.groups[group], load(w + i), centered);
      }
    };
    int64_t i = 0;
    for (; i + kRound <= classes; i += kRound) {
      prefetch(v + i);
      round(e + i, v + i, u + i, weight + i);
    }
    if (i < classes) {
      const int64_t rest = classes - i;
      round(e + i, Padded<T>(v + i, rest).data, Padded<T>(u + i, rest).data,
            Padded<C>(weight + i, smoothed ? rest : 0).data);
    }
    const double factor = share / softmax.sum;
    vhu += factor * row_vhu.total();
    uhu += factor * row_uhu.total();
    // Without smoothing t/D is s/D, which `row_stats` holds, and D need not be known.
    gu -= (smoothed ? a.keep * weight[y] * a.inverse : share) * (number(u + y) - mean_u);
    if (smoothed) gu -= a.smooth * a.inverse * smooth_u.total();
  }
  sums[0] = gu;
  sums[1] = vhu;
  sums[2] = uhu;
}

template <typename T>
void cross_entropy_cotangent_block(const CrossEntropy& a, int64_t begin, int64_t end, void* scratch, double* sums) {
  const auto block = a.smooth != 0.0 ? cross_entropy_cotangent_rows<T, true> : cross_entropy_cotangent_rows<T, false>;
  block(a, begin, end, scratch, sums);
}

template <typename T>
void cross_entropy_products_block(const CrossEntropy& a, int64_t begin, int64_t end, void* scratch, double* sums) {
  const auto block = a.smooth != 0.0 ? cross_entropy_products_rows<T, true> : cross_entropy_products_rows<T, false>;
  block(a, begin, end, scratch, sums);
}

}  // namespace
}  // namespace curveball::cpu
