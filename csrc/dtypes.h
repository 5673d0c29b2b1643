// The four dtypes that the kernels know. No headers, so that host code, CUDA kernels and NVRTC all read this.
#pragma once

namespace curveball {

enum DType { kFloat16, kBFloat16, kFloat32, kFloat64, kDTypeCount };

}  // namespace curveball
