// The operators on losses, for CUDA: choice of kernels, launches, registration. Built on LibTorch's stable ABI only;
// compiles for the emulator too.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cross_entropy.cuh"
#include "elementwise_losses.cuh"
#include "launch.h"
#include "loss_checks.h"

#if !defined(CURVEBALL_LOSS_BLOCKS)
#define CURVEBALL_LOSS_BLOCKS 4096
#endif

namespace curveball::cuda {
namespace {

// At most. Enough for the largest GPU, and few enough for one block to add up their sums in no time. The tests take
// fewer, so that each block has much to do.
constexpr int64_t kMaxBlocks = CURVEBALL_LOSS_BLOCKS;

// ---------------------------------------------------------------------------------------------- helpers

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

Tensor new_doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

int64_t blocks_for(int64_t pieces, int64_t pieces_per_block, int64_t most = kMaxBlocks) {
  return std::clamp<int64_t>((pieces + pieces_per_block - 1) / pieces_per_block, 1, most);
}

using Products = std::tuple<Tensor, Tensor, Tensor>;

// Loss and products out of the partial sums.
std::pair<Tensor, Tensor> finish_products(const Tensor& partials, Stream stream) {
  Tensor loss = new_doubles(partials, {}), products = new_doubles(partials, {2});
  launch(finish_loss_products_kernel, 1, kFinishThreads, 0, stream, partials.const_data_ptr<double>(), partials.size(0),
         loss.mutable_data_ptr<double>(), products.mutable_data_ptr<double>());
  return {loss, products};
}

Tensor finish_dots(const Tensor& partials, const double* products, Stream stream) {
  Tensor five = new_doubles(partials, {5});
  launch(finish_loss_dots_kernel, 1, kFinishThreads, 0, stream, partials.const_data_ptr<double>(), partials.size(0),
         products, five.mutable_data_ptr<double>());
  return five;
}

// ---------------------------------------------------------------------------------------------- cross-entropy

constexpr int64_t kWarpClasses = 1024;   // up to here a warp takes a row, beyond a block
constexpr int64_t kTotalTargets = 1024;  // for each block of the sum over the targets
// A block that takes a long row fills a multiprocessor: fewer blocks, each with several rows, start and end less often.
constexpr int64_t kMaxTeamBlocks = std::min<int64_t>(kMaxBlocks, 1024);

// How the rows of x are shared out.
struct RowPlan {
  bool warps;
  int threads, room;
  int64_t blocks;
  size_t shared_bytes;
  int shared_limit;  // the most that such a launch may take
};

template <typename T>
RowPlan plan_rows(const Tensor& x) {
  using C = Compute<T>;
  const int64_t n = x.size(0), vectors = x.size(1) / kVectorLength<T>;
  if (x.size(1) <= kWarpClasses) {
    constexpr int threads = WarpTeam<C>::kThreads;
    return {true, threads, 0, blocks_for(n, threads / 32), 0, 0};
  }
  const int64_t warps = std::clamp<int64_t>(vectors / kSweep1Batch<T> / 32, 4, BlockTeam<C>::kThreads / 32);
  const int64_t limit = max_shared_bytes(x.get_device_index()) - static_cast<int64_t>(sizeof(RowShared<C>));
  const int64_t room = std::min(limit / 32, vectors);  // 16 bytes each of x and v
  return {false,
          static_cast<int>(32 * warps),
          static_cast<int>(room),
          blocks_for(n, 1, kMaxTeamBlocks),
          static_cast<size_t>(32 * room),
          static_cast<int>(limit)};
}

template <typename Kernel, typename T>
void launch_rows(Kernel warp_kernel, Kernel block_kernel, const RowPlan& plan, Stream stream,
                 const CrossEntropy<T>& arguments) {
  const Kernel kernel = plan.warps ? warp_kernel : block_kernel;
  // Always to the same value: another thread may be about to launch this kernel for longer rows.
  if (plan.shared_bytes > 0) raise_shared_limit(kernel, plan.shared_limit);
  launch(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, arguments);
}

// What both operators hand to their kernels, and the memory behind it.
template <typename T>
struct CrossEntropyCall {
  Stream stream;
  RowPlan plan;
  Tensor partials, totals;
  CrossEntropy<T> arguments;

