// The four dtypes that the kernels know. No headers, so that host code, CUDA kernels and NVRTC all read this.
#pragma once

namespace curveball {

enum DType { kFloat16, kBFloat16, kFloat32, kFloat64, kDTypeCount };

// Storage only: arithmetic happens in Compute<T>.
struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// What a dtype is computed in: float64 for itself, float32 for all others.
template <typename T>
using Compute = typename ComputeType<T>::type;

}  // namespace curveball
