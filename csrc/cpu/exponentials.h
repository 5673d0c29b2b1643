// exp and log1p of several numbers at a time, accurate to two units in the last place. Multiplications and additions
// only, in an order that the text fixes: every instruction set gives the same bits.
#pragma once

#include "lanes.h"

namespace curveball::cpu {
namespace {

typedef uint64_t LongWords __attribute__((vector_size(kLanes * sizeof(uint64_t))));

// The value of a polynomial by Horner's rule, the highest coefficient first.
template <typename Vector, typename C, int count>
CURVEBALL_LANES Vector polynomial(Vector x, const C (&coefficients)[count]) {
  Vector sum = Vector{} + coefficients[0];
  for (int i = 1; i < count; i++) sum = sum * x + coefficients[i];
  return sum;
}

// e^x = 2^n e^r for x below 88, with n the integer next to x/log 2 and |r| <= log(2)/2. Adding 1.5 * 2^23 leaves n in
// the last places of the mantissa. log 2 is subtracted in two parts, the first of so few bits that n times it is exact.
// What would be below 2^-126 becomes zero: the smallest n is -127, where the exponent's bits are all zero.
CURVEBALL_LANES Floats exp_of(Floats x) {
  x = x < -88.0f ? Floats{} - 88.0f : x;
  const Floats shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // Minimax coefficients of (e^r - 1 - r)/r^2 as in Cephes' expf.
  constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Floats e = polynomial(r, kCoefficients) * (r * r) + r + 1.0f;
  return e * (Floats)(((Words)shifted + 127u) << 23);
}

// The same for x below 709; the smallest n is -1023.
CURVEBALL_LANES Doubles exp_of(Doubles x) {
  x = x < -709.0 ? Doubles{} - 709.0 : x;
  const Doubles shifted = x * 1.4426950408889634 + 0x1.8p52, n = shifted - 0x1.8p52;
  const Doubles r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // 1/13!, ..., 1/2!: the next term is below 2^-57.
  constexpr double kCoefficients[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                      1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                      1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  const Doubles e = polynomial(r, kCoefficients) * (r * r) + r + 1.0;
  return e * (Doubles)(((LongWords)shifted + 1023u) << 52);
}

// log(1 + e) for 0 <= e <= 1: 2 artanh s with s = e/(2 + e) <= 1/3, by its series 2 s (1 + s^2/3 + s^4/5 + ...).
CURVEBALL_LANES Floats log1p_of(Floats e) {
  constexpr float kCoefficients[] = {1.0f / 15, 1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  const Floats s = e / (2.0f + e);
  return 2.0f * s * polynomial(s * s, kCoefficients);
}

CURVEBALL_LANES Doubles log1p_of(Doubles e) {
  constexpr double kCoefficients[] = {1.0 / 33, 1.0 / 31, 1.0 / 29, 1.0 / 27, 1.0 / 25, 1.0 / 23,
                                      1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11,
                                      1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
  const Doubles s = e / (2.0 + e);
  return 2.0 * s * polynomial(s * s, kCoefficients);
}

}  // namespace
}  // namespace curveball::cpu
