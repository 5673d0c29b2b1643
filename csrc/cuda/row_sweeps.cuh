// Softmax-weighted sums over the rows of [N, C] arrays, each row read from memory once.
//
// A team of threads takes a row at a time: a block a long one, a warp a shorter one; a single thread the shortest,
// which its block has brought to shared memory together with those of the other threads. Sweep 1 finds max x, S = sum
// exp(x - max) and <p, v>. It leaves what it read in shared memory, as much as fits, where sweep 2 finds it: a thread
// reads again only what it has put there itself, so there is no barrier between them. The rest of a long row comes from
// memory again, which is the L2 cache by then.
//
// Sums are taken in C = Compute<T> within a thread's share of a row, for float at most C / (384 * 4) + 8 roundings
// deep, and in double between threads, rows and blocks. Who adds what depends on the sizes alone, never on the device.
#pragma once

#include "loss_parts.cuh"

namespace curveball::cuda {

// Vectors of each operand that a thread has under way in sweep 1: with 384 threads of a block that is 48 KiB, where
// 5 TB/s at a latency of 800 ns ask for 30 KiB on each of 132 processors. Doubles are busy with arithmetic instead.
template <typename T>
constexpr int kSweep1Batch = sizeof(T) == 8 ? 2 : 4;
// In sweep 2, which finds most in shared memory.
constexpr int kSweep2Batch = 2;

template <typename T>
struct Rows {
  const T *x, *v, *u;
  int64 n;
  int classes;
  int room;  // of shared memory: vectors of one operand's row, or rows of a tile
};

// e^x for x <= 0. In float one instruction, with a relative error of 2^-22; results below 2^-126 become zero.
__device__ __forceinline__ float fast_exp(float x) {
  x *= 1.4426950408889634f;
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }

template <typename C>
constexpr C kLowest = -3.4028234663852886e38f;
template <>
constexpr double kLowest<double> = -1.7976931348623157e308;

// max x, sum exp(x - max) and sum exp(x - max) v of a stream of pairs (x, v). As the maximum begins at the lowest
// finite number instead of -inf, x = -inf simply adds nothing. A NaN or +inf in x makes the sums NaN.
template <typename C, typename Sum = C>
struct Softmax {
  C maximum;
  Sum sum, dot;

  template <int length>
  __device__ __forceinline__ void add(const Vector<C, length>& x, const Vector<C, length>& v) {
    C top = x.v[0];
#pragma unroll
    for (int k = 1; k < length; k++) top = fmax(top, x.v[k]);
    if (top > maximum) {
      const C shrink = fast_exp(maximum - top);
      maximum = top;
      sum *= shrink;
      dot *= shrink;
    }
    C piece_sum = 0, piece_dot = 0;
#pragma unroll
    for (int k = 0; k < length; k++) {
      const C e = fast_exp(x.v[k] - maximum);
      piece_sum += e;
      piece_dot += e * v.v[k];
    }
    sum += piece_sum;
    dot += piece_dot;
  }

  // Joins the 32 streams of a warp; every lane gets the result.
  __device__ __forceinline__ Softmax<C, double> over_warp() const {
    const C all = warp_max(maximum);
    const Sum shrink = fast_exp(maximum - all);
    return {all, warp_sum(static_cast<double>(sum * shrink)), warp_sum(static_cast<double>(dot * shrink))};
  }
};

// ---------------------------------------------------------------------------------------------- teams

// Shared memory of a block in which teams join.
constexpr int kTeamSlots = 2 * 32;

// A thread for each row: very few classes. The rows are in shared memory.
template <typename C>
struct ThreadTeam {
  static constexpr int kThreads = 128, kBlocks = sizeof(C) == 8 ? 3 : 4;  // of a block; of a processor, at least
  static constexpr bool kStages = false, kInShared = true;

  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ __forceinline__ Softmax<C, double> join(const Softmax<C>& mine) {
    return {mine.maximum, static_cast<double>(mine.sum), static_cast<double>(mine.dot)};
  }
};

// A warp for each row: few classes.
template <typename C>
struct WarpTeam {
  static constexpr int kThreads = 128, kBlocks = 3;  // of a block; blocks of a processor, at least
  static constexpr bool kStages = false;             // a short row is still in the L1 cache when sweep 2 comes
  static constexpr bool kInShared = false;

