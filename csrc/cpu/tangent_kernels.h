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

// Channels of a batch; null where the operator was given None.
struct BatchNormArguments {
  const void *dx, *x, *mean, *rstd, *weight, *dweight, *dbias;
  void* dy;
  int64_t batch, channels, plane;  // [batch, channels, plane], or [batch, plane, channels] where channels are last
  bool training;
};
// The tangents of channels begin to end, contiguous.
using BatchNormPlanes = void (*)(const BatchNormArguments& arguments, int64_t begin, int64_t end);
// Where channels are last, rows begin to end of [batch plane, channels]: adds up dx and (x - mean) dx into [2,
// channels]; and, given such sums over all rows, writes the tangents.
using BatchNormSums = void (*)(const BatchNormArguments& arguments, int64_t begin, int64_t end, double* sums);
using BatchNormRows = void (*)(const BatchNormArguments& arguments, int64_t begin, int64_t end, const double* means);

// One table per instruction set; only [kFloat32] and [kFloat64] are offered.
struct TangentKernels {
  ActivationBlock activation[kActivationCount][kDTypeCount];
  LayerNormRows layer_norm[kDTypeCount];
  BatchNormPlanes batch_norm_planes[kDTypeCount];
  BatchNormSums batch_norm_sums[kDTypeCount];
  BatchNormRows batch_norm_rows[kDTypeCount];
};

}  // namespace curveball::cpu
