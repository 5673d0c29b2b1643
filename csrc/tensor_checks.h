// Checks of the operators' arguments, and what operators on parameters read and return. Failed checks appear in Python
// as RuntimeError, so each says what to do.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dtypes.h"

namespace curveball {

using torch::stable::Tensor;

inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64"};
  return names[dtype];
}

inline int64_t bytes(DType dtype) {
  constexpr int64_t sizes[] = {2, 2, 4, 8};
  return sizes[dtype];
}

inline void check_lengths(size_t n, const char* name, size_t other_n, const char* other) {
  STD_TORCH_CHECK(n == other_n, name, " has ", n, " tensors but ", other, " has ", other_n,
                  ": pass lists of the same length.");
}

// Every tensor belongs to one group, and every group has its rate and its decay.
inline void check_groups(size_t tensors, const std::vector<int64_t>& sizes, const std::vector<double>& lr,
                         const std::vector<double>& weight_decay) {
  check_lengths(sizes.size(), "group_sizes", lr.size(), "lr");
  check_lengths(sizes.size(), "group_sizes", weight_decay.size(), "weight_decay");
  int64_t total = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "group_sizes has a negative entry, ", size, ".");
    total += size;
  }
  STD_TORCH_CHECK(total == static_cast<int64_t>(tensors), "group_sizes adds up to ", total, " but there are ", tensors,
                  " params: give every tensor's group.");
}

// True where this library's kernels can work. (The emulated CUDA kernels work on the CPU.)
inline bool is_on_device(const Tensor& tensor) {
#if defined(__CUDACC__)
  return tensor.is_cuda();
#else
  return tensor.is_cpu();
#endif
}

// The dtype of list[index], which must be on the device.
inline DType dtype_of(const Tensor& tensor, const char* list, size_t index) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(is_on_device(tensor), list, "[", index, "] is on another device: move all tensors to one.");
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, list, "[", index, "] has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ": convert it to float16, bfloat16, float32 or float64.");
  }
}

// z is kept in at least float32, whatever the precision of the parameters.
inline void check_state_dtype(DType param, DType z, size_t index) {
  const DType wanted = param == kFloat64 ? kFloat64 : kFloat32;
  STD_TORCH_CHECK(z == wanted, "z[", index, "] has dtype ", name_of(z), " beside a ", name_of(param),
                  " parameter: convert z to ", name_of(wanted), ".");
}

// Every element at its own place and no holes: then the memory can be walked in a straight line.
inline void check_dense(const Tensor& tensor, const char* list, size_t index) {
  if (tensor.is_contiguous()) return;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size), innermost first
  for (size_t d = 0; d < sizes.size(); d++) {
    if (sizes[d] == 0) return;
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    STD_TORCH_CHECK(stride == expected, list, "[", index,
                    "] is not dense in memory (a strided or expanded view): call .contiguous() on it first.");
    expected *= size;
  }
}

// Same sizes and same strides. The strides of dimensions of size one place nothing, so they may differ.
inline void check_same_layout(const Tensor& a, const char* a_list, const Tensor& b, const char* b_list, size_t index) {
  const auto sizes = a.sizes(), other_sizes = b.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), other_sizes.begin(), other_sizes.end()), a_list, "[", index,
                  "] and ", b_list, "[", index, "] have different sizes: they must match.");
  if (a.numel() == 0) return;
  const auto strides = a.strides(), other_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); d++) {
    STD_TORCH_CHECK(sizes[d] == 1 || strides[d] == other_strides[d], b_list, "[", index,
                    "] is laid out differently in memory from ", a_list, "[", index,
                    "]: copy it into the same strides, e.g. torch.empty_like(", a_list, "[", index, "]).copy_(...).");
  }
}

// ---------------------------------------------------------------------------------------------- update, dots

// The lengths of the lists that `update_` takes.
inline void check_update_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& z,
                               const std::vector<Tensor>& r, const std::vector<int64_t>& group_sizes,
                               const std::vector<double>& lr, const std::vector<double>& weight_decay) {
  check_lengths(params.size(), "params", z.size(), "z");
  check_lengths(params.size(), "params", r.size(), "r");
  check_groups(params.size(), group_sizes, lr, weight_decay);
}

struct UpdateDTypes {
  DType w, z, r;
};

// One place of the lists that `update_` takes.
inline UpdateDTypes check_update(const Tensor& w, const Tensor& z, const Tensor& r, size_t index) {
  const UpdateDTypes dtypes{dtype_of(w, "params", index), dtype_of(z, "z", index), dtype_of(r, "r", index)};
  check_state_dtype(dtypes.w, dtypes.z, index);
  STD_TORCH_CHECK(dtypes.r == dtypes.w || dtypes.r == dtypes.z, "r[", index, "] has dtype ", name_of(dtypes.r),
                  " beside a ", name_of(dtypes.w), " parameter: convert r to the parameter's dtype or to that of z.");
  check_dense(w, "params", index);
  check_same_layout(w, "params", z, "z", index);
  check_same_layout(w, "params", r, "r", index);
  return dtypes;
}