  __device__ explicit WarpTeam(Softmax<C, double>*) {}
  __device__ int rank() const { return threadIdx.x % 32; }
  __device__ int size() const { return 32; }
  __device__ int64 first_row() const { return static_cast<int64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; }
  __device__ int64 row_step() const { return static_cast<int64>(gridDim.x) * (blockDim.x / 32); }
  __device__ __forceinline__ Softmax<C, double> join(const Softmax<C>& mine) { return mine.over_warp(); }
};

// A block for each row.
template <typename C>
struct BlockTeam {
  static constexpr int kThreads = 384, kBlocks = 1;  // not 512, for 128 registers are too few; short rows take fewer
  static constexpr bool kStages = true, kInShared = false;

  Softmax<C, double>* slots;
  int turn = 0;

  __device__ explicit BlockTeam(Softmax<C, double>* slots) : slots(slots) {}
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ int64 first_row() const { return blockIdx.x; }
  __device__ int64 row_step() const { return gridDim.x; }

  // Rows take turns with two sets of slots, so that one barrier a row is enough: before a warp writes a set again, all
  // have come to the barrier of the row in between, and so have read it.
  __device__ __forceinline__ Softmax<C, double> join(const Softmax<C>& mine) {
    Softmax<C, double>* const set = slots + 32 * turn;
    turn ^= 1;
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const Softmax<C, double> warp = mine.over_warp();
    if (lane == 0) set[threadIdx.x / 32] = warp;
    __syncthreads();
    const Softmax<C, double> one = lane < warps ? set[lane] : Softmax<C, double>{kLowest<C>, 0.0, 0.0};
    return one.over_warp();
  }
};

// ---------------------------------------------------------------------------------------------- sweeps

// The sweeps over one row of `arrays` operands, of which sweep 1 needs the first two.
template <typename T, typename Team, int arrays>
struct RowSweeps {
  using C = Compute<T>;
  static constexpr int kLength = kVectorLength<T>;
  // What comes from shared memory needs no company.
  static constexpr int kBatch1 = Team::kInShared ? 1 : kSweep1Batch<T>;
  static constexpr int kBatch2 = Team::kInShared ? 1 : kSweep2Batch;

  const T* base[3];  // the operands; the third may be just an output of sweep 2
  Split<T, int> parts;
  int rank, size, staged;
  Packed<T, kLength>*first_stage, *second_stage;

  __device__ __forceinline__ RowSweeps(const Rows<T>& rows, const Team& team, const T* first, const T* second,
                                       const T* third)
      : base{first, second, third},
        parts(split(rows.classes, first, second, third)),
        rank(team.rank()),
        size(team.size()),
        staged(Team::kStages ? staged_vectors(rows.room) : 0),
        // At the same places in all rows, though they differ in their number of vectors: others may still be at sweep 2
        // of the row before.
        first_stage(static_cast<Packed<T, kLength>*>(dynamic_shared())),
        second_stage(first_stage + rows.room) {}

  // All, or else a multiple of the team's size.
  __device__ __forceinline__ int staged_vectors(int room) const {
    return room < parts.vectors ? room - room % size : parts.vectors;
  }

  __device__ __forceinline__ Softmax<C> sweep_1(C maximum) const {
    Softmax<C> softmax{maximum, 0, 0};
    const auto add = [&](const auto& piece) { softmax.add(piece.of[0].unpacked(), piece.of[1].unpacked()); };
    walk<kBatch1>(
        rank, parts.vectors, size, [&](int i) { return load_pieces<kLength, 2>(base, parts.vector_place(i)); },
        [&](int i, const auto& piece) {
          if (i < staged) {
            first_stage[i] = piece.of[0];
            second_stage[i] = piece.of[1];
          }
          add(piece);
        });
    walk<1>(
        rank, parts.singles(), size, [&](int i) { return load_pieces<1, 2>(base, parts.single_place(i)); },
        [&](int, const auto& piece) { add(piece); });
    return softmax;
  }

