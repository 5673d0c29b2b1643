// The operators on cross-entropy, on the CPU.
#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

#include "loss_sums.h"

namespace curveball::cpu {
namespace {

// The weights; with label smoothing, which needs a number for each class, ones that `ones` will hold, if there are
// none.
template <typename C>
void find_weights(CrossEntropy& a, const Tensor& x, const std::optional<Tensor>& weight, bool mean, Numbers& ones) {
  const C* w = weights_of<C>(x, weight, "weight");
  a.weights = w ? std::accumulate(w, w + a.classes, 0.0) : static_cast<double>(a.classes);
  double own = 0.0;
  for (int64_t n = 0; mean && n < x.size(0); n++) {
    const int64_t y = a.target[n];
    if (y != a.ignore_index && y >= 0 && y < a.classes) own += w ? w[y] : C(1);
  }
  a.inverse = mean ? 1.0 / own : 1.0;
  if (!w && a.smooth != 0.0) {
    ones = new_numbers(dtype_of(x, "x", 0), a.classes);
    C* const filled = reinterpret_cast<C*>(ones.get());
    std::fill(filled, filled + a.classes, C(1));
    w = filled;
  }
  a.weight = w;
}

// Either operator; `a` has what only that one knows.
Sums cross_entropy(CrossEntropy& a, const CrossEntropyBlock (&blocks)[kDTypeCount], const Tensor& x, const Tensor& v,
                   const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index, bool mean,
                   double label_smoothing, double sign) {
  const DType dtype = dtype_of(x, "x", 0);
  a.x = x.const_data_ptr();
  a.v = v.const_data_ptr();
  a.target = target.const_data_ptr<int64_t>();
  a.classes = x.size(1);
  a.ignore_index = ignore_index;
  a.keep = 1.0 - label_smoothing;
  a.smooth = label_smoothing / a.classes;
  a.sign = sign;
  Numbers ones;
  (dtype == kFloat64 ? find_weights<double> : find_weights<float>)(a, x, weight, mean, ones);
  const int64_t rows = std::max<int64_t>(1, kLossBlock / std::max<int64_t>(1, a.classes));
  return sum_blocks(
      x.size(0), rows, [&] { return new_numbers(dtype, a.classes); },
      [&](int64_t begin, int64_t end, void* scratch, double* sums) { blocks[dtype](a, begin, end, scratch, sums); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_cotangent(Tensor x, Tensor v, Tensor target,
                                                                   std::optional<Tensor> weight, int64_t ignore_index,
                                                                   bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  Tensor c = new_like(x);
  Tensor row_stats = new_tensor({x.size(0), 3}, compute_dtype(x));
  CrossEntropy a{};
  a.c = c.mutable_data_ptr();
  a.row_stats = row_stats.mutable_data_ptr();
  const Sums sums = cross_entropy(a, chosen_kernels().losses.cross_entropy_cotangent, x, v, target, weight,
                                  ignore_index, mean, label_smoothing, sign);
  const auto [loss, products] = loss_and_products(sums.times(a.inverse, a.sign * a.inverse));  // D = 0: 0 * inf = NaN
  return {loss, c, products, row_stats};
}

Tensor cross_entropy_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                              Tensor row_stats, Tensor products, int64_t ignore_index, bool mean,
                              double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  check_like(x, u, "u");
  check_place(x, u, "u");
  check_row_stats(x, row_stats);
  const double* first = products_of(x, products);
  CrossEntropy a{};
  a.u = u.const_data_ptr();
  a.row_stats = const_cast<void*>(row_stats.const_data_ptr());
  const Sums sums = cross_entropy(a, chosen_kernels().losses.cross_entropy_products, x, v, target, weight, ignore_index,
                                  mean, label_smoothing, sign);
  return all_products(first, sums.times(sign, sign));  // 1/D is in `row_stats`
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("cross_entropy_cotangent", TORCH_BOX(&curveball::cpu::cross_entropy_cotangent));
  m.impl("cross_entropy_products", TORCH_BOX(&curveball::cpu::cross_entropy_products));
}
