// What the loss kernels share: how threads walk over several equally long arrays, and how the sums of blocks end up in
// the results.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

namespace curveball::cuda {

// ---------------------------------------------------------------------------------------------- walking

// A range of elements as vectors of 16 bytes in the middle and single elements before and after.
template <typename T, typename Index>
struct Split {
  static constexpr int kLength = kVectorLength<T>;
  Index count, head, vectors;

  __device__ Index singles() const { return count - vectors * kLength; }
  // The element at which the i-th vector, or the i-th single, stands.
  __device__ Index vector_place(Index i) const { return head + i * kLength; }
  __device__ Index single_place(Index i) const { return i < head ? i : i + vectors * kLength; }
};

// Arrays that are not all misaligned alike have no vectors, only singles.
template <typename T, typename Index, typename... Pointers>
__device__ __forceinline__ Split<T, Index> split(Index count, const T* first, Pointers... others) {
  const auto offset = [](const void* p) { return static_cast<unsigned>(reinterpret_cast<unsigned long long>(p) % 16); };
  if (!((offset(others) == offset(first)) && ...)) return {count, count, 0};
  const Index before = (16 - offset(first)) % 16 / sizeof(T), head = before < count ? before : count;
  return {count, head, (count - head) / kVectorLength<T>};
}

// take(i, load(i)) for i = begin, begin + step, ... < end, with up to `batch` loads under way before the first is used.
template <int batch, typename Index, typename Load, typename Take>
__device__ __forceinline__ void walk(Index begin, Index end, Index step, Load load, Take take) {
  for (Index i = begin; i < end; i += batch * step) {
    decltype(load(i)) loaded[batch];
#pragma unroll
    for (int k = 0; k < batch; k++) {
      if (i + k * step < end) loaded[k] = load(i + k * step);
    }
#pragma unroll
    for (int k = 0; k < batch; k++) {
      if (i + k * step < end) take(i + k * step, loaded[k]);
    }
  }
}

// N neighbors as they lie in memory. 16-bit numbers stay two to a word until they are used: else the compiler would
// keep each in a register of its own, and store them one by one.
template <typename T, int N, bool in_pairs = sizeof(T) == 2 && N % 2 == 0>
struct Packed {
  Vector<T, N> memory;

  __device__ __forceinline__ Vector<Compute<T>, N> unpacked() const { return to<Compute<T>>(memory); }
};

template <typename T, int N>
struct Packed<T, N, true> {
  Vector<unsigned, N / 2> memory;

  __device__ __forceinline__ Vector<float, N> unpacked() const {
    Vector<float, N> x;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const unsigned low = memory.v[i] & 0xffffu, high = memory.v[i] >> 16;
      x.v[2 * i] = to<float>(T{static_cast<unsigned short>(low)});
      x.v[2 * i + 1] = to<float>(T{static_cast<unsigned short>(high)});
    }
    return x;
  }
};

template <typename T, int N>
__device__ __forceinline__ Packed<T, N> pack(const Vector<Compute<T>, N>& x) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    constexpr bool is_half = dtype_of_type<T> == kFloat16;
    Packed<T, N> packed;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      packed.memory.v[i / 2] =
          is_half ? halves_from_floats(x.v[i], x.v[i + 1]) : bfloats_from_floats(x.v[i], x.v[i + 1]);
    }
    return packed;
  } else {
    return {from<T>(x)};
  }
}

template <int N, typename T>
__device__ __forceinline__ Packed<T, N> load_packed(const T* place) {
  return *reinterpret_cast<const Packed<T, N>*>(place);
}

// To global memory. Nothing of what a kernel stores like this does it read again.
template <typename T, int N>
__device__ __forceinline__ void store_memory(T* place, const Packed<T, N>& packed) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(packed) == 16) {
    // Within nested loops nvcc 13.0 splits the plain assignment into four stores.
    const uint4 words = *reinterpret_cast<const uint4*>(&packed);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(place)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Packed<T, N>*>(place) = packed;
}

template <typename T, int N>
__device__ __forceinline__ void store_packed(T* place, const Vector<Compute<T>, N>& x) {
  store_memory(place, pack<T>(x));
}

// N neighbors from each of several arrays.
template <typename T, int N, int arrays>
struct Pieces {
  Packed<T, N> of[arrays];
};

template <int N, int arrays, typename T, typename Index>
__device__ __forceinline__ Pieces<T, N, arrays> load_pieces(const T* const* base, Index place) {
  Pieces<T, N, arrays> pieces;
#pragma unroll
  for (int k = 0; k < arrays; k++) pieces.of[k] = load_packed<N>(base[k] + place);
  return pieces;
}

// Keeps them in shared memory.
template <int N, int arrays, typename T>
__device__ __forceinline__ void keep_pieces(T* const* base, int place, const Pieces<T, N, arrays>& pieces) {
#pragma unroll
  for (int k = 0; k < arrays; k++) *reinterpret_cast<Packed<T, N>*>(base[k] + place) = pieces.of[k];
}

// ---------------------------------------------------------------------------------------------- results

// Every block leaves three sums in partials [blocks, 3].
__device__ __forceinline__ void store_partials(const double (&sums)[3], double* partials) {
  if (threadIdx.x > 0) return;
  for (int k = 0; k < 3; k++) partials[3 * static_cast<int64>(blockIdx.x) + k] = sums[k];
}

// One block adds them up. Partials of the loss, g.v' and v'.Hv'.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    finish_loss_cotangent_kernel(const double* partials, int64 blocks, double* loss, double* products) {
  __shared__ double shared[kBlockSumSize<3>];
  double sums[3];
  sum_partials(partials, 0, blocks, sums, shared);
  if (threadIdx.x > 0) return;
  *loss = sums[0];
  products[0] = sums[1];
  products[1] = sums[2];
}

// Partials of g.u', v'.Hu' and u'.Hu', which follow the two products of before.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    finish_loss_products_kernel(const double* partials, int64 blocks, const double* products, double* five) {
  __shared__ double shared[kBlockSumSize<3>];
  double sums[3];
  sum_partials(partials, 0, blocks, sums, shared);
  if (threadIdx.x > 0) return;
  five[0] = products[0];
  five[1] = products[1];
  for (int k = 0; k < 3; k++) five[2 + k] = sums[k];
}

}  // namespace curveball::cuda
