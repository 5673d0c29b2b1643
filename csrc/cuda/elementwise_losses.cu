// The operators on losses that are sums over elements, for CUDA: launches and registration; compiles for the emulator
// too.

#include <optional>
#include <tuple>

#include "elementwise_losses.cuh"
#include "loss_launch.h"

namespace curveball::cuda {
namespace {

using Cotangent = std::tuple<Tensor, Tensor, Tensor>;

template <typename T, template <typename> class Loss>
Elements<T, Loss> elements(const Tensor& x, const Tensor& v, const Tensor& target, bool mean, double sign,
                           const Loss<Compute<T>>& loss) {
  const int64_t n = x.numel();
  // The mean of nothing is NaN: 0 * inf.
  return {data<T>(x), data<T>(v), nullptr, data<T>(target), nullptr, nullptr, n, mean ? 1.0 / n : 1.0, sign, loss};
}

int64_t element_blocks(const Tensor& x, DType dtype) {
  return blocks_for(x.numel(), kElementThreads * kElementBatch * (16 / bytes(dtype)));
}

template <typename T, template <typename> class Loss>
Cotangent element_cotangent(const Tensor& x, Elements<T, Loss> arguments) {
  const Stream stream = current_stream(x.get_device_index());
  Tensor c = torch::stable::new_empty(x, x.sizes());
  Tensor partials = new_doubles(x, {element_blocks(x, dtype_of_type<T>), 3});
  arguments.c = static_cast<T*>(c.mutable_data_ptr());
  arguments.partials = partials.mutable_data_ptr<double>();
  launch(element_cotangent_kernel<T, Loss>, partials.size(0), kElementThreads, 0, stream, arguments);
  const auto [loss, products] = finish_cotangent(partials, stream);
  return {loss, c, products};
}

template <typename T, template <typename> class Loss>
Tensor element_products(const Tensor& x, const Tensor& u, const Tensor& products, Elements<T, Loss> arguments) {
  check_like(x, u, "u");
  check_place(x, u, "u");
  const double* first = products_of(x, products);
  const Stream stream = current_stream(x.get_device_index());
  Tensor partials = new_doubles(x, {element_blocks(x, dtype_of_type<T>), 3});
  arguments.u = data<T>(u);
  arguments.partials = partials.mutable_data_ptr<double>();
  launch(element_products_kernel<T, Loss>, partials.size(0), kElementThreads, 0, stream, arguments);
  return finish_products(partials, first, stream);
}

Cotangent mse_cotangent(Tensor x, Tensor v, Tensor target, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Cotangent result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    result = element_cotangent(x, elements<T, SquaredError>(x, v, target, mean, sign, {}));
  });
  return result;
}

Tensor mse_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor products, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Tensor result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    result = element_products(x, u, products, elements<T, SquaredError>(x, v, target, mean, sign, {}));
  });
  return result;
}

template <typename C>
BinaryCrossEntropy<C> binary_cross_entropy(const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& pos_weight) {
  const auto [w, length] = periodic<C>(x, weight, "weight");
  const auto [p, pos_length] = periodic<C>(x, pos_weight, "pos_weight");
  return {w, p, length, pos_length};
}

Cotangent bce_cotangent(Tensor x, Tensor v, Tensor target, std::optional<Tensor> weight,
                        std::optional<Tensor> pos_weight, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Cotangent result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    const auto loss = binary_cross_entropy<Compute<T>>(x, weight, pos_weight);
    result = element_cotangent(x, elements<T, BinaryCrossEntropy>(x, v, target, mean, sign, loss));
  });
  return result;
}

Tensor bce_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                    std::optional<Tensor> pos_weight, Tensor products, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Tensor result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    const auto loss = binary_cross_entropy<Compute<T>>(x, weight, pos_weight);
    result = element_products(x, u, products, elements<T, BinaryCrossEntropy>(x, v, target, mean, sign, loss));
  });
  return result;
}

}  // namespace
}  // namespace curveball::cuda

CURVEBALL_REGISTER(library) {
  library.impl("mse_cotangent", TORCH_BOX(&curveball::cuda::mse_cotangent));
  library.impl("mse_products", TORCH_BOX(&curveball::cuda::mse_products));
  library.impl("bce_cotangent", TORCH_BOX(&curveball::cuda::bce_cotangent));
  library.impl("bce_products", TORCH_BOX(&curveball::cuda::bce_products));
}
