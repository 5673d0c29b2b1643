// The words of CUDA C++ that the kernels use, in plain C++ on top of the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "emulator.h"

// Internal linkage lets static local variables, which __shared__ ones become, share one section of the module.
#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__ &  // written after the type: the parameter is not copied onto every stack
#define __restrict__ __restrict
#define __shared__ static __attribute__((section("curveball_shared")))

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define threadIdx (emulator::running.thread)
#define blockIdx (emulator::running.block)
#define blockDim (emulator::running.block_size)
#define gridDim (emulator::running.grid_size)

// Two last parameters, which tell the place of the call.
#define CURVEBALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CURVEBALL_SITE) { emulator::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CURVEBALL_SITE) {
  emulator::exchange(mask, 0, threadIdx.x % 32, {file, line});
}

namespace emulator {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// `source`, if it lies in this lane's segment of `width` lanes, else the lane itself.
inline int within(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }

// ------------------------------------------------------------------------------------- 16-bit conversions

inline float float_from_half(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                         : std::ldexp(static_cast<float>(mantissa), -24);
  return std::copysign(magnitude, bits >> 15 ? -1.0f : 1.0f);
}

inline unsigned short half_from_float(float x) {
  if (x != x) return 0x7fff;
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // In units of the last place; nearbyint rounds to nearest even. A carry moves on into the exponent by itself.
  const int exponent = std::max(std::ilogb(magnitude), -14);
  if (magnitude == 0.0f) return sign;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<unsigned short>(sign | (((exponent + 14) << 10) + units));
}

inline unsigned short bfloat_from_float(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bit_cast<uint32_t>(x);
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ------------------------------------------------------------------------------------- the host's side

using Stream = int;

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline Stream current_stream(int) { return 0; }

inline int max_shared_bytes(int) { return settings.max_shared_bytes; }

template <typename... Parameters>
void raise_shared_limit(void (*kernel)(Parameters...), int bytes) {
  allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  run(blocks, threads, shared_bytes, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CURVEBALL_SITE) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() ^ distance, width), {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, CURVEBALL_SITE) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() + distance, width), {file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, CURVEBALL_SITE) {
  return emulator::shuffle(mask, value, emulator::within(emulator::lane() - distance, width), {file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CURVEBALL_SITE) {
  const int segment = emulator::lane() / width * width;
  return emulator::shuffle(mask, value, segment + source % width, {file, line});
}
