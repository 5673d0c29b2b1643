// The operators on losses that are sums over elements, on the CPU.
#include <optional>
#include <tuple>
#include <utility>

#include "loss_sums.h"

namespace curveball::cpu {
namespace {

using Cotangent = std::tuple<Tensor, Tensor, Tensor>;  // loss, c, products

// Numbers that repeat after `period` elements, and some of them again, so that a round can begin anywhere. Without a
// weight, ones.
struct Repeated {
  Numbers numbers;
  int64_t period;
};

template <typename C>
Repeated repeated(const Tensor& x, const std::optional<Tensor>& weight, const char* name) {
  constexpr int64_t kOnes = 128;
  const auto [values, length] = periodic<C>(x, weight, name);
  const int64_t period = values && length > 0 ? length : kOnes;
  Numbers numbers = new_numbers(dtype_of(x, "x", 0), period);
  C* const filled = reinterpret_cast<C*>(numbers.get());
  for (int64_t i = 0; i < period; i++) filled[i] = values && length > 0 ? values[i] : C(1);
  for (int64_t i = 0; i < kLossPadding; i++) filled[period + i] = filled[i % period];
  return {std::move(numbers), period};
}

// One operator's arguments, checked, and the memory behind its weights.
struct ElementsCall {
  Repeated weight, pos_weight;
  Elements arguments;

  ElementsCall(const Tensor& x, const Tensor& v, const Tensor& target, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& pos_weight, bool mean, double sign) {
    check_elements(x, v, target);
    const auto make = dtype_of(x, "x", 0) == kFloat64 ? repeated<double> : repeated<float>;
    this->weight = make(x, weight, "weight");
    this->pos_weight = make(x, pos_weight, "pos_weight");
    arguments = {x.const_data_ptr(),
                 v.const_data_ptr(),
                 nullptr,
                 target.const_data_ptr(),
                 nullptr,
                 this->weight.numbers.get(),
                 this->pos_weight.numbers.get(),
                 this->weight.period,
                 this->pos_weight.period,
                 mean ? 1.0 / x.numel() : 1.0,  // the mean of nothing is NaN: 0 * inf
                 sign};
  }

  Sums sum(const ElementsBlock (&blocks)[kDTypeCount], const Tensor& x) const {
    const ElementsBlock block = blocks[dtype_of(x, "x", 0)];
    return sum_blocks(
        x.numel(), kLossBlock, [] { return Numbers(); },
        [&](int64_t begin, int64_t end, void*, double* sums) { block(arguments, begin, end, sums); });
  }
};

Cotangent element_cotangent(ElementsCall call, const ElementsBlock (&blocks)[kDTypeCount], const Tensor& x) {
  Tensor c = new_like(x);
  call.arguments.c = c.mutable_data_ptr();
  const double scale = call.arguments.scale;
  const auto [loss, products] = loss_and_products(call.sum(blocks, x).times(scale, call.arguments.sign * scale));
  return {loss, c, products};
}

Tensor element_products(ElementsCall call, const ElementsBlock (&blocks)[kDTypeCount], const Tensor& x, const Tensor& u,
                        const Tensor& products) {
  check_like(x, u, "u");
  check_place(x, u, "u");
  const double* first = products_of(x, products);
  call.arguments.u = u.const_data_ptr();
  const double factor = call.arguments.sign * call.arguments.scale;
  return all_products(first, call.sum(blocks, x).times(factor, factor));
}

Cotangent mse_cotangent(Tensor x, Tensor v, Tensor target, bool mean, double sign) {
  return element_cotangent({x, v, target, std::nullopt, std::nullopt, mean, sign},
                           chosen_kernels().losses.mse_cotangent, x);
}

Tensor mse_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor products, bool mean, double sign) {
  return element_products({x, v, target, std::nullopt, std::nullopt, mean, sign}, chosen_kernels().losses.mse_products,
                          x, u, products);
}

Cotangent bce_cotangent(Tensor x, Tensor v, Tensor target, std::optional<Tensor> weight,
                        std::optional<Tensor> pos_weight, bool mean, double sign) {
  return element_cotangent({x, v, target, weight, pos_weight, mean, sign}, chosen_kernels().losses.bce_cotangent, x);
}

Tensor bce_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                    std::optional<Tensor> pos_weight, Tensor products, bool mean, double sign) {
  return element_products({x, v, target, weight, pos_weight, mean, sign}, chosen_kernels().losses.bce_products, x, u,
                          products);
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("mse_cotangent", TORCH_BOX(&curveball::cpu::mse_cotangent));
  m.impl("mse_products", TORCH_BOX(&curveball::cpu::mse_products));
  m.impl("bce_cotangent", TORCH_BOX(&curveball::cpu::bce_cotangent));
  m.impl("bce_products", TORCH_BOX(&curveball::cpu::bce_products));
}
