// What the operators on losses share: choice of kernels by dtype, how many blocks, the sums of their sums.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../loss_checks.h"
#include "launch.h"
#include "loss_parts.cuh"

#if !defined(CURVEBALL_LOSS_BLOCKS)
#define CURVEBALL_LOSS_BLOCKS 4096
#endif

namespace curveball::cuda {

// At most. Enough for the largest GPU, and few enough for one block to add up their sums in no time. The tests take
// fewer, so that each block has much to do.
constexpr int64_t kMaxBlocks = CURVEBALL_LOSS_BLOCKS;

template <typename F>
void for_dtype(DType dtype, F call) {
  switch (dtype) {
    case kFloat16:
      return call(Float16{});
    case kBFloat16:
      return call(BFloat16{});
    case kFloat32:
      return call(float{});
    default:
      return call(double{});
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline int64_t blocks_for(int64_t pieces, int64_t pieces_per_block, int64_t most = kMaxBlocks) {
  return std::clamp<int64_t>((pieces + pieces_per_block - 1) / pieces_per_block, 1, most);
}

// Loss and products out of the partial sums.
inline std::pair<Tensor, Tensor> finish_cotangent(const Tensor& partials, Stream stream) {
  Tensor loss = new_doubles(partials, {}), products = new_doubles(partials, {2});
  launch(finish_loss_cotangent_kernel<kFinishThreads>, 1, kFinishThreads, 0, stream, partials.const_data_ptr<double>(),
         partials.size(0), loss.mutable_data_ptr<double>(), products.mutable_data_ptr<double>());
  return {loss, products};
}

inline Tensor finish_products(const Tensor& partials, const double* products, Stream stream) {
  Tensor five = new_doubles(partials, {5});
  launch(finish_loss_products_kernel<kFinishThreads>, 1, kFinishThreads, 0, stream, partials.const_data_ptr<double>(),
         partials.size(0), products, five.mutable_data_ptr<double>());
  return five;
}

}  // namespace curveball::cuda
