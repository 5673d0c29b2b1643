// Several elements at a time: loading, storing and converting float16, bfloat16, float32 and float64.
//
// Lanes are elements side by side in registers. The vector types are GCC's and Clang's own extension, so the text is
// the same for every instruction set. Google Highway, Sleef and at::vec do the same and more; but here every
// instruction set must give the same bits, which they do not promise, and at::vec is not part of torch's stable ABI.
// Never included before a source file has chosen its instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CURVEBALL_AVX512) || defined(CURVEBALL_AVX2)
#include <immintrin.h>
#endif

#include "../dtypes.h"

namespace curveball::cpu {
namespace {

// Measured with GCC: AVX2 wants exactly one register of doubles (wider vectors pass through memory), AVX-512 too;
// plain SSE2 is best left to split the wider ones.
#if defined(CURVEBALL_AVX2)
constexpr int64_t kLanes = 4;
#else
constexpr int64_t kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

#define CURVEBALL_LANES static inline __attribute__((always_inline))

// Memory need not be aligned: memcpy compiles to one unaligned move.
template <typename Vector>
CURVEBALL_LANES Vector read(const void* source) {
  Vector v;
  memcpy(&v, source, sizeof(v));
  return v;
}

template <typename Vector>
CURVEBALL_LANES void write(void* target, Vector v) {
  memcpy(target, &v, sizeof(v));
}

CURVEBALL_LANES Floats load(const float* p) { return read<Floats>(p); }
CURVEBALL_LANES Doubles load(const double* p) { return read<Doubles>(p); }
CURVEBALL_LANES void store(float* p, Floats v) { write(p, v); }
CURVEBALL_LANES void store(double* p, Doubles v) { write(p, v); }

CURVEBALL_LANES Doubles widen(Doubles v) { return v; }
// GCC 12 makes two conversions and a merge of the builtin, where one instruction does it. (Of the intrinsic without a
// mask it warns that something is uninitialized; a mask of ones costs nothing.)
#if defined(CURVEBALL_AVX512)
CURVEBALL_LANES Doubles widen(Floats v) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)v); }
#elif defined(CURVEBALL_AVX2)
CURVEBALL_LANES Doubles widen(Floats v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }
#else
CURVEBALL_LANES Doubles widen(Floats v) { return __builtin_convertvector(v, Doubles); }
#endif

// sum + a b. The product of two numbers that were float32 is exact in double (2 x 24 bits <= 53), so it does not matter
// to the bits whether the instruction set fuses.
template <typename A, typename B>
CURVEBALL_LANES Doubles add_product(Doubles sum, A x, B y) {
  const Doubles a = widen(x), b = widen(y);
#if defined(CURVEBALL_AVX512)
  if constexpr (sizeof(A) < sizeof(Doubles) && sizeof(B) < sizeof(Doubles)) return _mm512_fmadd_pd(a, b, sum);
#elif defined(CURVEBALL_AVX2)
  if constexpr (sizeof(A) < sizeof(Doubles) && sizeof(B) < sizeof(Doubles)) return _mm256_fmadd_pd(a, b, sum);
#endif
  return sum + a * b;
}

// bfloat16 is the upper half of a float32.
CURVEBALL_LANES Floats load(const BFloat16* p) {
  return (Floats)(__builtin_convertvector(read<Shorts>(p), Words) << 16);
}

// Round to nearest, ties to even: add just under half of the last place, and one more if the last place is odd.
// NaN would overflow into infinity that way, so it is written as the quiet NaN 0x7fc0.
CURVEBALL_LANES void store(BFloat16* p, Floats v) {
  const Words w = (Words)v;
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Words is_nan = (Words)(v != v);  // all ones, or zero
  write(p, __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Shorts));
}

#if defined(CURVEBALL_AVX512)
CURVEBALL_LANES Floats load(const Float16* p) { return (Floats)_mm256_cvtph_ps(read<__m128i>(p)); }
CURVEBALL_LANES void store(Float16* p, Floats v) { write(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(CURVEBALL_AVX2)
CURVEBALL_LANES Floats load(const Float16* p) { return (Floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }
CURVEBALL_LANES void store(Float16* p, Floats v) {
  _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
CURVEBALL_LANES Words choose(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// Without the instruction. Normal: move exponent and mantissa into place and correct the exponent's bias by a
// multiplication (infinity and NaN stay so). Subnormal: put the mantissa below 0.5 and subtract 0.5.
CURVEBALL_LANES Floats load(const Float16* p) {
  const Words w = __builtin_convertvector(read<Shorts>(p), Words) << 16;
  const Words twice = w + w;
  const Floats normal = (Floats)((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const Floats subnormal = (Floats)((twice >> 17) | (126u << 23)) - 0.5f;
  const Words is_subnormal = (Words)(twice < (1u << 27));
  return (Floats)((w & 0x80000000u) | choose(is_subnormal, (Words)subnormal, (Words)normal));
}

// Adding a power of two that depends on the exponent lets the float adder round to nearest even at the right bit;
// the two multiplications send what is too large to infinity. NaN keeps its upper bits, as the instruction does.
CURVEBALL_LANES void store(Float16* p, Floats v) {
  const Words w = (Words)v, twice = w + w, exponent = twice & 0xff000000u;
  const Floats magnitude = ((Floats)(w & 0x7fffffffu) * 0x1p+112f) * 0x1p-110f;
  const Words bias = choose((Words)(exponent < 0x71000000u), Words{} + 0x71000000u, exponent);
  const Words sum = (Words)((Floats)((bias >> 1) + 0x07800000u) + magnitude);
  const Words number = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const Words nan = ((w >> 13) & 0x03ffu) | 0x7e00u;
  const Words is_nan = (Words)(v != v);
  write(p, __builtin_convertvector(((w >> 16) & 0x8000u) | choose(is_nan, nan, number), Shorts));
}
#endif

}  // namespace
}  // namespace curveball::cpu
