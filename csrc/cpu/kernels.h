// What the compiled loops offer: one table of functions per instruction set, each working on one block of memory.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "loss_kernels.h"
#include "metric_kernels.h"
#include "tangent_kernels.h"

namespace curveball::cpu {

// The coefficients of one update, in double; a block rounds them to the type it computes in.
struct UpdateArguments {
  double beta, rho, direction_damping, lr, weight_decay;
};

// Updates n elements of w and z in place and returns the sum of the squares of the new z.
using UpdateBlock = double (*)(void* w, void* z, const void* r, int64_t n, const UpdateArguments& arguments);
// Writes [z.z, z.r, r.r] of n elements.
using DotsBlock = void (*)(const void* z, const void* r, int64_t n, double* result);
// The sum of the squares of n elements, added in the order of UpdateBlock.
using SquaresBlock = double (*)(const void* z, int64_t n);

struct Kernels {
  const char* name;
  UpdateBlock update[kDTypeCount][kDTypeCount];  // [dtype of w][dtype of r]; null: not offered
  DotsBlock dots[kDTypeCount][kDTypeCount];      // [dtype of z][dtype of r]; null: not offered
  SquaresBlock squares[kDTypeCount];             // [dtype of z]; null: not offered
  LossKernels losses;
  MetricKernels metric;
  TangentKernels tangents = {};
};

// The best table this processor can run. The environment variable CURVEBALL_INSTRUCTION_SET names another one (all
// give the same bits, but for matrix products: the tangent of attention, bases and factors of a metric); null if that
// one was not compiled or the processor lacks it.
const Kernels* kernels();

// The same for an operator: an error instead of null.
const Kernels& chosen_kernels();

// The names of all compiled tables, best first, separated by commas.
const char* compiled_instruction_sets();

}  // namespace curveball::cpu
