// What the loops of the tangent operators offer, one table per instruction set; tangents.cpp calls them.
// curveball_fused/ops/tangents.py says what each operator computes.
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

// A tensor [batch, heads, rows, columns] by its strides, in elements; the columns of all but a mask are contiguous.
struct AttentionTensor {
  const void* data;
  int64_t batch, head, row, column;
};
struct AttentionArguments {
  AttentionTensor dq, dk, dv, q, k, v, out, mask;  // mask.data may be null
  void* result;                                    // [batch, queries, heads, width], contiguous
  int64_t batch, heads, queries, keys, depth, width;
  bool is_causal;
  double scale;
};
// Queries are worked on in blocks, each of which meets the keys in blocks.
constexpr int64_t kQueryBlock = 128, kKeyBlock = 128, kMostTiled = 8;
constexpr int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }
// How many elements of memory a block needs: its packed keys, values and a few queries, scores, and the state of the
// queries, which are four numbers and a row each.
constexpr int64_t attention_scratch(int64_t depth, int64_t width) {
  return 2 * kKeyBlock * (depth + padded_width(width)) + 2 * kMostTiled * (depth + kKeyBlock) +
         kQueryBlock * (4 + padded_width(width));
}
// The tangent of queries `begin` to `end`, at most kQueryBlock, of one head of one element of the batch.
using AttentionBlock = void (*)(const AttentionArguments& arguments, int64_t batch, int64_t head, int64_t begin,
                                int64_t end, void* scratch);

// One table per instruction set; only [kFloat32] and [kFloat64] are offered.
struct TangentKernels {
  ActivationBlock activation[kActivationCount][kDTypeCount];
  LayerNormRows layer_norm[kDTypeCount];
  BatchNormPlanes batch_norm_planes[kDTypeCount];
  BatchNormSums batch_norm_sums[kDTypeCount];
  BatchNormRows batch_norm_rows[kDTypeCount];
  AttentionBlock attention[kDTypeCount];
};

}  // namespace curveball::cpu
