// Losses that are a sum over the elements of x: squared error, and binary cross-entropy of logits. Their Hessian is
// diagonal, h, so one pass over the elements gives all.
#pragma once

#include "exponentials.h"
#include "loss_kernels.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

// Of several elements, in the type that computes them: the loss and its first and second derivative.
template <typename Vector>
struct Derivatives {
  Vector loss, g, h;
};

// (x - y)^2
struct SquaredError {
  template <typename Vector>
  CURVEBALL_LANES Derivatives<Vector> at(Vector x, Vector y, Vector, Vector) {
    const Vector difference = x - y;
    return {difference * difference, difference + difference, Vector{} + 2};
  }
};

// w [(1-y) x + k softplus(-x)] with k = 1 + (pos_weight - 1) y. With negative = 1-y and positive = pos_weight y, so
// that k = negative + positive, nothing cancels where sigmoid saturates:
//     loss = w [negative softplus(x) + positive softplus(-x)],   g = w [negative sigmoid(x) - positive sigmoid(-x)]
struct BinaryCrossEntropy {
  template <typename Vector>
  CURVEBALL_LANES Derivatives<Vector> at(Vector x, Vector y, Vector w, Vector pos_weight) {
    const Vector negative = 1 - y, positive = pos_weight * y, zero{};
    const Vector e = exp_of(x < 0 ? x : -x);  // exp(-|x|): never overflows
    const Vector large = 1 / (1 + e), small = e * large;
    const Vector above = x < 0 ? small : large, below = x < 0 ? large : small;  // sigmoid(x), sigmoid(-x)
    const Vector rest = log1p_of(e);
    const Vector softplus = (x < 0 ? zero : x) + rest, softplus_of_minus = (x < 0 ? -x : zero) + rest;
    return {w * (negative * softplus + positive * softplus_of_minus), w * (negative * above - positive * below),
            w * (negative + positive) * above * below};
  }
};

// The weights of one round after another.
template <typename C>
class Repeated {
 public:
  Repeated(const void* values, int64_t period, int64_t element)
      : values_(static_cast<const C*>(values)), period_(period), place_(element % period) {}

  const C* next_round() {
    const C* round = values_ + place_;
    place_ += kRound;
    if (place_ >= period_) place_ %= period_;
    return round;
  }

  // Of n elements; what pads the round weighs nothing.
  Padded<C> last_round(int64_t n) const { return {values_ + place_, n}; }

 private:
  const C* values_;
  int64_t period_, place_;
};

// The derivatives at the elements of a round: take(first element, derivatives) for each group of them.
template <typename Loss, typename T, typename Take>
CURVEBALL_LANES void loss_round(const T* x, const T* y, const Compute<T>* w, const Compute<T>* pos_weight, Take take) {
  for (int64_t i = 0; i < kRound; i += kLanes) {
    take(i, Loss::at(load(x + i), load(y + i), load(w + i), load(pos_weight + i)));
  }
}

// Loss, c = g + Hv, g.v, v.Hv.
template <typename Loss, typename T>
void element_cotangent_block(const Elements& a, int64_t begin, int64_t end, double* sums) {
  using C = Compute<T>;
  const T *x = static_cast<const T*>(a.x), *v = static_cast<const T*>(a.v), *y = static_cast<const T*>(a.y);
  T* const c = static_cast<T*>(a.c);
  Repeated<C> weight(a.weight, a.weight_period, begin), pos_weight(a.pos_weight, a.pos_weight_period, begin);
  const C factor = static_cast<C>(a.sign * a.scale);
  Sum loss, gv, vhv;
  const auto round = [&](const T* x, const T* v, const T* y, const C* w, const C* p, T* c)
                         __attribute__((always_inline)) {
                           loss_round<Loss>(x, y, w, p, [&](int64_t i, const auto& at) __attribute__((always_inline)) {
                             const auto tangent = load(v + i), hv = at.h * tangent;
                             const int64_t group = i / kLanes;
                             loss.groups[group] += widen(at.loss);
                             gv.groups[group] = add_product(gv.groups[group], at.g, tangent);
                             vhv.groups[group] = add_product(vhv.groups[group], hv, tangent);
                             store(c + i, factor * (at.g + hv));
                           });
                         };
  int64_t i = begin;
  for (; i + kRound <= end; i += kRound) {
    prefetch(x + i, v + i, y + i);
    round(x + i, v + i, y + i, weight.next_round(), pos_weight.next_round(), c + i);
  }
  if (i < end) {
    const int64_t n = end - i;
    T last_c[kRound];
    round(Padded<T>(x + i, n).data, Padded<T>(v + i, n).data, Padded<T>(y + i, n).data, weight.last_round(n).data,
          pos_weight.last_round(n).data, last_c);
    copy_some(c + i, last_c, n);
  }
  sums[0] = loss.total();
  sums[1] = gv.total();
  sums[2] = vhv.total();
}

// g.u, v.Hu, u.Hu.
template <typename Loss, typename T>
void element_products_block(const Elements& a, int64_t begin, int64_t end, double* sums) {
  using C = Compute<T>;
  const T *x = static_cast<const T*>(a.x), *v = static_cast<const T*>(a.v), *u = static_cast<const T*>(a.u),
          *y = static_cast<const T*>(a.y);
  Repeated<C> weight(a.weight, a.weight_period, begin), pos_weight(a.pos_weight, a.pos_weight_period, begin);
  Sum gu, vhu, uhu;
  const auto round = [&](const T* x, const T* v, const T* u, const T* y, const C* w, const C* p)
                         __attribute__((always_inline)) {
                           loss_round<Loss>(x, y, w, p, [&](int64_t i, const auto& at) __attribute__((always_inline)) {
                             const auto tangent = load(u + i), hu = at.h * tangent;
                             const int64_t group = i / kLanes;
                             gu.groups[group] = add_product(gu.groups[group], at.g, tangent);
                             vhu.groups[group] = add_product(vhu.groups[group], hu, load(v + i));
                             uhu.groups[group] = add_product(uhu.groups[group], hu, tangent);
                           });
                         };
  int64_t i = begin;
  for (; i + kRound <= end; i += kRound) {
    prefetch(x + i, v + i, u + i, y + i);
    round(x + i, v + i, u + i, y + i, weight.next_round(), pos_weight.next_round());
  }
  if (i < end) {
    const int64_t n = end - i;
    round(Padded<T>(x + i, n).data, Padded<T>(v + i, n).data, Padded<T>(u + i, n).data, Padded<T>(y + i, n).data,
          weight.last_round(n).data, pos_weight.last_round(n).data);
  }
  sums[0] = gu.total();
  sums[1] = vhu.total();
  sums[2] = uhu.total();
}

}  // namespace
}  // namespace curveball::cpu
