// Walking lists of tensors in few launches: a launch takes a table of tensors as its argument, cut into chunks of equal
// length, one for each block.
#pragma once

#include "types.cuh"

// To be tuned on a GPU. The tests make chunks small, so that small tensors are walked like large ones.
#if !defined(CURVEBALL_CHUNK)
#define CURVEBALL_CHUNK 32768
#endif

namespace curveball::cuda {

constexpr int kChunk = CURVEBALL_CHUNK;  // elements a block; a multiple of every vector's length
constexpr int kListThreads = 512;

// A kernel's arguments may take 4 KB, or 32764 bytes from CUDA 12.1 on; copying them costs a launch some time, so short
// lists use the short table. 512 tensors are more than a ResNet-152 has.
constexpr int kShortList = 64, kLongList = 512;

// `Operands` lists side by side, of up to `Capacity` tensors each.
template <int Operands, int Capacity>
struct TensorList {
  int tensors;
  int first_block[Capacity];    // the tensor's chunks are the blocks from here to the next tensor's
  int first_partial[Capacity];  // where the first chunk's sum goes
  int64 numel[Capacity];
  void* data[Operands][Capacity];
};

// Whether both lengths of a kind of list leave room for the other arguments.
template <template <int> class List>
constexpr bool kFits = sizeof(List<kShortList>) < 4096 - 64 && sizeof(List<kLongList>) < 32764 - 64;

struct Chunk {
  int tensor;
  int64 begin;  // the first element
  int count;
  int partial;
};

template <int Operands, int Capacity>
__device__ __forceinline__ Chunk find_chunk(const TensorList<Operands, Capacity>& list, int block) {
  // The last tensor whose first block is not after this one.
  int low = 0, high = list.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int index = block - list.first_block[low];
  const int64 begin = static_cast<int64>(index) * kChunk, rest = list.numel[low] - begin;
  return {low, begin, rest < kChunk ? static_cast<int>(rest) : kChunk, list.first_partial[low] + index};
}

// ---------------------------------------------------------------------------------------------- within a chunk

// How many elements come before all arrays are at multiples of 16 bytes; `count` if that never happens at once.
template <int N, typename... T>
__device__ __forceinline__ int unaligned_head(int count, const T*... arrays) {
#pragma unroll 1
  for (int head = 0; head < N && head < count; head++) {
    if ((((reinterpret_cast<unsigned long long>(arrays) + head * sizeof(T)) % 16 == 0) && ...)) return head;
  }
  return count;
}

// take(load(i)) for every i in [0, count), shared by the threads of the block. Unroll loads are under way before the
// first of them is used: that keeps the memory busy.
template <int Unroll, typename Load, typename Take>
__device__ __forceinline__ void for_each(int count, Load load, Take take) {
  const int threads = block_threads<kListThreads>();
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (Unroll - 1) * threads < count; i += Unroll * threads) {
    decltype(load(0)) loaded[Unroll];
#pragma unroll
    for (int u = 0; u < Unroll; u++) loaded[u] = load(i + u * threads);
#pragma unroll
    for (int u = 0; u < Unroll; u++) take(i + u * threads, loaded[u]);
  }
#pragma unroll 1
  for (; i < count; i += threads) take(i, load(i));
}

template <int N>
struct Length {
  static constexpr int value = N;
};

// The same over elements: in vectors of N between the ends that are not aligned. `load` and `take` get Length<N> or,
// at the ends, Length<1>, and the first element's index.
template <int N, int Unroll, typename Load, typename Take>
__device__ __forceinline__ void for_each_element(int count, int head, Load load, Take take) {
  const int vectors = (count - head) / N;
  for_each<Unroll>(
      vectors, [&](int i) { return load(Length<N>(), head + i * N); },
      [&](int i, const auto& loaded) { take(Length<N>(), head + i * N, loaded); });
  const auto element = [&](int i) { return i < head ? i : i + vectors * N; };
  for_each<Unroll>(
      count - vectors * N, [&](int i) { return load(Length<1>(), element(i)); },
      [&](int i, const auto& loaded) { take(Length<1>(), element(i), loaded); });
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& x) {
  *reinterpret_cast<Vector<T, N>*>(p) = x;
}

}  // namespace curveball::cuda
