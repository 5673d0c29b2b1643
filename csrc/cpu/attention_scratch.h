// The scratch memory of the tangent of attention, and what is packed into it.
#pragma once

#include "registers.h"
#include "tangent_kernels.h"

namespace curveball::cpu {
namespace {

// Queries of a tile: two sums for each, and what they are made of, must fit in the registers.
#if defined(CURVEBALL_AVX512)
constexpr int64_t kTile = 8;
#else
constexpr int64_t kTile = 4;
#endif
static_assert(kTile <= kMostTiled, "the scratch memory is for fewer queries");

// The parts of the scratch memory.
template <typename T>
struct AttentionScratch {
  T* keys;     // [kKeyBlock / kWidth, depth, 2, kWidth]: k and dk, a register of keys side by side
  T* values;   // [kKeyBlock, 2, padded width]: v and dv
  T* queries;  // [kTile, depth, 2]: q and dq
  T* scores;   // [kTile, 2, kKeyBlock]: S and dS, then P and P dS
  T *largest, *shift, *total, *weighted, *rows;

  AttentionScratch(T* memory, int64_t depth, int64_t padded) {
    const auto take = [&memory](int64_t count) {
      T* const part = memory;
      memory += count;
      return part;
    };
    values = take(2 * kKeyBlock * padded);
    rows = take(kQueryBlock * padded);
    scores = take(2 * kTile * kKeyBlock);
    keys = take(2 * kKeyBlock * depth);
    queries = take(2 * kTile * depth);
    largest = take(kQueryBlock);
    shift = take(kQueryBlock);
    total = take(kQueryBlock);
    weighted = take(kQueryBlock);
  }
};

template <typename T>
CURVEBALL_LANES const T* row_of(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}

// What a tile of queries and a block of keys need to know of where they are.
struct TilePlace {
  int64_t batch, head;
  int64_t query, first_query;  // first query of the tile, of its block
  int64_t key, keys;           // first key of the block; how many there are, up to the last that the tile sees
};

// to[i kWidth + j] = from[j][i]: the first `columns` elements of at most kWidth rows, zeros for those that are missing.
template <typename T>
void transpose(const AttentionTensor& t, const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t j = 0; j < kWidth<T>; j++) {
    for (int64_t i = 0; i < columns; i++) to[2 * i * kWidth<T> + j] = j < rows ? from[j * t.row + i] : 0;
  }
}

// Asks for the rows of one head, which lie apart in memory, so that the processor does not guess them.
template <typename T>
void prefetch_rows(const AttentionTensor& t, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t columns) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t row = begin; row < end; row++) {
    const T* const p = row_of<T>(t, batch, head, row);
    for (int64_t i = 0; i < columns; i += kCacheLine) __builtin_prefetch(p + i, 0, 2);
  }
}

// A register of keys side by side, values in rows, with zeros up to whole registers.
template <typename T>
void pack(const AttentionArguments& a, const AttentionScratch<T>& s, const TilePlace& at) {
  const int64_t padded = padded_width(a.width);
  const int64_t key_end = at.key + at.keys;
  prefetch_rows<T>(a.k, at.batch, at.head, at.key, key_end, a.depth);
  prefetch_rows<T>(a.dk, at.batch, at.head, at.key, key_end, a.depth);
  prefetch_rows<T>(a.v, at.batch, at.head, at.key, key_end, a.width);
  prefetch_rows<T>(a.dv, at.batch, at.head, at.key, key_end, a.width);
  for (int64_t j = 0; j < at.keys; j += kWidth<T>) {
    T* const keys = s.keys + 2 * j * a.depth;
    transpose(a.k, row_of<T>(a.k, at.batch, at.head, at.key + j), at.keys - j, a.depth, keys);
    transpose(a.dk, row_of<T>(a.dk, at.batch, at.head, at.key + j), at.keys - j, a.depth, keys + kWidth<T>);
  }
  for (int64_t j = 0; j < at.keys; j++) {
    T* const v = s.values + 2 * j * padded;
    memset(v, 0, 2 * padded * sizeof(T));
    memcpy(v, row_of<T>(a.v, at.batch, at.head, at.key + j), a.width * sizeof(T));
    memcpy(v + padded, row_of<T>(a.dv, at.batch, at.head, at.key + j), a.width * sizeof(T));
  }
}

}  // namespace
}  // namespace curveball::cpu
