// Arithmetic on whole registers of float or double, for the loops of the tangent operators.
//
// As in lanes.h the vector types are GCC's and Clang's own extension. Included after a source file has chosen its
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace curveball::cpu {
namespace {

#if defined(CURVEBALL_AVX512)
constexpr int64_t kRegisterBytes = 64;
#elif defined(CURVEBALL_AVX2)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

template <typename T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(kRegisterBytes)));
};
template <typename T>
using Register = typename RegisterOf<T>::type;
typedef int32_t IntRegister __attribute__((vector_size(kRegisterBytes)));

template <typename T>
constexpr int64_t kWidth = kRegisterBytes / static_cast<int64_t>(sizeof(T));

// x - 0 is x, -0 included, and compiles to a broadcast alone.
template <typename T>
CURVEBALL_LANES Register<T> splat(T x) {
  return x - Register<T>{};
}

template <typename Vector, typename T>
CURVEBALL_LANES Vector read_some(const T* p, int64_t n) {
  Vector v = {};
  memcpy(&v, p, n * sizeof(T));
  return v;
}

// a b + c, rounded once where the instruction set can: for matrix products, which it makes twice as fast. Only there do
// instruction sets differ in the last bits.
template <typename T>
CURVEBALL_LANES Register<T> multiply_add(Register<T> a, Register<T> b, Register<T> c) {
#if defined(CURVEBALL_AVX512)
  if constexpr (sizeof(T) == sizeof(float)) return (Register<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(T) == sizeof(double)) return (Register<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(CURVEBALL_AVX2)
  if constexpr (sizeof(T) == sizeof(float)) return (Register<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(T) == sizeof(double)) return (Register<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  return a * b + c;
}

// e^(x + correction) for -150 < x < 89 and |correction| < 0.1, to 2 units in the last place; zero below the smallest
// number, NaN of NaN. With n = round(x / ln 2) and r = x - n ln 2 + correction: 2^n (1 + r + r^2 p(r)). ln 2 is split,
// so that the product of n and its upper part is exact. 2^n in two factors reaches the subnormal numbers.
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

}  // namespace
}  // namespace curveball::cpu
