// Activations with their derivatives, in one pass over memory.
//
// float32 is computed a register at a time, to a few units in the last place; float64 by the functions of the C
// library, an element at a time. Formulas that both share are templates over the value, a register or a number.
#pragma once

#include <cmath>

#include "registers.h"
#include "tangent_kernels.h"

namespace curveball::cpu {
namespace {

template <typename Value>
struct Activated {
  Value y, derivative;
};

typedef int32_t IntRegister __attribute__((vector_size(kRegisterBytes)));

CURVEBALL_LANES double magnitude(double x) { return fabs(x); }
CURVEBALL_LANES Register<float> magnitude(Register<float> x) { return (Register<float>)((IntRegister)x & 0x7fffffff); }

// The smaller of x and limit; NaN of NaN.
CURVEBALL_LANES double at_most(double x, double limit) { return x > limit ? limit : x; }
CURVEBALL_LANES Register<float> at_most(Register<float> x, float limit) { return x > limit ? splat(limit) : x; }

// e^(x + correction) for -150 < x < 89 and |correction| < 0.1, to 2 units in the last place; zero below the smallest
// number, NaN of NaN. With n = round(x / ln 2) and r = x - n ln 2 + correction: 2^n (1 + r + r^2 p(r)). ln 2 is split,
// so that the product of n and its upper part is exact. 2^n in two factors reaches the subnormal numbers, which
// exp_of gives up, as it does the correction.
CURVEBALL_LANES Register<float> exponential(Register<float> x, Register<float> correction = splat(0.0f)) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 0x1.8p23f;  // sums with it have no bits after the point
  const Register<float> rounded = x * kLog2E + kRounder, n = rounded - kRounder;
  const Register<float> r = ((x - n * kLn2High) - n * kLn2Low) + correction;
  const Register<float> p =
      (((1.38144696e-3f * r + 8.36878084e-3f) * r + 4.16683927e-2f) * r + 0.166665196f) * r + 0.499999940f;
  const IntRegister power = (IntRegister)rounded - (IntRegister)splat(kRounder), half = power >> 1;
  const Register<float> result = 1.0f + (r + r * r * p);
  return result * (Register<float>)((half + 127) << 23) * (Register<float>)((power - half + 127) << 23);
}

// ---------------------------------------------------------------------------------------------- gelu

template <typename Value>
struct Normal {
  Value below, density;  // Phi(x), phi(x)
};

CURVEBALL_LANES Normal<double> normal(double x) {
  return {0.5 * erfc(-0.70710678118654752440 * x), 0.39894228040143267794 * exp(-0.5 * x * x)};
}

// Phi(-t) e^(t^2 / 2) for 0 <= t <= 15: a polynomial in (t - 3) / (t + 3), fitted to a relative error of 1e-8.
CURVEBALL_LANES Register<float> scaled_tail(Register<float> t) {
  constexpr float c[] = {1.215139478e-01f, -2.064026147e-01f, 1.232250407e-01f,  -4.621326178e-02f, 6.131942384e-03f,
                         2.904387191e-03f, -9.832883952e-04f, -3.390124475e-04f, 1.150137978e-04f,  5.316157694e-05f};
  const Register<float> q = (t - 3.0f) / (t + 3.0f);
  Register<float> p = c[9] * q + c[8];
  for (int i = 7; i >= 0; i--) p = p * q + c[i];
  return p;
}

// Below zero Phi is never 1 minus something, so it keeps its digits there. The exponent t^2 / 2 must keep its own: the
// upper 12 bits of t have an exact square, and t^2 = upper^2 + (t - upper)(t + upper).
CURVEBALL_LANES Normal<Register<float>> normal(Register<float> x) {
  const Register<float> t = at_most(magnitude(x), 15.0f);
  const Register<float> upper = (Register<float>)((IntRegister)t & ~0xfff);
  const Register<float> e = exponential(-0.5f * upper * upper, -0.5f * (t - upper) * (t + upper));
  const Register<float> tail = e * scaled_tail(t);
  return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * e};
}

