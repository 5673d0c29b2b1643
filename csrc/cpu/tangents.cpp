// The tangent operators on the CPU, in float32 and float64. curveball_fused/ops/tangents.py says what they compute.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensor_checks.h"
#include "blocks.h"
#include "kernels.h"

namespace curveball::cpu {
namespace {

// The dtype that x sets for all tensors.
DType working_dtype(const Tensor& x, const char* name) {
  const DType dtype = dtype_of(x, name, 0);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64, name, " has dtype ", name_of(dtype),
                  ": these kernels work in float32 and float64.");
  return dtype;
}

void check_dtype(const Tensor& tensor, const char* name, DType dtype) {
  STD_TORCH_CHECK(is_on_device(tensor), name, " is on another device: move all tensors to one.");
  STD_TORCH_CHECK(dtype_of(tensor, name, 0) == dtype, name, " has dtype ", name_of(dtype_of(tensor, name, 0)),
                  ", the others have ", name_of(dtype), ".");
}

// The address of a contiguous vector of `size` elements; null for None.
const void* vector_of(const std::optional<Tensor>& tensor, const char* name, DType dtype, int64_t size) {
  if (!tensor) return nullptr;
  check_dtype(*tensor, name, dtype);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(), name,
                  " must be a contiguous vector of ", size, " elements.");
  return tensor->const_data_ptr();
}

// ---------------------------------------------------------------------------------------------- activation

std::tuple<Tensor, Tensor> activation_cpu(Tensor x, std::string name) {
  const DType dtype = working_dtype(x, "x");
  check_dense(x, "x", 0);
  const char* const names[] = {"gelu", "gelu_tanh", "silu"};
  const int64_t index = std::find(names, names + kActivationCount, name) - names;
  STD_TORCH_CHECK(index < kActivationCount, "There is no activation \"", name, "\": choose gelu, gelu_tanh or silu.");
  Tensor y = torch::stable::empty_like(x), derivative = torch::stable::empty_like(x);
  const ActivationBlock block = chosen_kernels().tangents.activation[index][dtype];
  const char* const source = static_cast<const char*>(x.const_data_ptr());
  char *const values = static_cast<char*>(y.mutable_data_ptr()), *const derivatives =
                                                                     static_cast<char*>(derivative.mutable_data_ptr());
  const int64_t size = bytes(dtype);
  torch::stable::parallel_for(0, x.numel(), kBlockSize, [&](int64_t from, int64_t to) {
    block(source + from * size, values + from * size, derivatives + from * size, to - from);
  });
  return {y, derivative};
}

// ---------------------------------------------------------------------------------------------- layer norm

Tensor layer_norm_tangent_cpu(Tensor dx, Tensor x, std::optional<Tensor> mean, Tensor rstd,
                              std::optional<Tensor> weight, std::optional<Tensor> dweight,
                              std::optional<Tensor> dbias) {
  const DType dtype = working_dtype(x, "x");
  check_dtype(dx, "dx", dtype);
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be contiguous, [rows, size]: reshape it.");
  check_same_layout(x, "x", dx, "dx", 0);
  const int64_t rows = x.size(0), size = x.size(1);
  Tensor dy = torch::stable::empty_like(x);
  const LayerNormArguments arguments{dx.const_data_ptr(),
                                     x.const_data_ptr(),
                                     vector_of(mean, "mean", dtype, rows),
                                     vector_of(rstd, "rstd", dtype, rows),
                                     vector_of(weight, "weight", dtype, size),
                                     vector_of(dweight, "dweight", dtype, size),
                                     vector_of(dbias, "dbias", dtype, size),
                                     dy.mutable_data_ptr(),
                                     size};
  const LayerNormRows work = chosen_kernels().tangents.layer_norm[dtype];
  const int64_t grain = std::max<int64_t>(1, kBlockSize / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) { work(arguments, from, to); });
  return dy;
}

// ---------------------------------------------------------------------------------------------- batch norm

// Whether channels come last in memory, as they do in [N, C] as well; false where x is contiguous.
bool channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto fits = [&](size_t dim, int64_t stride) { return sizes[dim] == 1 || strides[dim] == stride; };
  bool last = fits(1, 1);
  int64_t stride = sizes[1];
  for (size_t d = sizes.size() - 1; d >= 2; stride *= sizes[d--]) last = last && fits(d, stride);
  last = last && fits(0, stride);
  STD_TORCH_CHECK(last || x.is_contiguous(), "x must be contiguous or channels-last: call .contiguous() on it first.");
  return last;
}

