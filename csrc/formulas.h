// The formulas of CurveBall, each written once: the update of an element, Adam's diagonal, the 2x2 solve, the rule for
// lambda, a step between solves.
//
// Plain C++ without torch headers, so that the CPU loops, CUDA kernels and NVRTC all read this same text.
// Notation, as in docs/method.md: w weights, z the state, J the Jacobian of the outputs, H the Hessian of the
// loss in the outputs, g its gradient there, r = J'(g + theta HJz), u = r in the metric of the weights (P^-1 r),
// Delta = u + s z with the direction damping s = theta lambda.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define CURVEBALL_INLINE static __host__ __device__ __forceinline__
#else
#define CURVEBALL_INLINE static inline __attribute__((always_inline))
#endif

namespace curveball {

// True for numbers, false for NaN and infinities (inf - inf is NaN). Needs no header, so it works everywhere.
CURVEBALL_INLINE bool is_finite(double x) { return x - x == 0.0; }

// The smallest normal number, and that over epsilon: from there on the product with an epsilon is normal, too.
template <typename T>
constexpr T kSmallestNormal = static_cast<T>(sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022);
template <typename T>
constexpr T kNegligible = static_cast<T>(sizeof(T) == 4 ? 0x1p-103 : 0x1p-970);

// x, and zero where |x| < limit. NaN stays. `Value` is a scalar T or a vector of T.
template <typename Value, typename T>
CURVEBALL_INLINE Value zero_below(T limit, Value x) {
  return (x < limit) & (x > -limit) ? Value{} : x;
}

// ---------------------------------------------------------------------------------------------- update

// The four factors of the update in the type that computes it.
template <typename T>
struct UpdateFactors {
  T keep;    // rho - beta s: how much of z stays
  T beta;    // how much of u is subtracted
  T shrink;  // 1 - lr weight_decay
  T lr;
};

// Formed in double and rounded to T once, so that float32 does not see the cancellation in rho - beta s.
template <typename T>
CURVEBALL_INLINE UpdateFactors<T> update_factors(double beta, double rho, double direction_damping, double lr,
                                                 double weight_decay) {
  return {static_cast<T>(rho - beta * direction_damping), static_cast<T>(beta), static_cast<T>(1.0 - lr * weight_decay),
          static_cast<T>(lr)};
}

// z <- rho z - beta Delta = (rho - beta s) z - beta r, where u = r. `Value` is a scalar T or a vector of T.
//
// Where r stays zero, as in a unit that is dead, z decays, and would become subnormal in the end, which a CPU
// multiplies fifty times slower in Jz. So z is zero below the smallest normal number over epsilon, where its products
// are normal.
template <typename Value, typename T>
CURVEBALL_INLINE Value next_z(Value z, Value r, const UpdateFactors<T>& f) {
  return zero_below(kNegligible<T>, f.keep * z - f.beta * r);
}

// w <- (1 - lr weight_decay) w + lr z, with the new z.
template <typename Value, typename T>
CURVEBALL_INLINE Value next_w(Value w, Value z, const UpdateFactors<T>& f) {
  return f.shrink * w + f.lr * z;
}

// ---------------------------------------------------------------------------------------------- precondition

// What Adam's diagonal is made of, in the type that computes it.
template <typename T>
struct DiagonalFactors {
  T keep;   // decay: how much of v stays
  T take;   // 1 - decay: how much of r^2 comes in
  T scale;  // weight^(-1/2), with weight = 1 - decay^t: v starts at zero, and so is too small by that
  T eps;
};

// Formed in double and rounded to T once.
template <typename T>
CURVEBALL_INLINE DiagonalFactors<T> diagonal_factors(double decay, double weight, double eps) {
  return {static_cast<T>(decay), static_cast<T>(1.0 - decay), static_cast<T>(1.0 / sqrt(weight)), static_cast<T>(eps)};
}

// v <- decay v + (1 - decay) r^2
//
// Where r stays zero, v decays and would become subnormal, which a CPU multiplies fifty times slower; so it is zero
// then. Its bound is lower than that of z: nothing small is multiplied with v, only its root is used, and v is a
// square. Zero below 2^-103 would leave |r| < 1e-14 divided by eps alone.
template <typename Value, typename T>
CURVEBALL_INLINE Value next_v(Value v, Value r, const DiagonalFactors<T>& f) {
  const Value next = f.keep * v + f.take * (r * r);  // is not negative
  return next < kSmallestNormal<T> ? Value{} : next;
}

// p = sqrt(v / weight) + eps, out of the square root of the new v, which a vector takes in another way than a scalar.
template <typename Value, typename T>
CURVEBALL_INLINE Value diagonal(Value root_v, const DiagonalFactors<T>& f) {
  return f.scale * root_v + f.eps;
}

// u = r / p, with the new v. Zero if it is nearly subnormal, as u goes into Ju as z goes into Jz (next_z).
//
// v - v is zero, but NaN where v is not finite. So u is NaN where r is infinite, or so large that r^2 is, which would
// otherwise give a u of zero: r.u then says that the step is none.
template <typename T, typename Value>
CURVEBALL_INLINE Value preconditioned(Value r, Value v, Value p) {
  return zero_below(kNegligible<T>, r / p + (v - v));
}

// ---------------------------------------------------------------------------------------------- solve

// What one step hands to the next: a float64 vector with these places.
enum Scalar {
  kBeta,
  kRho,
  kLambda,
  kZDotZ,
  kLinearTerm,       // x.b
  kQuadraticTerm,    // x'Ax
  kPredictedChange,  // M
  kRatio,            // gamma
  kLoss,
  kSkippedSteps,
  kSafeSteps,
  kDirectionDamping,  // s = theta lambda of the last solve
  kAverageBeta,
  kAverageRho,
  kSolves,  // how many are in these averages
  kGathered,
  kScalarCount
};

// Below this, 1 - c^2 counts as zero: u and z point the same way (c is the cosine of their angle under A).
constexpr double kRankTolerance = 1e-12;
// A squared off-diagonal entry may exceed the product of the diagonal ones by this much through float32 rounding.
constexpr double kConvexTolerance = 1e-4;

// The quadratic model q(x) = x'Ax / 2 - x.b of the damped loss along x = [beta, -rho].
struct System {
  double a11, a12, a22, b1, b2;
  double safe_curvature;  // max(|a11|, lambda Delta.PDelta): a positive stand-in for a11 if the loss is not convex
  // A = Gauss-Newton + lambda Gram, so A - lambda Gram / 2 is positive semi-definite for a loss that is convex in the
  // outputs, with room for rounding. Where it is not, A^-1 b could climb or leap.
  bool convex_in_delta, convex_in_z, convex;
};

struct Step {
  double beta, rho;
  bool safe;  // the loss is not convex in the outputs here: gradient direction only
};

// products = [g.Jz, Jz.HJz, g.Ju, Jz.HJu, Ju.HJu]; zz, zu, uu in the metric: z.Pz, z.Pu, u.Pu. Everything about
// Delta = u + d z, with d = theta lambda, follows by linearity:
//   Delta.GDelta = uHu + 2 d zHu + d^2 zHz,  Delta.PDelta = uu + 2 d zu + d^2 zz,  ...
CURVEBALL_INLINE System make_system(const double* products, double lambd, double d, double zz, double zu, double uu) {
  const double gz = products[0], zhz = products[1], gu = products[2], zhu = products[3], uhu = products[4];
  const double delta_delta = uu + 2.0 * d * zu + d * d * zz, delta_z = zu + d * zz;
  System s;
  s.a11 = uhu + 2.0 * d * zhu + d * d * zhz + lambd * delta_delta;
  s.a12 = zhu + d * zhz + lambd * delta_z;
  s.a22 = zhz + lambd * zz;
  s.b1 = gu + d * gz;
  s.b2 = gz;
  const double magnitude = s.a11 < 0.0 ? -s.a11 : s.a11, damping = lambd * delta_delta;
  s.safe_curvature = magnitude > damping ? magnitude : damping;
  const double n11 = s.a11 - 0.5 * damping, n12 = s.a12 - 0.5 * lambd * delta_z, n22 = s.a22 - 0.5 * lambd * zz;
  s.convex_in_delta = n11 >= 0.0;
  s.convex_in_z = n22 >= 0.0;
  s.convex = s.convex_in_delta && s.convex_in_z && n12 * n12 <= (1.0 + kConvexTolerance) * n11 * n22;
  return s;
}

CURVEBALL_INLINE double divide_or_zero(double numerator, double denominator) {
  return denominator == 0.0 ? 0.0 : numerator / denominator;
}

// No rho, and a plain gradient step whose length trusts the size of the curvature but not its sign.
CURVEBALL_INLINE Step safe_step(const System& s) { return {divide_or_zero(s.b1, s.safe_curvature), 0.0, true}; }

// Both coefficients free. Scaled by the diagonal, A becomes [[1, c], [c, 1]] and the answer does not depend on the
// units of u and z; only then is "nearly singular" a statement about their directions.
CURVEBALL_INLINE Step solve_both(const System& s) {
  if (!s.convex) return safe_step(s);
  if (s.a22 == 0.0) return {divide_or_zero(s.b1, s.a11), 0.0, false};  // z = 0, as in the first step
  if (s.a11 == 0.0) return {0.0, -s.b2 / s.a22, false};
  const double s1 = sqrt(s.a11), s2 = sqrt(s.a22);
  const double c = s.a12 / s1 / s2, y1 = s.b1 / s1, y2 = s.b2 / s2;
  const double determinant = (1.0 - c) * (1.0 + c);
  if (determinant <= kRankTolerance) {
    // Rank one, [[1, t], [t, 1]] with t = +-1: its pseudo-inverse is a quarter of itself (minimum norm).
    const double t = c < 0.0 ? -1.0 : 1.0;
    return {0.25 * (y1 + t * y2) / s1, -0.25 * (t * y1 + y2) / s2, false};
  }
  return {(y1 - c * y2) / determinant / s1, -(y2 - c * y1) / determinant / s2, false};
}

// beta fixed: the second row, a12 beta - a22 rho = b2, gives rho.
CURVEBALL_INLINE Step solve_rho(const System& s, double beta) {
  if (!s.convex_in_z) return {beta, 0.0, true};
  return {beta, divide_or_zero(s.a12 * beta - s.b2, s.a22), false};
}

// rho fixed: the first row, a11 beta - a12 rho = b1, gives beta.
CURVEBALL_INLINE Step solve_beta(const System& s, double rho) {
  if (!s.convex_in_delta) return {divide_or_zero(s.b1, s.safe_curvature), rho, true};
  return {divide_or_zero(s.b1 + s.a12 * rho, s.a11), rho, false};
}

// `bounded`: a rho outside [0, 1] becomes the nearest bound, and beta, unless it is fixed, the best one beside it.
CURVEBALL_INLINE Step solve_free(const System& s, const double* beta, bool bounded) {
  const Step step = beta ? solve_rho(s, *beta) : solve_both(s);
  const double bound = step.rho < 0.0 ? 0.0 : 1.0;
  if (!bounded || !(step.rho < 0.0 || step.rho > 1.0)) return step;
  return beta ? Step{*beta, bound, false} : solve_beta(s, bound);
}

// The average with a new value in it; the value itself, bit for bit, if nothing of the old one is kept.
CURVEBALL_INLINE double averaged(double keep, double average, double now) {
  return keep == 0.0 ? now : keep * average + (1.0 - keep) * now;
}

// M = -lr x.b + lr^2 x'Ax / 2, the change of the loss that the model predicts for a step of lr x.
CURVEBALL_INLINE double predicted_change(double linear_term, double quadratic_term, double lr) {
  return -lr * linear_term + 0.5 * lr * lr * quadratic_term;
}

// The factor for a step along which this batch's model climbs, as averages over others may: to its minimum on the way.
CURVEBALL_INLINE double shortened(double linear_term, double quadratic_term) {
  if (!(quadratic_term > 2.0 * linear_term)) return 1.0;
  return linear_term > 0.0 ? linear_term / quadratic_term : 0.0;
}

struct SolveOptions {
  const double *beta, *rho;  // null, or what the user fixed
  double lr;
  double theta;    // the share of z's own residual in Delta
  double average;  // how much of their averages over the solves beta and rho keep; what is fixed is not averaged
  bool bounded;    // a rho that is solved for stays in [0, 1]
};

// One step of the solver: fills `next` from `previous`. `dots` = [z.Pz, z.Pu, u.Pu] measured, or null: then P = 1,
// u = r, and adjointness gives z.r = g.Jz + theta Jz.HJz and r.r = g.Jr + theta Jz.HJr.
// A system that is not finite makes beta = rho = NaN, which tells the update to leave w and z alone.
CURVEBALL_INLINE void solve(const double* previous, double loss, const double* products, const double* dots,
                            const SolveOptions& options, double* next) {
  const double *beta = options.beta, *rho = options.rho, lr = options.lr, theta = options.theta;
  const double direction_damping = theta * previous[kLambda];
  for (int i = 0; i < kScalarCount; i++) next[i] = previous[i];
  next[kLoss] = loss;
  next[kDirectionDamping] = direction_damping;
  const double zz = dots ? dots[0] : previous[kZDotZ];
  // z = 0, as in the first step: Jz is zero, whatever rounding has made of it.
  const double moving = zz == 0.0 ? 0.0 : 1.0;
  const double taken[5] = {products[0] * moving, products[1] * moving, products[2], products[3] * moving, products[4]};
  const double zu = dots ? dots[1] : taken[0] + theta * taken[1];
  const double uu = dots ? dots[2] : taken[2] + theta * taken[3];
  bool usable = is_finite(lr) && is_finite(loss) && is_finite(zz) && is_finite(zu) && is_finite(uu);
  for (int i = 0; i < 5; i++) usable = usable && is_finite(products[i]);

  const System s = make_system(taken, previous[kLambda], direction_damping, zz, zu, uu);
  const Step step = beta && rho ? Step{*beta, *rho, false}
                    : rho       ? solve_beta(s, *rho)
                                : solve_free(s, beta, options.bounded);
  if (!usable || !is_finite(step.beta) || !is_finite(step.rho)) {
    const double zero = loss - loss;  // or NaN, if the loss is not finite
    next[kBeta] = next[kRho] = zero / zero;
    next[kLinearTerm] = next[kQuadraticTerm] = next[kPredictedChange] = 0.0;
    next[kSkippedSteps] += 1.0;
    return;
  }
  // At most 1 - 1/n after n solves, so that the start at zero is no bias.
  const double most = 1.0 - 1.0 / (previous[kSolves] + 1.0), keep = options.average < most ? options.average : most;
  const double used_beta = beta ? step.beta : averaged(keep, previous[kAverageBeta], step.beta);
  const double used_rho = rho ? step.rho : averaged(keep, previous[kAverageRho], step.rho);
  const double x1 = used_beta, x2 = -used_rho;
  const double linear_term = x1 * s.b1 + x2 * s.b2;
  // A safe step does not believe the curvature: it predicts as if its length were the minimizer's.
  const double quadratic_term = step.safe ? linear_term : x1 * x1 * s.a11 + 2.0 * x1 * x2 * s.a12 + x2 * x2 * s.a22;
  const bool is_averaged = keep > 0.0 && !beta && !rho && !step.safe;
  const double factor = is_averaged ? shortened(linear_term, quadratic_term) : 1.0;
  next[kAverageBeta] = used_beta;
  next[kAverageRho] = used_rho;
  next[kBeta] = factor * used_beta;
  next[kRho] = factor * used_rho;
  next[kSolves] += 1.0;
  next[kLinearTerm] = factor * linear_term;
  next[kQuadraticTerm] = factor * factor * quadratic_term;
  next[kPredictedChange] = predicted_change(next[kLinearTerm], next[kQuadraticTerm], lr);
  if (step.safe) next[kSafeSteps] += 1.0;
}

// After the update: fills `next` from `previous`, with z.z, the sum of every group's `squares`. Where the groups' rates
// differ, the step is lr_g z in group g; its projection on z is the step of the one lr that the model sees.
CURVEBALL_INLINE void finish_update(const double* previous, const double* squares, const double* lr, int groups,
                                    double* next) {
  for (int i = 0; i < kScalarCount; i++) next[i] = previous[i];
  double total = 0.0, moved = 0.0;
  bool equal = true;
  for (int g = 0; g < groups; g++) {
    total += squares[g];
    moved += lr[g] * squares[g];
    equal = equal && lr[g] == lr[0];
  }
  next[kZDotZ] = total;
  if (!equal)
    next[kPredictedChange] =
        predicted_change(previous[kLinearTerm], previous[kQuadraticTerm], divide_or_zero(moved, total));
}

// ---------------------------------------------------------------------------------------------- damping

struct DampingRule {
  double low, high;         // gamma below `low`: the model promised too much, so damp more; above `high`: damp less
  double factor;            // < 1; lambda is divided or multiplied by it
  double minimum, maximum;  // lambda stays in here
};

// gamma = (L(w_new) - L(w_old)) / M steers lambda. A skipped step, or one that predicts nothing, teaches nothing.
CURVEBALL_INLINE void adapt_damping(const double* previous, double new_loss, const DampingRule& rule, double* next) {
  for (int i = 0; i < kScalarCount; i++) next[i] = previous[i];
  if (!is_finite(previous[kBeta]) || previous[kPredictedChange] == 0.0) return;
  const double ratio = (new_loss - previous[kLoss]) / previous[kPredictedChange];
  double lambd = previous[kLambda];
  // Written so that a NaN ratio, and any loss that is not a number, counts as "too low". So does a step that the model
  // itself expected to climb, which fixed beta and rho, or lr > 2, can bring about.
  if (!is_finite(new_loss) || !(ratio >= rule.low) || previous[kPredictedChange] > 0.0) {
    lambd /= rule.factor;
  } else if (ratio > rule.high) {
    lambd *= rule.factor;
  }
  if (lambd < rule.minimum) lambd = rule.minimum;
  if (lambd > rule.maximum) lambd = rule.maximum;
  next[kRatio] = ratio;
  next[kLambda] = lambd;
}

// ---------------------------------------------------------------------------------------------- between solves

// A step that does not solve takes the averages of the last solves. Along -beta u the loss falls by beta slope, with
// slope = r.u; where it is `bounded`, by no more than `room`, how far it can fall at all. `loss` times `sign` is
// minimized. What is not finite makes beta = rho = NaN, which tells the update to leave w and z alone.
CURVEBALL_INLINE void keep_coefficients(const double* previous, double loss, double slope, bool bounded, double room,
                                        double sign, double* next) {
  for (int i = 0; i < kScalarCount; i++) next[i] = previous[i];
  next[kLoss] = sign * loss;
  const double sum = next[kLoss] + slope;
  if (!is_finite(sum)) {
    next[kBeta] = next[kRho] = sum - sum;  // NaN
    next[kSkippedSteps] += 1.0;
    return;
  }
  const double beta = previous[kAverageBeta];
  next[kBeta] = bounded && beta * slope > room ? room / slope : beta;
  next[kRho] = previous[kAverageRho];
}

}  // namespace curveball
