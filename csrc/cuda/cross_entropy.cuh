// Cross-entropy: loss, gradient and Gauss-Newton products in the logits, each row of logits read once.
//
// x logits, v = Jz, u = Jr, all [N, C]; p = softmax(x), v' = v - <p, v>, u' = u - <p, u>. With own_n the weight of the
// target's class (0 where the target is ignored), t = (1-e) own onehot + e/C weight, s = sum_c t_c, and D = sum_n own_n
// for the mean, 1 for the sum:
//     loss = -1/D sum t log p,   g = sign (s p - t)/D,   Hv = sign s p v'/D,   c = g + Hv
// so that, as <p, v'> = 0,   g.v' = -sign/D sum t v',   v'.Hv' = sign/D sum s p v' v',   and likewise with u'.
#pragma once

#include "row_sweeps.cuh"

namespace curveball::cuda {

template <typename T>
struct CrossEntropy {
  Rows<T> rows;
  T* c;
  const int64* target;       // [N]
  const Compute<T>* weight;  // [C], or null for ones
  Compute<T>* row_stats;     // [N, 3]: log sum exp x, <p, v>, s/D
  const double* totals;      // [total_blocks, 2]: own_n, weight; none where neither sum is needed
  int total_blocks;
  double* partials;  // [blocks, 3]
  int64 ignore_index;
  double label_smoothing, sign;
  bool mean;
};

// ---------------------------------------------------------------------------------------------- totals

constexpr int kTotalThreads = 512;

// Partial sums of own_n over the rows and of the weights over the classes.
template <typename C>
__global__ void __launch_bounds__(kTotalThreads)
    cross_entropy_totals_kernel(const int64* target, const C* weight, int64 n, int64 classes, int64 ignore_index,
                                double* totals) {
  __shared__ double shared[kBlockSumSize<2>];
  double sums[2] = {0.0, 0.0};
  const int64 rank = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
  for (int64 i = rank; i < n; i += step) {
    const int64 y = target[i];
    if (y != ignore_index && y >= 0 && y < classes) sums[0] += weight ? weight[y] : C(1);
  }
  if (weight) {
    for (int64 i = rank; i < classes; i += step) sums[1] += weight[i];
  }
  block_sum(sums, shared);
  if (threadIdx.x == 0) {
    totals[2 * blockIdx.x] = sums[0];
    totals[2 * blockIdx.x + 1] = sums[1];
  }
}

// What the rows have in common; in shared memory, to save registers.
struct Common {
  double inverse;  // 1/D
  double keep;     // 1 - e
  double smooth;   // e/C
  double weights;  // sum of the weights
};

template <typename T>
__device__ __forceinline__ void find_common(const CrossEntropy<T>& a, Common& common) {
  if (threadIdx.x < 32) {
    double own = 0.0, weights = 0.0;
    for (int i = threadIdx.x; i < a.total_blocks; i += 32) {
      own += a.totals[2 * i];
      weights += a.totals[2 * i + 1];
    }
    own = warp_sum(own);
    weights = warp_sum(weights);
    if (threadIdx.x == 0) {
      common = {a.mean ? 1.0 / own : 1.0, 1.0 - a.label_smoothing, a.label_smoothing / a.rows.classes,
                a.weight ? weights : a.rows.classes};
    }
  }
  __syncthreads();
}

// What a block has in shared memory besides the rows.
template <typename C>
struct RowShared {
  double sums[kBlockSumSize<3>];
  Softmax<C, double> slots[kTeamSlots];
  Common common;
};

// What a block has in shared memory besides a tile of rows.
struct TileShared {
  double sums[kBlockSumSize<3>];
  Common common;
};

// The target of a team's next row, loaded while it is at the row before: no row waits for its own.
struct NextTarget {
  int64 y;

  template <typename T>
  __device__ __forceinline__ NextTarget(const CrossEntropy<T>& a, int64 row) : y(row < a.rows.n ? a.target[row] : 0) {}

