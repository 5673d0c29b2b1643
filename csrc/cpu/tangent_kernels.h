// What the loops of the tangent operators offer, one table per instruction set; ../tangents.cpp calls them.
// curveball_fused/tangent_ops.py says what each operator computes.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace curveball::cpu {

enum Activation { kGelu, kGeluTanh, kSilu, kActivationCount };

// y = f(x) and f'(x) of n elements.
using ActivationBlock = void (*)(const void* x, void* y, void* derivative, int64_t n);

// Rows of `size` elements; null where the operator was given None.
struct LayerNormArguments {
  const void *dx, *x, *mean, *rstd, *weight, *dweight, *dbias;
  void* dy;
  int64_t size;
};
// The tangents of rows begin to end.
using LayerNormRows = void (*)(const LayerNormArguments& arguments, int64_t begin, int64_t end);

// One table per instruction set; only [kFloat32] and [kFloat64] are offered.
struct TangentKernels {
  ActivationBlock activation[kActivationCount][kDTypeCount];
  LayerNormRows layer_norm[kDTypeCount];
};

}  // namespace curveball::cpu
