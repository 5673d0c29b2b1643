// The operators on cross-entropy, for CUDA: launches and registration; compiles for the emulator too.

#include <optional>
#include <tuple>

#include "cross_entropy.cuh"
#include "loss_launch.h"

namespace curveball::cuda {
namespace {

constexpr int64_t kThreadBytes = 128;    // of a row that a thread takes, at most
constexpr int64_t kWarpClasses = 1024;   // up to here a warp takes a row, beyond a block
constexpr int64_t kTotalTargets = 1024;  // for each block of the sum over the targets
// A block that takes a long row fills a multiprocessor: fewer blocks, each with several rows, start and end less often.
constexpr int64_t kMaxTeamBlocks = std::min<int64_t>(kMaxBlocks, 1024);

// How the rows of x are shared out.
struct RowPlan {
  enum { kThreads, kWarps, kBlocks } teams;
  int threads, room;
  int64_t blocks;
  size_t shared_bytes;
  int shared_limit;  // the most that such a launch may take
};

template <typename T>
RowPlan plan_rows(const Tensor& x) {
  using C = Compute<T>;
  const int64_t n = x.size(0), row_bytes = x.size(1) * static_cast<int64_t>(sizeof(T));
  if (row_bytes <= kThreadBytes) {
    constexpr int threads = ThreadTeam<C>::kThreads;
    const int64_t limit = max_shared_bytes(x.get_device_index()) - static_cast<int64_t>(sizeof(TileShared));
    const int64_t room = std::min<int64_t>(threads, limit / std::max<int64_t>(3 * row_bytes, 1));  // of x, v and u
    return {RowPlan::kThreads,
            threads,
            static_cast<int>(room),
            blocks_for(n, room),
            static_cast<size_t>(3 * room * row_bytes),
            static_cast<int>(limit)};
  }
  if (x.size(1) <= kWarpClasses) {
    constexpr int threads = WarpTeam<C>::kThreads;
    return {RowPlan::kWarps, threads, 0, blocks_for(n, threads / 32), 0, 0};
  }
  const int64_t vectors = x.size(1) / kVectorLength<T>;
  const int64_t warps = std::clamp<int64_t>(vectors / kSweep1Batch<T> / 32, 4, BlockTeam<C>::kThreads / 32);
  const int64_t limit = max_shared_bytes(x.get_device_index()) - static_cast<int64_t>(sizeof(RowShared<C>));
  const int64_t room = std::min(limit / 32, vectors);  // 16 bytes each of x and v
  return {RowPlan::kBlocks,
          static_cast<int>(32 * warps),
          static_cast<int>(room),
          blocks_for(n, 1, kMaxTeamBlocks),
          static_cast<size_t>(32 * room),
          static_cast<int>(limit)};
}

template <typename Kernel, typename T>
void launch_rows(Kernel tile_kernel, Kernel warp_kernel, Kernel block_kernel, const RowPlan& plan, Stream stream,
                 const CrossEntropy<T>& arguments) {
  const Kernel kernel = plan.teams == RowPlan::kThreads ? tile_kernel
                        : plan.teams == RowPlan::kWarps ? warp_kernel
                                                        : block_kernel;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_cotangent(Tensor x, Tensor v, Tensor target,
                                                                   std::optional<Tensor> weight, int64_t ignore_index,
                                                                   bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  const DType dtype = dtype_of(x, "x", 0);
  const DeviceGuard guard(x.get_device_index());
  Tensor c = torch::stable::new_empty(x, x.sizes());
  Tensor row_stats = torch::stable::new_empty(x, {x.size(0), 3}, compute_dtype(x));
  Tensor loss, products;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool with_totals = mean || (weight && label_smoothing != 0.0);
    CrossEntropyCall<T> call(x, v, target, weight, ignore_index, mean, label_smoothing, sign, with_totals);
    call.arguments.c = static_cast<T*>(c.mutable_data_ptr());
    call.arguments.row_stats = row_stats.mutable_data_ptr<Compute<T>>();
    if (label_smoothing != 0.0) {
      launch_rows(cross_entropy_cotangent_tile_kernel<T, true>, cross_entropy_cotangent_kernel<T, WarpTeam, true>,
                  cross_entropy_cotangent_kernel<T, BlockTeam, true>, call.plan, call.stream, call.arguments);
    } else {
      launch_rows(cross_entropy_cotangent_tile_kernel<T, false>, cross_entropy_cotangent_kernel<T, WarpTeam, false>,
                  cross_entropy_cotangent_kernel<T, BlockTeam, false>, call.plan, call.stream, call.arguments);
    }
    std::tie(loss, products) = finish_cotangent(call.partials, call.stream);
  });
  return {loss, c, products, row_stats};
}

Tensor cross_entropy_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                              Tensor row_stats, Tensor products, int64_t ignore_index, bool mean,
                              double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  check_like(x, u, "u");
  check_place(x, u, "u");
  check_row_stats(x, row_stats);
  const DType dtype = dtype_of(x, "x", 0);
  const double* first = products_of(x, products);
  const DeviceGuard guard(x.get_device_index());
  Tensor five;
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // Without smoothing t/D is s/D, which `row_stats` holds, and no totals are needed.
    const bool smoothed = label_smoothing != 0.0;
    CrossEntropyCall<T> call(x, v, target, weight, ignore_index, mean, label_smoothing, sign, smoothed && mean);
    call.arguments.rows.u = data<T>(u);
    call.arguments.row_stats = const_cast<Compute<T>*>(data<Compute<T>>(row_stats));
    if (smoothed) {
      launch_rows(cross_entropy_products_tile_kernel<T, true>, cross_entropy_products_kernel<T, WarpTeam, true>,
                  cross_entropy_products_kernel<T, BlockTeam, true>, call.plan, call.stream, call.arguments);
    } else {
      launch_rows(cross_entropy_products_tile_kernel<T, false>, cross_entropy_products_kernel<T, WarpTeam, false>,
                  cross_entropy_products_kernel<T, BlockTeam, false>, call.plan, call.stream, call.arguments);
    }
    five = finish_products(call.partials, first, call.stream);
  });
  return five;
}

}  // namespace
}  // namespace curveball::cuda

CURVEBALL_REGISTER(library) {
  library.impl("cross_entropy_cotangent", TORCH_BOX(&curveball::cuda::cross_entropy_cotangent));
  library.impl("cross_entropy_products", TORCH_BOX(&curveball::cuda::cross_entropy_products));
}
