// Three mistakes, each an operator of its own: a sanitizer that does not find them watches nothing. Only
// tools/sanitize.py compiles this file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

namespace {

using torch::stable::Tensor;

// Reads one element beyond the end.
Tensor overflow(Tensor x) {
  const volatile float* elements = static_cast<const float*>(x.const_data_ptr());
  [[maybe_unused]] const float beyond = elements[x.numel()];
  return x;
}

// Adds one to the largest integer.
Tensor undefined(Tensor x) {
  volatile int64_t largest = std::numeric_limits<int64_t>::max();
  largest = largest + 1;
  return x;
}

// Counts in all threads at once.
Tensor race(Tensor x) {
  volatile int64_t count = 0;
  torch::stable::parallel_for(0, 100000, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) count = count + 1;
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY(curveball_planted, m) {
  m.def("overflow(Tensor x) -> Tensor");
  m.def("undefined(Tensor x) -> Tensor");
  m.def("race(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(curveball_planted, CPU, m) {
  m.impl("overflow", TORCH_BOX(&overflow));
  m.impl("undefined", TORCH_BOX(&undefined));
  m.impl("race", TORCH_BOX(&race));
}
