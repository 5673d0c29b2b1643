// What the operators on losses share: memory, sums over blocks on all threads, and the results made of those sums.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../loss_checks.h"
#include "kernels.h"

namespace curveball::cpu {

using Numbers = std::unique_ptr<char[]>;

// Elements of a block: few, so that the blocks are shared out evenly, for these loops do more than cross memory.
constexpr int64_t kLossBlock = 16384;

// Contiguous and uninitialized. By torch's C interface: torch::stable::new_empty looks its operator up by name, which
// takes longer than the loops over a small loss.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), number,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_tensor({sizes.begin(), sizes.end()}, x.scalar_type());
}

// Memory for `count` numbers of the type that x is computed in, and the padding that the loops want.
inline Numbers new_numbers(DType x, int64_t count) {
  return Numbers(new char[(count + kLossPadding) * (x == kFloat64 ? sizeof(double) : sizeof(float))]);
}

// ---------------------------------------------------------------------------------------------- sums

struct Sums {
  double of[3];

  Sums times(double first, double others) const { return {first * of[0], others * of[1], others * of[2]}; }
};

// work(begin, end, memory of this thread, sums) for blocks of at most `size` of n things. The sums are added in the
// order of the blocks, which depend on the sizes only: the same bits for any number of threads.
template <typename Memory, typename Work>
Sums sum_blocks(int64_t n, int64_t size, const Memory& memory, const Work& work) {
  const int64_t blocks = (n + size - 1) / size;
  std::vector<Sums> partial(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    const auto own = memory();
    for (int64_t b = from; b < to; b++) work(b * size, std::min(n, (b + 1) * size), own.get(), partial[b].of);
  });
  Sums total{};
  for (const Sums& p : partial) {
    for (int k = 0; k < 3; k++) total.of[k] += p.of[k];
  }
  return total;
}

// What the first operator returns beside c: the loss, and the first two products.
inline std::pair<Tensor, Tensor> loss_and_products(const Sums& sums) {
  Tensor loss = new_tensor({}, ScalarType::Double), products = new_tensor({2}, ScalarType::Double);
  *loss.mutable_data_ptr<double>() = sums.of[0];
  std::copy(sums.of + 1, sums.of + 3, products.mutable_data_ptr<double>());
  return {loss, products};
}

// What the second operator returns: all five products, given the `first` two.
inline Tensor all_products(const double* first, const Sums& sums) {
  Tensor five = new_tensor({5}, ScalarType::Double);
  double* const result = five.mutable_data_ptr<double>();
  std::copy(first, first + 2, result);
  std::copy(sums.of, sums.of + 3, result + 2);
  return five;
}

}  // namespace curveball::cpu
