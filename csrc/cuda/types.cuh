// Numbers in memory and in registers: 16-bit storage, conversions, vectors of 128 bits.
//
// Like all .cuh files here, free of torch and of standard headers, so that NVRTC can read it; with CURVEBALL_EMULATE
// the same text compiles as plain C++ and runs on the CPU (tests/emulator).
#pragma once

#if defined(CURVEBALL_EMULATE)
#include "cuda_on_cpu.h"
#endif

#include "../dtypes.h"

namespace curveball::cuda {

using int64 = long long;

template <typename T>
constexpr DType dtype_of_type = kFloat32;
template <>
constexpr DType dtype_of_type<Float16> = kFloat16;
template <>
constexpr DType dtype_of_type<BFloat16> = kBFloat16;
template <>
constexpr DType dtype_of_type<double> = kFloat64;

// ---------------------------------------------------------------------------------------------- conversions

#if defined(CURVEBALL_EMULATE)
using emulator::float_from_half, emulator::half_from_float, emulator::bfloat_from_float;
inline float float_from_bits(unsigned bits) { return emulator::bit_cast<float>(bits); }
inline unsigned halves_from_floats(float low, float high) { return half_from_float(low) | half_from_float(high) << 16; }
inline unsigned bfloats_from_floats(float low, float high) {
  return bfloat_from_float(low) | bfloat_from_float(high) << 16;
}
#else
__device__ __forceinline__ float float_from_bits(unsigned bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float float_from_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ unsigned short half_from_float(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ unsigned short bfloat_from_float(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Two at once: one instruction instead of two conversions and a merge.
__device__ __forceinline__ unsigned halves_from_floats(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ unsigned bfloats_from_floats(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#endif

// Storage -> arithmetic, exact: to<float>(x), to<double>(x).
template <typename C>
__device__ __forceinline__ C to(Float16 x) {
  return static_cast<C>(float_from_half(x.bits));
}
template <typename C>
__device__ __forceinline__ C to(BFloat16 x) {
  return static_cast<C>(float_from_bits(static_cast<unsigned>(x.bits) << 16));
}
template <typename C>
__device__ __forceinline__ C to(float x) {
  return static_cast<C>(x);
}
template <typename C>
__device__ __forceinline__ C to(double x) {
  return static_cast<C>(x);
}

// Arithmetic -> storage, rounded to nearest even: from<T>(x) with x a Compute<T>.
template <typename T>
struct Rounding {
  __device__ static __forceinline__ T from(T x) { return x; }
};
template <>
struct Rounding<Float16> {
  __device__ static __forceinline__ Float16 from(float x) { return {half_from_float(x)}; }
};
template <>
struct Rounding<BFloat16> {
  __device__ static __forceinline__ BFloat16 from(float x) { return {bfloat_from_float(x)}; }
};
template <typename T>
__device__ __forceinline__ T from(Compute<T> x) {
  return Rounding<T>::from(x);
}

// Numbers of any of the four dtypes, in the device's memory.
struct Numbers {
  const void* data;
  DType dtype;
};

__device__ __forceinline__ double read(const Numbers& numbers, int i) {
  switch (numbers.dtype) {
    case kFloat16:
      return to<double>(static_cast<const Float16*>(numbers.data)[i]);
    case kBFloat16:
      return to<double>(static_cast<const BFloat16*>(numbers.data)[i]);
    case kFloat32:
      return static_cast<const float*>(numbers.data)[i];
    default:
      return static_cast<const double*>(numbers.data)[i];
  }
}

// ---------------------------------------------------------------------------------------------- vectors

// N neighbors in memory. Read or written as a whole, up to 16 bytes are one access; more are several of 16 bytes.
// The address must be a multiple of alignof(Vector).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T v[N];
};

// How many T make 16 bytes.
template <typename T>
constexpr int kVectorLength = 16 / sizeof(T);

template <typename C, typename T, int N>
__device__ __forceinline__ Vector<C, N> to(const Vector<T, N>& x) {
  Vector<C, N> y;
#pragma unroll
  for (int i = 0; i < N; i++) y.v[i] = to<C>(x.v[i]);
  return y;
}

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> from(const Vector<Compute<T>, N>& x) {
  Vector<T, N> y;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    constexpr bool is_half = dtype_of_type<T> == kFloat16;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const unsigned pair = is_half ? halves_from_floats(x.v[i], x.v[i + 1]) : bfloats_from_floats(x.v[i], x.v[i + 1]);
      y.v[i] = {static_cast<unsigned short>(pair & 0xffffu)};
      y.v[i + 1] = {static_cast<unsigned short>(pair >> 16)};
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) y.v[i] = from<T>(x.v[i]);
  }
  return y;
}

// ---------------------------------------------------------------------------------------------- shapes of a launch

// The threads of the block: the constant that the kernel is launched with, so that addresses fold into instructions.
// The emulator tries other numbers too.
template <int Threads>
__device__ __forceinline__ int block_threads() {
#if defined(CURVEBALL_EMULATE)
  return blockDim.x;
#else
  return Threads;
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ void* dynamic_shared() {
#if defined(CURVEBALL_EMULATE)
  return emulator::running.dynamic_shared;
#else
  extern __shared__ __align__(16) unsigned char curveball_dynamic_shared[];
  return curveball_dynamic_shared;
#endif
}

}  // namespace curveball::cuda