  CrossEntropyCall(const Tensor& x, const Tensor& v, const Tensor& target, const std::optional<Tensor>& weight,
                   int64_t ignore_index, bool mean, double label_smoothing, double sign, bool with_totals)
      : stream(current_stream(x.get_device_index())),
        plan(plan_rows<T>(x)),
        partials(new_doubles(x, {plan.blocks, 3})),
        totals(new_doubles(x, {with_totals ? std::min<int64_t>(blocks_for(x.size(0), kTotalTargets), 128) : 0, 2})) {
    using C = Compute<T>;
    const C* w = weights_of<C>(x, weight, "weight");
    const int64* y = data<int64>(target);
    const int total_blocks = static_cast<int>(totals.size(0));
    arguments = {{data<T>(x), data<T>(v), nullptr, x.size(0), static_cast<int>(x.size(1)), plan.room},
                 nullptr,
                 y,
                 w,
                 nullptr,
                 totals.const_data_ptr<double>(),
                 total_blocks,
                 partials.mutable_data_ptr<double>(),
                 ignore_index,
                 label_smoothing,
                 sign,
                 mean};
    if (with_totals) {
      launch(cross_entropy_totals_kernel<C>, total_blocks, kTotalThreads, 0, stream, y, w, x.size(0), x.size(1),
             ignore_index, totals.mutable_data_ptr<double>());
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_products(Tensor x, Tensor v, Tensor target,
                                                                  std::optional<Tensor> weight, int64_t ignore_index,
                                                                  bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  const DType dtype = dtype_of(x, "x", 0);
  const DeviceGuard guard(x.get_device_index());
  Tensor c = torch::stable::new_empty(x, x.sizes());
  Tensor rows = torch::stable::new_empty(x, {x.size(0), 3}, dtype == kFloat64 ? ScalarType::Double : ScalarType::Float);
  Tensor loss, products;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool with_totals = mean || (weight && label_smoothing != 0.0);
    CrossEntropyCall<T> call(x, v, target, weight, ignore_index, mean, label_smoothing, sign, with_totals);
    call.arguments.c = static_cast<T*>(c.mutable_data_ptr());
    call.arguments.per_row = rows.mutable_data_ptr<Compute<T>>();
    if (label_smoothing != 0.0) {
      launch_rows(cross_entropy_products_kernel<T, WarpTeam, true>, cross_entropy_products_kernel<T, BlockTeam, true>,
                  call.plan, call.stream, call.arguments);
    } else {
      launch_rows(cross_entropy_products_kernel<T, WarpTeam, false>, cross_entropy_products_kernel<T, BlockTeam, false>,
                  call.plan, call.stream, call.arguments);
    }
    std::tie(loss, products) = finish_products(call.partials, call.stream);
  });
  return {loss, c, products, rows};
}

Tensor cross_entropy_dots(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight, Tensor rows,
                          Tensor products, int64_t ignore_index, bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  check_like(x, u, "u");
  check_place(x, u, "u");
  check_place(x, rows, "rows");
  const DType dtype = dtype_of(x, "x", 0);
  STD_TORCH_CHECK(rows.scalar_type() == (dtype == kFloat64 ? ScalarType::Double : ScalarType::Float) &&
                      rows.numel() == 3 * x.size(0),
                  "rows must be what cross_entropy_products returned for the same x.");
  const double* first = products_of(x, products);
  const DeviceGuard guard(x.get_device_index());
  Tensor five;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // Without smoothing t/D is s/D, which `rows` holds, and no totals are needed.
    const bool smoothed = label_smoothing != 0.0;
    CrossEntropyCall<T> call(x, v, target, weight, ignore_index, mean, label_smoothing, sign, smoothed && mean);
    call.arguments.rows.u = data<T>(u);
    call.arguments.per_row = const_cast<Compute<T>*>(data<Compute<T>>(rows));
    if (smoothed) {
      launch_rows(cross_entropy_dots_kernel<T, WarpTeam, true>, cross_entropy_dots_kernel<T, BlockTeam, true>,
                  call.plan, call.stream, call.arguments);
    } else {
      launch_rows(cross_entropy_dots_kernel<T, WarpTeam, false>, cross_entropy_dots_kernel<T, BlockTeam, false>,
                  call.plan, call.stream, call.arguments);
    }
    five = finish_dots(call.partials, first, call.stream);
  });
  return five;
}

// ---------------------------------------------------------------------------------------------- elementwise losses

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
Products element_products(const Tensor& x, Elements<T, Loss> arguments) {
  const Stream stream = current_stream(x.get_device_index());
  Tensor c = torch::stable::new_empty(x, x.sizes());
  Tensor partials = new_doubles(x, {element_blocks(x, dtype_of_type<T>), 3});
  arguments.c = static_cast<T*>(c.mutable_data_ptr());
  arguments.partials = partials.mutable_data_ptr<double>();
  launch(element_products_kernel<T, Loss>, partials.size(0), kElementThreads, 0, stream, arguments);
  const auto [loss, products] = finish_products(partials, stream);
  return {loss, c, products};
}

template <typename T, template <typename> class Loss>
Tensor element_dots(const Tensor& x, const Tensor& u, const Tensor& products, Elements<T, Loss> arguments) {
  check_like(x, u, "u");
  check_place(x, u, "u");
  const double* first = products_of(x, products);
  const Stream stream = current_stream(x.get_device_index());
  Tensor partials = new_doubles(x, {element_blocks(x, dtype_of_type<T>), 3});
  arguments.u = data<T>(u);
  arguments.partials = partials.mutable_data_ptr<double>();
  launch(element_dots_kernel<T, Loss>, partials.size(0), kElementThreads, 0, stream, arguments);
  return finish_dots(partials, first, stream);
}

Products mse_products(Tensor x, Tensor v, Tensor target, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Products result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    result = element_products(x, elements<T, SquaredError>(x, v, target, mean, sign, {}));
  });
  return result;
}

