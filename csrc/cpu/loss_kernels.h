// What the loops over losses offer: one table of functions per instruction set, each working on some rows or elements.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace curveball::cpu {

// The loops take this many elements at a time: scratch memory and repeated weights have as many more than are used.
constexpr int64_t kLossPadding = 16;

// Cross-entropy of logits x [N, C] with tangents v = Jz and u = Jr. Arrays without a dtype have that of x, numbers
// beside them that of the arithmetic: float64 for float64, else float32.
struct CrossEntropy {
  const void *x, *v, *u;
  void* c;                // [N, C]
  void* row_stats;        // numbers [N, 3]: log sum exp x, <p, v>, s/D
  const int64_t* target;  // [N]
  const void* weight;     // numbers [C]; may be null for ones, but not with label smoothing
  int64_t classes, ignore_index;
  double keep;     // 1 - e
  double smooth;   // e/C
  double weights;  // the sum of the weights
  double inverse;  // 1/D
  double sign;
};

// Rows [begin, end). `scratch` has room for C + kLossPadding numbers. Three sums: D times the loss, g.v' and v'.Hv', or
// g.u', v'.Hu' and u'.Hu'; without the sign.
using CrossEntropyBlock = void (*)(const CrossEntropy& a, int64_t begin, int64_t end, void* scratch, double* sums);

// A loss that is a sum over elements, of x and targets y.
struct Elements {
  const void *x, *v, *u, *y;
  void* c;
  // Numbers that repeat after `period` elements, then the first kLossPadding of them again.
  const void *weight, *pos_weight;
  int64_t weight_period, pos_weight_period;
  double scale, sign;  // scale: 1/n for the mean
};

// Elements [begin, end). Three sums: loss, g.v, v.Hv, or g.u, v.Hu, u.Hu; without scale and sign.
using ElementsBlock = void (*)(const Elements& a, int64_t begin, int64_t end, double* sums);

// By the dtype of x.
struct LossKernels {
  CrossEntropyBlock cross_entropy_cotangent[kDTypeCount], cross_entropy_products[kDTypeCount];
  ElementsBlock mse_cotangent[kDTypeCount], mse_products[kDTypeCount];
  ElementsBlock bce_cotangent[kDTypeCount], bce_products[kDTypeCount];
};

}  // namespace curveball::cpu