  // The target that was loaded; loads that of `row`.
  template <typename T>
  __device__ __forceinline__ int64 take(const CrossEntropy<T>& a, int64 row) {
    const int64 loaded = y;
    if (row < a.rows.n) y = a.target[row];
    return loaded;
  }
};

// ---------------------------------------------------------------------------------------------- first product

// What a thread has gathered, without 1/D and sign.
struct CotangentSums {
  double loss = 0.0, gv = 0.0, vhv = 0.0;
};

// A row, by a team, from x and v to c.
template <bool smoothed, typename T, typename Team>
__device__ __forceinline__ void cotangent_of_row(const CrossEntropy<T>& a, const Common& common, Team& team, int64 n,
                                                 int64 y, const T* x_row, const T* v_row, T* c, CotangentSums& sums) {
  using C = Compute<T>;
  C* const row_stats = a.row_stats + 3 * n;
  if (y == a.ignore_index || y < 0 || y >= a.rows.classes) {
    const C value = y == a.ignore_index ? 0.0f : float_from_bits(0x7fc00000u);  // NaN
    fill_row(team, c, a.rows.classes, value);
    if (team.rank() == 0) row_stats[0] = row_stats[1] = row_stats[2] = value;
    sums.loss += value;
    return;
  }
  const double hit = common.keep * (a.weight ? a.weight[y] : C(1)), s = hit + common.smooth * common.weights;
  const C c_hit = a.sign * hit * common.inverse, c_smooth = a.sign * common.smooth * common.inverse;

  const RowSweeps<T, Team, 2> row(a.rows, team, x_row, v_row, c);
  const Softmax<C, double> softmax = team.join(row.sweep_1(kLowest<C>));
  const C maximum = softmax.maximum, sum = softmax.sum, mean_v = C(softmax.dot) / sum;
  const C scale = C(a.sign * s * common.inverse) / sum;  // c = scale exp(x - max) (1 + v') - sign t/D
  C row_vhv = 0, own_x = 0, own_v = 0, smooth_x = 0, smooth_v = 0;
  row.sweep_2([&](int column, const auto& piece) {
    const auto x = piece.of[0].unpacked(), v = piece.of[1].unpacked();
    constexpr int length = sizeof(x.v) / sizeof(C);
    auto out = x;
    C piece_vhv = 0;
#pragma unroll
    for (int k = 0; k < length; k++) {
      const C e = fast_exp(x.v[k] - maximum), centered = v.v[k] - mean_v, product = e * centered;
      piece_vhv += product * centered;
      out.v[k] = scale * (e + product);
      if constexpr (smoothed) {
        const C w = a.weight ? a.weight[column + k] : C(1);
        smooth_x += w * (x.v[k] - maximum);
        smooth_v += w * centered;
        out.v[k] -= c_smooth * w;
      }
    }
    row_vhv += piece_vhv;
    const int place = static_cast<int>(y) - column;
    if (0 <= place && place < length) {
#pragma unroll
      for (int k = 0; k < length; k++) {
        if (k != place) continue;
        out.v[k] -= c_hit;
        own_x = x.v[k] - maximum;
        own_v = v.v[k] - mean_v;
      }
    }
    store_result<Team>(c + column, out);
  });
  sums.vhv += static_cast<double>(row_vhv) * (C(s) / sum);
  sums.loss -= hit * own_x + common.smooth * smooth_x;
  sums.gv -= hit * own_v + common.smooth * smooth_v;
  if (team.rank() == 0) {
    const C log_sum = log(sum);
    sums.loss += s * log_sum;
    row_stats[0] = maximum + log_sum;
    row_stats[1] = mean_v;
    row_stats[2] = s * common.inverse;
  }
}

template <typename T>
__device__ __forceinline__ void finish_cotangent_rows(const CrossEntropy<T>& a, const Common& common,
                                                      const CotangentSums& thread, double* shared) {
  // D = 0: 0 * inf = NaN.
  double sums[3] = {thread.loss * common.inverse, a.sign * thread.gv * common.inverse,
                    a.sign * thread.vhv * common.inverse};
  block_sum(sums, shared);
  store_partials(sums, a.partials);
}

template <typename T, template <typename> class Team, bool smoothed>
__global__ void __launch_bounds__(Team<Compute<T>>::kThreads, Team<Compute<T>>::kBlocks)
    cross_entropy_cotangent_kernel(const CrossEntropy<T> __grid_constant__ a) {
  using C = Compute<T>;
  __shared__ RowShared<C> shared;
  find_common(a, shared.common);
  CotangentSums sums;
  Team<C> team(shared.slots);
  NextTarget target(a, team.first_row());
  for (int64 n = team.first_row(); n < a.rows.n; n += team.row_step()) {
    const int64 y = target.take(a, n + team.row_step());
    const int64 begin = n * a.rows.classes;
    cotangent_of_row<smoothed>(a, shared.common, team, n, y, a.rows.x + begin, a.rows.v + begin, a.c + begin, sums);
  }
  finish_cotangent_rows(a, shared.common, sums, shared.sums);
}

// A thread for each row of a tile, which passes through shared memory, so that accesses are of neighbors: c takes the
// place of x there.
template <typename T, bool smoothed>
__global__ void __launch_bounds__(ThreadTeam<Compute<T>>::kThreads, ThreadTeam<Compute<T>>::kBlocks)
    cross_entropy_cotangent_tile_kernel(const CrossEntropy<T> __grid_constant__ a) {
  __shared__ TileShared shared;
  find_common(a, shared.common);
  CotangentSums sums;
  ThreadTeam<Compute<T>> team;
  T* const tile = static_cast<T*>(dynamic_shared());
  const int thread = threadIdx.x, threads = blockDim.x, height = threads < a.rows.room ? threads : a.rows.room;
  const int most = height * a.rows.classes, mine = thread * a.rows.classes;
  const int64 step = static_cast<int64>(gridDim.x) * height;
  for (int64 first = static_cast<int64>(blockIdx.x) * height; first < a.rows.n; first += step) {
    const int64 n = first + thread, begin = first * a.rows.classes;
    const int rows = static_cast<int>(a.rows.n - first < height ? a.rows.n - first : height);
    const bool exists = thread < rows;
    const int64 y = exists ? a.target[n] : 0;
    stage_tile<2>({a.rows.x + begin, a.rows.v + begin}, {tile, tile + most}, rows * a.rows.classes);
    __syncthreads();
    if (exists) {
      T* const x = tile + mine;
      cotangent_of_row<smoothed>(a, shared.common, team, n, y, x, x + most, x, sums);
    }
    __syncthreads();
    store_tile(tile, a.c + begin, rows * a.rows.classes);
    __syncthreads();
  }
  finish_cotangent_rows(a, shared.common, sums, shared.sums);
}

// ---------------------------------------------------------------------------------------------- second product

// What a thread has gathered, without the sign.
struct ProductSums {
  double gu = 0.0, vhu = 0.0, uhu = 0.0;
};

// A row, by a team. The logits are normalized again, so that the rounding of their normalizer, which grows with |x|,
// does not matter.
template <bool smoothed, typename T, typename Team>
__device__ __forceinline__ void products_of_row(const CrossEntropy<T>& a, const Common& common, Team& team, int64 n,
                                                int64 y, const T* x_row, const T* v_row, const T* u_row,
                                                ProductSums& sums) {
  using C = Compute<T>;
  if (y == a.ignore_index) return;
  const C mean_v = a.row_stats[3 * n + 1], share = a.row_stats[3 * n + 2];
  if (y < 0 || y >= a.rows.classes) {
    sums.gu += share;  // NaN
    return;
  }
  const RowSweeps<T, Team, 3> row(a.rows, team, x_row, u_row, v_row);
  const Softmax<C, double> softmax = team.join(row.sweep_1(a.row_stats[3 * n]));
  const C maximum = softmax.maximum, sum = softmax.sum, mean_u = C(softmax.dot) / sum;
  const double hit = smoothed ? common.keep * (a.weight ? a.weight[y] : C(1)) * common.inverse : share;
  C row_vhu = 0, row_uhu = 0, own_u = 0, smooth_u = 0;
  row.sweep_2([&](int column, const auto& piece) {
    const auto x = piece.of[0].unpacked(), u = piece.of[1].unpacked(), v = piece.of[2].unpacked();
    constexpr int length = sizeof(x.v) / sizeof(C);
    C piece_vhu = 0, piece_uhu = 0;
#pragma unroll
    for (int k = 0; k < length; k++) {
      const C centered = u.v[k] - mean_u, product = fast_exp(x.v[k] - maximum) * centered;
      piece_vhu += product * (v.v[k] - mean_v);
      piece_uhu += product * centered;
      if constexpr (smoothed) smooth_u += (a.weight ? a.weight[column + k] : C(1)) * centered;
    }
    row_vhu += piece_vhu;
    row_uhu += piece_uhu;
    const int place = static_cast<int>(y) - column;
    if (0 <= place && place < length) {
#pragma unroll
      for (int k = 0; k < length; k++) {
        if (k == place) own_u = u.v[k] - mean_u;
      }
    }
  });
  const double factor = share / sum;
  sums.vhu += factor * row_vhu;
  sums.uhu += factor * row_uhu;
  sums.gu -= hit * own_u;
  if constexpr (smoothed) sums.gu -= common.smooth * common.inverse * smooth_u;
}

template <typename T>
__device__ __forceinline__ void finish_product_rows(const CrossEntropy<T>& a, const ProductSums& thread,
                                                    double* shared) {
  double sums[3] = {a.sign * thread.gu, a.sign * thread.vhu, a.sign * thread.uhu};
  block_sum(sums, shared);
  store_partials(sums, a.partials);
}

template <typename T, template <typename> class Team, bool smoothed>
__global__ void __launch_bounds__(Team<Compute<T>>::kThreads, Team<Compute<T>>::kBlocks)
    cross_entropy_products_kernel(const CrossEntropy<T> __grid_constant__ a) {
  using C = Compute<T>;
  __shared__ RowShared<C> shared;
  find_common(a, shared.common);
  ProductSums sums;
  Team<C> team(shared.slots);
  NextTarget target(a, team.first_row());
  for (int64 n = team.first_row(); n < a.rows.n; n += team.row_step()) {
    const int64 y = target.take(a, n + team.row_step());
    const int64 begin = n * a.rows.classes;
    products_of_row<smoothed>(a, shared.common, team, n, y, a.rows.x + begin, a.rows.v + begin, a.rows.u + begin, sums);
  }
  finish_product_rows(a, sums, shared.sums);
}

// As the tiles of the first product.
template <typename T, bool smoothed>
__global__ void __launch_bounds__(ThreadTeam<Compute<T>>::kThreads, ThreadTeam<Compute<T>>::kBlocks)
    cross_entropy_products_tile_kernel(const CrossEntropy<T> __grid_constant__ a) {
  __shared__ TileShared shared;
  find_common(a, shared.common);
  ProductSums sums;
  ThreadTeam<Compute<T>> team;
  T* const tile = static_cast<T*>(dynamic_shared());
  const int thread = threadIdx.x, threads = blockDim.x, height = threads < a.rows.room ? threads : a.rows.room;
  const int most = height * a.rows.classes, mine = thread * a.rows.classes;
  const int64 step = static_cast<int64>(gridDim.x) * height;
  for (int64 first = static_cast<int64>(blockIdx.x) * height; first < a.rows.n; first += step) {
    const int64 n = first + thread, begin = first * a.rows.classes;
    const int rows = static_cast<int>(a.rows.n - first < height ? a.rows.n - first : height);
    const bool exists = thread < rows;
    const int64 y = exists ? a.target[n] : 0;
    stage_tile<3>({a.rows.x + begin, a.rows.v + begin, a.rows.u + begin}, {tile, tile + most, tile + 2 * most},
                  rows * a.rows.classes);
    __syncthreads();
    if (exists) {
      const T* const x = tile + mine;
      products_of_row<smoothed>(a, shared.common, team, n, y, x, x + most, x + 2 * most, sums);
    }
    __syncthreads();
  }
  finish_product_rows(a, sums, shared.sums);
}

}  // namespace curveball::cuda