// y = x Phi(x);  y' = Phi(x) + x phi(x).
template <typename Value>
Activated<Value> gelu(Value x) {
  const Normal<Value> n = normal(x);
  return {x * n.below, n.below + x * n.density};
}

// ---------------------------------------------------------------------------------------------- silu, gelu by tanh

template <typename Value>
struct Logistic {
  Value below, above;  // s(a) = 1 / (1 + e^-a), and 1 - s(a)
};

// From e^-|a|, so that neither side is 1 minus something.
template <typename Value>
CURVEBALL_LANES Logistic<Value> logistic(Value e, Value sign) {
  const Value larger = 1 / (1 + e), smaller = e * larger;
  return {sign < 0 ? smaller : larger, sign < 0 ? larger : smaller};
}

// e^-|x|.
CURVEBALL_LANES double falling(double x) { return exp(-fabs(x)); }
CURVEBALL_LANES Register<float> falling(Register<float> x) { return exponential(-at_most(magnitude(x), 110.0f)); }

// y = x s(x);  y' = s(x) + y (1 - s(x)).
template <typename Value>
Activated<Value> silu(Value x) {
  const Logistic<Value> s = logistic(falling(x), x);
  const Value y = x * s.below;
  return {y, s.below + y * s.above};
}

constexpr double kLinear = 1.59576912160573071176, kCubic = 0.0713548162726002488;

// a(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3), for which (1 + tanh(a / 2)) / 2 = s(a).
template <typename Value>
CURVEBALL_LANES Value cubic(Value x) {
  return x * (kLinear + kCubic * (x * x));
}

CURVEBALL_LANES double exponential_of_cubic(double t) { return exp(-cubic(t)); }

// The exponent is large where the result is small: float32 would lose its digits there. Beyond 12 the result is zero.
CURVEBALL_LANES Register<float> exponential_of_cubic(Register<float> t) {
  typedef double Wide __attribute__((vector_size(2 * kRegisterBytes)));
  const Wide a = -cubic(__builtin_convertvector(at_most(t, 12.0f), Wide));
  const Register<float> upper = __builtin_convertvector(a, Register<float>);
  return exponential(upper, __builtin_convertvector(a - __builtin_convertvector(upper, Wide), Register<float>));
}

CURVEBALL_LANES double slope_of_cubic(double t) { return kLinear + 3.0 * kCubic * (t * t); }
CURVEBALL_LANES Register<float> slope_of_cubic(Register<float> t) {
  return static_cast<float>(kLinear) + static_cast<float>(3.0 * kCubic) * (t * t);
}

// y = x s(a(x));  y' = s(a) + y (1 - s(a)) a'(x). Beyond 40, s is 0 or 1, and a' must stay finite.
template <typename Value>
Activated<Value> gelu_tanh(Value x) {
  const Value t = at_most(magnitude(x), 40);
  const Logistic<Value> s = logistic(exponential_of_cubic(t), x);
  const Value y = x * s.below;
  return {y, s.below + y * s.above * slope_of_cubic(t)};
}

// ---------------------------------------------------------------------------------------------- loops

template <typename T>
struct Computed {
  using Value = Register<T>;
};
template <>
struct Computed<double> {
  using Value = double;
};

template <typename T, Activated<typename Computed<T>::Value> (*function)(typename Computed<T>::Value)>
void activation_block(const void* x_, void* y_, void* derivative_, int64_t n) {
  using Value = typename Computed<T>::Value;
  constexpr int64_t kStep = sizeof(Value) / sizeof(T);
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  T* derivative = static_cast<T*>(derivative_);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Activated<Value> result = function(read<Value>(x + i));
    write(y + i, result.y);
    write(derivative + i, result.derivative);
  }
  if (i < n) {
    const Activated<Value> result = function(read_some<Value>(x + i, n - i));
    memcpy(y + i, &result.y, (n - i) * sizeof(T));
    memcpy(derivative + i, &result.derivative, (n - i) * sizeof(T));
  }
}

}  // namespace
}  // namespace curveball::cpu
