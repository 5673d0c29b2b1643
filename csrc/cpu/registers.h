// Arithmetic on whole registers of float or double, for the loops of the tangent operators and of Adam's diagonal.
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

// Rounded correctly, as IEEE 754 asks, and so the same from every instruction set.
template <typename T>
CURVEBALL_LANES Register<T> square_root(Register<T> v) {
#if defined(CURVEBALL_AVX512)  // a mask of ones: as for widen
  if constexpr (sizeof(T) == sizeof(float)) return (Register<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
  if constexpr (sizeof(T) == sizeof(double)) return (Register<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(CURVEBALL_AVX2)
  if constexpr (sizeof(T) == sizeof(float)) return (Register<T>)_mm256_sqrt_ps((__m256)v);
  if constexpr (sizeof(T) == sizeof(double)) return (Register<T>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int64_t i = 0; i < kWidth<T>; i++) {
    v[i] = sizeof(T) == sizeof(float) ? __builtin_sqrtf(static_cast<float>(v[i])) : __builtin_sqrt(v[i]);
  }
#endif
  return v;
}

}  // namespace
}  // namespace curveball::cpu
