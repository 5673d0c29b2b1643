// Checks of the arguments of the operators on losses. They appear in Python as RuntimeError, so each says what to do.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include "tensor_checks.h"

namespace curveball {

using torch::headeronly::ScalarType;

// The dtype of what is computed and kept of x.
inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like(const Tensor& x, const Tensor& tensor, const char* name) {
  const auto sizes = x.sizes(), other = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == other.size() && std::equal(sizes.begin(), sizes.end(), other.begin()), name,
                  " and x have different sizes: they must match.");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), " but x has ",
                  torch::headeronly::toString(x.scalar_type()), ": convert it.");
}

inline void check_place(const Tensor& x, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.get_device_index() == x.get_device_index(), name,
                  " is on another device than x: move all tensors to one.");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: call .contiguous() on it first.");
}

// The weights in the dtype of the arithmetic; null without weights.
template <typename C>
const C* weights_of(const Tensor& x, const std::optional<Tensor>& weight, const char* name) {
  if (!weight) return nullptr;
  check_place(x, *weight, name);
  const ScalarType wanted = compute_dtype(x);
  STD_TORCH_CHECK(weight->scalar_type() == wanted, name, " has dtype ",
                  torch::headeronly::toString(weight->scalar_type()), " beside x of dtype ",
                  torch::headeronly::toString(x.scalar_type()), ": convert it to ", torch::headeronly::toString(wanted),
                  ".");
  return weight->const_data_ptr<C>();
}

inline const double* products_of(const Tensor& x, const Tensor& products) {
  check_place(x, products, "products");
  return read_doubles(products, 2, "products");
}

inline void check_cross_entropy(const Tensor& x, const Tensor& v, const Tensor& target,
                                const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [rows, classes]; it has ", x.dim(), " dimensions: reshape it.");
  STD_TORCH_CHECK(x.size(1) <= 1 << 30, "x has ", x.size(1), " classes: at most 2^30 are possible.");
  check_place(x, x, "x");
  check_like(x, v, "v");
  check_place(x, v, "v");
  check_place(x, target, "target");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target has dtype ",
                  torch::headeronly::toString(target.scalar_type()), ": convert it to int64.");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == x.size(0), "target must have one class for each of the ",
                  x.size(0), " rows of x.");
  STD_TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == x.size(1)),
                  "weight must have one element for each of the ", x.size(1), " classes.");
}

inline void check_row_stats(const Tensor& x, const Tensor& row_stats) {
  check_place(x, row_stats, "row_stats");
  STD_TORCH_CHECK(row_stats.scalar_type() == compute_dtype(x) && row_stats.numel() == 3 * x.size(0),
                  "row_stats must be what cross_entropy_cotangent returned for the same x.");
}

inline void check_elements(const Tensor& x, const Tensor& v, const Tensor& target) {
  check_place(x, x, "x");
  check_like(x, v, "v");
  check_place(x, v, "v");
  check_like(x, target, "target");
  check_place(x, target, "target");
}

// Weights that repeat over the elements of x.
template <typename C>
std::pair<const C*, int64_t> periodic(const Tensor& x, const std::optional<Tensor>& weight, const char* name) {
  if (!weight) return {nullptr, 1};
  const int64_t length = weight->numel();
  STD_TORCH_CHECK(x.numel() == 0 || (length > 0 && x.numel() % length == 0), name, " has ", length,
                  " elements, by which the ", x.numel(),
                  " of x can't be divided: expand it to x's trailing dimensions.");
  return {weights_of<C>(x, weight, name), length};
}

}  // namespace curveball
