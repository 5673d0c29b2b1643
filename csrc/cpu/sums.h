// How the loops walk over memory and add up: rounds of a fixed number of elements. Sums run in kRound double
// accumulators, in an order that the text fixes, so all instruction sets give the same bits.
#pragma once

#include "lanes.h"

namespace curveball::cpu {
namespace {

// Elements a round: several registers, to hide the latency of the additions.
constexpr int64_t kRound = 16;
constexpr int64_t kGroups = kRound / kLanes;

// Asks for the memory of a coming round, 2 KiB ahead. The processor's own prefetchers stop at every 4 KiB page; this
// does not, which makes the loops up to a third faster on large tensors. An address past the end is harmless.
template <typename... Pointer>
CURVEBALL_LANES void prefetch(const Pointer*... p) {
  constexpr size_t kAhead = 2048, kCacheLine = 64;
  const auto prefetch_one = [](uintptr_t address, size_t size) __attribute__((always_inline)) {
    for (size_t i = 0; i < size; i += kCacheLine) __builtin_prefetch(reinterpret_cast<void*>(address + kAhead + i));
  };
  (prefetch_one(reinterpret_cast<uintptr_t>(p), kRound * sizeof(Pointer)), ...);
}

template <typename Vector>
CURVEBALL_LANES double total_of(Vector s) {
  if constexpr (kLanes == 8) return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// kRound partial sums, side by side; element i of a block goes to number i % kRound, however wide the registers are.
struct Sum {
  Doubles groups[kGroups] = {};

  // Halves onto halves: a fixed tree.
  double total() const {
    Doubles v[kGroups];
    memcpy(v, groups, sizeof(v));
    for (int64_t half = kGroups / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; i++) v[i] += v[i + half];
    }
    return total_of(v[0]);
  }
};

// Copies n <= kRound elements in pieces of fixed sizes: a call of memcpy would cost as much as a short row.
template <typename T>
CURVEBALL_LANES void copy_some(T* target, const T* source, int64_t n) {
#pragma GCC unroll 5
  for (int64_t size = kRound; size > 0; size /= 2) {
    if (n & size) {
      memcpy(target, source, size * sizeof(T));
      target += size;
      source += size;
    }
  }
}

// The last elements of a block, padded with zeros to a full round. Zeros add nothing to the sums.
template <typename T>
struct Padded {
  T data[kRound];
  Padded(const T* source, int64_t n) {
    memset(data, 0, sizeof(data));
    copy_some(data, source, n);
  }
};

}  // namespace
}  // namespace curveball::cpu