// One place of the lists that `dots` takes. Returns the dtypes.
inline std::pair<DType, DType> check_dots(const Tensor& z, const Tensor& r, size_t index) {
  const DType z_dtype = dtype_of(z, "z", index), r_dtype = dtype_of(r, "r", index);
  STD_TORCH_CHECK(z_dtype == kFloat32 || z_dtype == kFloat64, "z[", index, "] has dtype ", name_of(z_dtype),
                  ": convert it to float32 or float64.");
  check_dense(z, "z", index);
  check_same_layout(z, "z", r, "r", index);
  return {z_dtype, r_dtype};
}

// ---------------------------------------------------------------------------------------------- precondition

// The lengths of the lists that `precondition_` takes (z may be empty) and its numbers.
inline void check_precondition_lists(const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                     const std::vector<Tensor>& r, const std::vector<Tensor>& z, double decay,
                                     double eps) {
  check_lengths(v.size(), "v", u.size(), "u");
  check_lengths(v.size(), "v", r.size(), "r");
  if (!z.empty()) check_lengths(v.size(), "v", z.size(), "z");
  STD_TORCH_CHECK(decay >= 0.0 && decay < 1.0, "decay must be at least 0 and less than 1; got ", decay, ".");
  STD_TORCH_CHECK(static_cast<float>(eps) > 0.0f, "eps must be positive in float32; got ", eps, ".");
}

struct PreconditionDTypes {
  DType v, r;  // u and z have that of v
};

// One place of the lists that `precondition_` takes; `z` may be null.
inline PreconditionDTypes check_precondition(const Tensor& u, const Tensor& v, const Tensor& r, const Tensor* z,
                                             size_t index) {
  const PreconditionDTypes dtypes{dtype_of(v, "v", index), dtype_of(r, "r", index)};
  STD_TORCH_CHECK(dtypes.v == kFloat32 || dtypes.v == kFloat64, "v[", index, "] has dtype ", name_of(dtypes.v),
                  ": convert it to float32 or float64.");
  STD_TORCH_CHECK(dtypes.r == dtypes.v || dtypes.r == kFloat16 || dtypes.r == kBFloat16, "r[", index, "] has dtype ",
                  name_of(dtypes.r), " beside a v of ", name_of(dtypes.v),
                  ": convert it to that, float16 or bfloat16.");
  const auto check_like_v = [&](const Tensor& tensor, const char* name) {
    const DType dtype = dtype_of(tensor, name, index);
    STD_TORCH_CHECK(dtype == dtypes.v, name, "[", index, "] has dtype ", name_of(dtype), " beside a v of ",
                    name_of(dtypes.v), ": convert it to that.");
    check_same_layout(v, "v", tensor, name, index);
  };
  check_dense(v, "v", index);
  check_same_layout(v, "v", r, "r", index);
  check_like_v(u, "u");
  if (z) check_like_v(*z, "z");
  return dtypes;
}

// ---------------------------------------------------------------------------------------------- small vectors

// Uninitialized, where `like` is.
inline Tensor new_doubles(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Double);
}

// The address of a small float64 vector with at least `count` elements.
inline const double* read_doubles(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor), name, " is on another device: move it to that of the other arguments.");
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Double, name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ": convert it to float64.");
  STD_TORCH_CHECK(tensor.numel() >= count && tensor.is_contiguous(), name, " must be contiguous with at least ", count,
                  " elements; it has ", tensor.numel(), ".");
  return tensor.const_data_ptr<double>();
}

// The values of a small vector of any of the four dtypes.
inline std::vector<double> read_numbers(const Tensor& tensor, size_t count, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == static_cast<int64_t>(count) && tensor.is_contiguous(), name,
                  " must be contiguous with ", count, " element(s); it has ", tensor.numel(), ".");
  const auto dtype = dtype_of(tensor, name, 0);
  const void* data = tensor.const_data_ptr();
  std::vector<double> values(count);
  for (size_t i = 0; i < count; i++) {
    switch (dtype) {
      case kFloat16:
        values[i] = static_cast<const c10::Half*>(data)[i];
        break;
      case kBFloat16:
        values[i] = static_cast<const c10::BFloat16*>(data)[i];
        break;
      case kFloat32:
        values[i] = static_cast<const float*>(data)[i];
        break;
      default:
        values[i] = static_cast<const double*>(data)[i];
    }
  }
  return values;
}

inline double read_number(const Tensor& tensor, const char* name) { return read_numbers(tensor, 1, name)[0]; }

}  // namespace curveball