  // take(column, pieces of all operands)
  template <typename Take>
  __device__ __forceinline__ void sweep_2(Take take) const {
    const auto take_vector = [&](int i, const auto& piece) { take(parts.vector_place(i), piece); };
    walk<kBatch2>(
        rank, staged, size,
        [&](int i) {
          Pieces<T, kLength, arrays> piece;
          piece.of[0] = first_stage[i];
          piece.of[1] = second_stage[i];
          if constexpr (arrays == 3) piece.of[2] = load_packed<kLength>(base[2] + parts.vector_place(i));
          return piece;
        },
        take_vector);
    // Each thread goes on behind what it staged.
    walk<kBatch2>(
        rank + staged, parts.vectors, size,
        [&](int i) { return load_pieces<kLength, arrays>(base, parts.vector_place(i)); }, take_vector);
    walk<1>(
        rank, parts.singles(), size, [&](int i) { return load_pieces<1, arrays>(base, parts.single_place(i)); },
        [&](int i, const auto& piece) { take(parts.single_place(i), piece); });
  }
};

// Stores a part of a row's result.
template <typename Team, typename T, int N>
__device__ __forceinline__ void store_result(T* place, const Vector<Compute<T>, N>& x) {
  if constexpr (Team::kInShared) {
    *reinterpret_cast<Packed<T, N>*>(place) = pack<T>(x);
  } else {
    store_packed(place, x);
  }
}

template <typename Team, typename T>
__device__ __forceinline__ void fill_row(const Team& team, T* row, int classes, Compute<T> value) {
  const Split<T, int> parts = split(classes, row);
  Vector<Compute<T>, kVectorLength<T>> many;
#pragma unroll
  for (Compute<T>& one : many.v) one = value;
  for (int i = team.rank(); i < parts.vectors; i += team.size()) {
    store_result<Team>(row + parts.vector_place(i), many);
  }
  for (int i = team.rank(); i < parts.singles(); i += team.size()) row[parts.single_place(i)] = from<T>(value);
}

// ---------------------------------------------------------------------------------------------- tiles

// Copies `count` neighbors of each array to shared memory, with all threads of the block.
template <int arrays, typename T>
__device__ __forceinline__ void stage_tile(const T* const (&from)[arrays], T* const (&to)[arrays], int count) {
  constexpr int last = arrays - 1, length = kVectorLength<T>;
  const int rank = threadIdx.x, step = blockDim.x;
  const Split<T, int> parts = split(count, from[0], from[1], from[last], to[0], to[1], to[last]);
  walk<2>(
      rank, parts.vectors, step, [&](int i) { return load_pieces<length, arrays>(from, parts.vector_place(i)); },
      [&](int i, const auto& pieces) { keep_pieces(to, parts.vector_place(i), pieces); });
  walk<4>(
      rank, parts.singles(), step, [&](int i) { return load_pieces<1, arrays>(from, parts.single_place(i)); },
      [&](int i, const auto& pieces) { keep_pieces(to, parts.single_place(i), pieces); });
}

// Copies `count` neighbors from shared memory, likewise.
template <typename T>
__device__ __forceinline__ void store_tile(const T* from, T* to, int count) {
  const Split<T, int> parts = split(count, from, to);
  for (int i = threadIdx.x; i < parts.vectors; i += blockDim.x) {
    const int place = parts.vector_place(i);
    store_memory(to + place, load_packed<kVectorLength<T>>(from + place));
  }
  for (int i = threadIdx.x; i < parts.singles(); i += blockDim.x)
    to[parts.single_place(i)] = from[parts.single_place(i)];
}

}  // namespace curveball::cuda