Tensor mse_dots(Tensor x, Tensor v, Tensor u, Tensor target, Tensor products, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Tensor result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    result = element_dots(x, u, products, elements<T, SquaredError>(x, v, target, mean, sign, {}));
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

Products bce_products(Tensor x, Tensor v, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                      bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Products result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    const auto loss = binary_cross_entropy<Compute<T>>(x, weight, pos_weight);
    result = element_products(x, elements<T, BinaryCrossEntropy>(x, v, target, mean, sign, loss));
  });
  return result;
}

Tensor bce_dots(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                std::optional<Tensor> pos_weight, Tensor products, bool mean, double sign) {
  check_elements(x, v, target);
  const DeviceGuard guard(x.get_device_index());
  Tensor result;
  for_dtype(dtype_of(x, "x", 0), [&](auto zero) {
    using T = decltype(zero);
    const auto loss = binary_cross_entropy<Compute<T>>(x, weight, pos_weight);
    result = element_dots(x, u, products, elements<T, BinaryCrossEntropy>(x, v, target, mean, sign, loss));
  });
  return result;
}

}  // namespace
}  // namespace curveball::cuda

CURVEBALL_REGISTER(m) {
  m.impl("cross_entropy_products", TORCH_BOX(&curveball::cuda::cross_entropy_products));
  m.impl("cross_entropy_dots", TORCH_BOX(&curveball::cuda::cross_entropy_dots));
  m.impl("mse_products", TORCH_BOX(&curveball::cuda::mse_products));
  m.impl("mse_dots", TORCH_BOX(&curveball::cuda::mse_dots));
  m.impl("bce_products", TORCH_BOX(&curveball::cuda::bce_products));
  m.impl("bce_dots", TORCH_BOX(&curveball::cuda::bce_dots));
}
