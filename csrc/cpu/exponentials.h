// exp and log1p of several numbers at a time, accurate to two units in the last place. Multiplications and additions
// only, in an order that the text fixes: every instruction set gives the same bits.
#pragma once

#include <type_traits>

#include "lanes.h"

namespace curveball::cpu {
namespace {

// The value of a polynomial by Horner's rule, the highest coefficient first.
template <typename Vector, typename C, int count>
CURVEBALL_LANES Vector polynomial(Vector x, const C (&coefficients)[count]) {
  Vector sum = Vector{} + coefficients[0];
  for (int i = 1; i < count; i++) sum = sum * x + coefficients[i];
  return sum;
}

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -88.0f, kLog2E = 1.44269504f, kRounder = 0x1.8p23f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kBias = 127, kMantissaBits = 23;
  // Minimax coefficients of (e^r - 1 - r)/r^2 as in Cephes' expf.
  static constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                            4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -709.0, kLog2E = 1.4426950408889634, kRounder = 0x1.8p52;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kBias = 1023, kMantissaBits = 52;
  // 1/13!, ..., 1/2!: the next term is below 2^-57.
  static constexpr double kCoefficients[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                             1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                             1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

// e^x = 2^n e^r for x below 88, or 709 for doubles, with n the integer next to x/log 2 and |r| <= log(2)/2; NaN of NaN.
// Adding kRounder leaves n in the last places of the mantissa. log 2 is subtracted in two parts, the first of so few
// bits that n times it is exact. What would be below the smallest normal number becomes zero: the smallest n is -kBias,
// where the exponent's bits are all zero.
template <typename Vector>
CURVEBALL_LANES Vector exp_of(Vector x) {
  using Constants = ExpConstants<std::remove_reference_t<decltype(x[0])>>;
  using Integers = decltype(x < x);  // of the same size
  x = x < Constants::kLowest ? Vector{} + Constants::kLowest : x;
  const Vector shifted = x * Constants::kLog2E + Constants::kRounder, n = shifted - Constants::kRounder;
  const Vector r = (x - n * Constants::kLn2High) - n * Constants::kLn2Low;
  const Vector e = polynomial(r, Constants::kCoefficients) * (r * r) + r + 1;
  return e * (Vector)(((Integers)shifted + Constants::kBias) << Constants::kMantissaBits);
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