Tensor batch_norm_tangent_cpu(Tensor dx, Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight,
                              std::optional<Tensor> dweight, std::optional<Tensor> dbias, bool training) {
  const DType dtype = working_dtype(x, "x");
  check_dtype(dx, "dx", dtype);
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [N, C, ...].");
  check_same_layout(x, "x", dx, "dx", 0);
  Tensor dy = torch::stable::empty_like(x);
  const int64_t batch = x.size(0), channels = x.size(1);
  const auto channel_vector = [&](const std::optional<Tensor>& t, const char* name) {
    return vector_of(t, name, dtype, channels);
  };
  BatchNormArguments arguments{dx.const_data_ptr(),
                               x.const_data_ptr(),
                               channel_vector(mean, "mean"),
                               channel_vector(rstd, "rstd"),
                               channel_vector(weight, "weight"),
                               channel_vector(dweight, "dweight"),
                               channel_vector(dbias, "dbias"),
                               dy.mutable_data_ptr(),
                               batch,
                               channels,
                               0,
                               training};
  if (x.numel() == 0) return dy;
  arguments.plane = x.numel() / (batch * channels);
  const TangentKernels& kernels = chosen_kernels().tangents;
  if (!channels_last(x)) {
    const int64_t grain = std::max<int64_t>(1, kBlockSize / (batch * arguments.plane));
    torch::stable::parallel_for(
        0, channels, grain, [&](int64_t from, int64_t to) { kernels.batch_norm_planes[dtype](arguments, from, to); });
    return dy;
  }
  // Blocks of rows that don't depend on the threads, so that neither do the sums.
  const int64_t rows = batch * arguments.plane, block = std::max<int64_t>(1, kBlockSize / channels);
  const int64_t blocks = (rows + block - 1) / block;
  std::vector<double> means(2 * channels);
  if (training) {
    std::vector<double> partial(blocks * 2 * channels);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; b++) {
        kernels.batch_norm_sums[dtype](arguments, b * block, std::min(rows, (b + 1) * block),
                                       &partial[b * 2 * channels]);
      }
    });
    for (size_t i = 0; i < partial.size(); i++) means[i % (2 * channels)] += partial[i];
    for (double& mean : means) mean /= static_cast<double>(rows);
  }
  torch::stable::parallel_for(0, rows, block, [&](int64_t from, int64_t to) {
    kernels.batch_norm_rows[dtype](arguments, from, to, means.data());
  });
  return dy;
}

// ---------------------------------------------------------------------------------------------- attention

// A tensor of the given sizes whose last dimension is contiguous.
AttentionTensor attention_tensor(const Tensor& t, const char* name, DType dtype, std::vector<int64_t> sizes,
                                 bool contiguous = true) {
  check_dtype(t, name, dtype);
  const auto own = t.sizes();
  STD_TORCH_CHECK(own.size() == 4 && std::equal(sizes.begin(), sizes.end(), own.begin()), name,
                  " must have the sizes [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "].");
  STD_TORCH_CHECK(!contiguous || sizes[3] <= 1 || t.stride(3) == 1, name,
                  " must be contiguous in its last dimension: call .contiguous() on it first.");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Tensor attention_tangent_cpu(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, Tensor out,
                             std::optional<Tensor> mask, bool is_causal, double scale) {
  const DType dtype = working_dtype(q, "q");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [batch, heads, rows, columns].");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), depth = q.size(3),
                width = v.size(3);
  Tensor result = torch::stable::new_empty(q, {batch, queries, heads, width});
  const auto tensor = [&](const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    return attention_tensor(t, name, dtype, {batch, heads, rows, columns});
  };
  AttentionArguments arguments{};
  arguments.dq = tensor(dq, "dq", queries, depth), arguments.q = tensor(q, "q", queries, depth);
  arguments.dk = tensor(dk, "dk", keys, depth), arguments.k = tensor(k, "k", keys, depth);
  arguments.dv = tensor(dv, "dv", keys, width), arguments.v = tensor(v, "v", keys, width);
  arguments.out = tensor(out, "out", queries, width);
  if (mask) arguments.mask = attention_tensor(*mask, "mask", dtype, {batch, heads, queries, keys}, false);
  arguments.result = result.mutable_data_ptr();
  arguments.batch = batch, arguments.heads = heads, arguments.queries = queries, arguments.keys = keys;
  arguments.depth = depth, arguments.width = width;
  arguments.is_causal = is_causal, arguments.scale = scale;

  const AttentionBlock work = chosen_kernels().tangents.attention[dtype];
  const int64_t blocks = (queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t products = std::min(queries, kQueryBlock) * keys * (depth + width);
  const int64_t grain = std::max<int64_t>(1, kBlockSize / std::max<int64_t>(1, products));
  torch::stable::parallel_for(0, batch * heads * blocks, grain, [&](int64_t from, int64_t to) {
    std::vector<char> scratch(attention_scratch(depth, width) * bytes(dtype));
    for (int64_t i = from; i < to; i++) {
      const int64_t block = i % blocks, head = i / blocks % heads, begin = block * kQueryBlock;
      work(arguments, i / blocks / heads, head, begin, std::min(queries, begin + kQueryBlock), scratch.data());
    }
  });
  return torch::stable::transpose(result, 1, 2);
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("activation", TORCH_BOX(&curveball::cpu::activation_cpu));
  m.impl("attention_tangent", TORCH_BOX(&curveball::cpu::attention_tangent_cpu));
  m.impl("batch_norm_tangent", TORCH_BOX(&curveball::cpu::batch_norm_tangent_cpu));
  m.impl("layer_norm_tangent", TORCH_BOX(&curveball::cpu::layer_norm_tangent_cpu));
}
