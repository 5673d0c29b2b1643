// The tangent of scaled dot-product attention, in one streaming pass over the keys: no matrix of scores in memory.
//
//   S = scale q k' + mask,  P = softmax(S),  dS = scale (dq k' + q dk'),
//   dout = sum_j P_j (dS_j v_j + dv_j) - (sum_j P_j dS_j) out.
//
// As in flash attention, each query keeps the largest score m so far, and relative to e^m the sums
//   total = sum_j e^(S_j),  weighted = sum_j e^(S_j) dS_j,  row = sum_j e^(S_j) (dS_j v_j + dv_j).
// A shift of all dS of a query changes nothing; that by their mean over the first block of keys keeps the last
// difference from cancelling. A block of keys is packed with keys side by side, so that a register holds one component
// of several keys; a tile of queries meets it in two matrix products with all sums in registers.
#pragma once

#include <cmath>

#include "attention_scratch.h"
#include "exponentials.h"

namespace curveball::cpu {
namespace {

template <typename T>
T sum_of(Register<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kWidth<T>; i++) sum += v[i];
  return sum;
}

// The keys, counted from the block's first, that a query sees.
CURVEBALL_LANES int64_t seen_keys(const AttentionArguments& a, const TilePlace& at, int64_t query) {
  const int64_t causal = query + 1 - at.key;
  return a.is_causal && causal < at.keys ? (causal < 0 ? 0 : causal) : at.keys;
}

// S and dS of kQueries queries, without the scale: a register of keys at a time.
template <typename T, int kQueries>
void score_tile(const AttentionScratch<T>& s, int64_t depth, int64_t keys) {
  for (int64_t j = 0; j < keys; j += kWidth<T>) {
    Register<T> score[kQueries] = {}, tangent[kQueries] = {};
    const T *k = s.keys + 2 * j * depth, *q = s.queries;
    for (int64_t d = 0; d < depth; d++, k += 2 * kWidth<T>, q += 2) {
      const Register<T> key = read<Register<T>>(k), dkey = read<Register<T>>(k + kWidth<T>);
#pragma GCC unroll 8
      for (int i = 0; i < kQueries; i++) {
        const Register<T> query = splat(q[2 * i * depth]), dquery = splat(q[2 * i * depth + 1]);
        score[i] = multiply_add<T>(query, key, score[i]);
        tangent[i] = multiply_add<T>(dquery, key, tangent[i]);
        tangent[i] = multiply_add<T>(query, dkey, tangent[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; i++) {
      write(s.scores + 2 * i * kKeyBlock + j, score[i]);
      write(s.scores + (2 * i + 1) * kKeyBlock + j, tangent[i]);
    }
  }
}

// Adds the mask to a register of scores, and sets those from `seen` on to -infinity.
template <typename T>
CURVEBALL_LANES Register<T> masked(Register<T> score, const T* mask, int64_t stride, int64_t seen) {
  if (mask && stride == 1 && seen >= kWidth<T>) return score + read<Register<T>>(mask);
  if (!mask && seen >= kWidth<T>) return score;
  for (int64_t i = 0; i < kWidth<T>; i++) {
    if (i >= seen) {
      score[i] = -INFINITY;
    } else if (mask) {
      score[i] += mask[i * stride];
    }
  }
  return score;
}

// S and dS of one query become P and P dS relative to e^m. Returns the factor of what was summed before.
template <typename T>
T softmax_tangent_row(const AttentionArguments& a, const AttentionScratch<T>& s, const TilePlace& at, int64_t index,
                      T* scores) {
  const int64_t seen = seen_keys(a, at, at.query + index), place = at.query - at.first_query + index;
  const T scale = static_cast<T>(a.scale);
  const T* const mask =
      a.mask.data ? row_of<T>(a.mask, at.batch, at.head, at.query + index) + at.key * a.mask.column : nullptr;
  Register<T> largest = splat<T>(-INFINITY);
  for (int64_t j = 0; j < at.keys; j += kWidth<T>) {
    const Register<T> score = masked<T>(scale * read<Register<T>>(scores + j),
                                        mask ? mask + j * a.mask.column : nullptr, a.mask.column, seen - j);
    largest = score > largest ? score : largest;
    write(scores + j, score);
  }
  const T before = s.largest[place];
  T now = before;
  for (int64_t i = 0; i < kWidth<T>; i++) now = largest[i] > now ? largest[i] : now;
  const Register<T> base = splat<T>(now == -INFINITY ? 0 : now);
  Register<T> total = {}, mean = {}, weighted = {};
  for (int64_t j = 0; j < at.keys; j += kWidth<T>) {
    const Register<T> p = exp_of(read<Register<T>>(scores + j) - base);
    total += p;
    mean += p * (scale * read<Register<T>>(scores + kKeyBlock + j));
    write(scores + j, p);
  }
  const T sum = sum_of<T>(total);
  if (s.total[place] == 0) s.shift[place] = sum > 0 ? sum_of<T>(mean) / sum : 0;
  for (int64_t j = 0; j < at.keys; j += kWidth<T>) {
    const Register<T> tangent = scale * read<Register<T>>(scores + kKeyBlock + j) - s.shift[place];
    const Register<T> p_tangent = read<Register<T>>(scores + j) * tangent;
    weighted += p_tangent;
    write(scores + kKeyBlock + j, p_tangent);
  }
  const T factor = before == now ? T(1) : exp_of(splat<T>(before - now))[0];
  s.largest[place] = now;
  s.total[place] = s.total[place] * factor + sum;
  s.weighted[place] = s.weighted[place] * factor + sum_of<T>(weighted);
  return factor;
}

// rows <- factor rows + (P dS) v + P dv, for kRegisters registers of the width.
template <typename T, int kQueries, int kRegisters>
CURVEBALL_LANES void add_values(const T* scores, const T* values, const T* factors, int64_t keys, int64_t padded,
                                T* rows) {
  Register<T> sums[kQueries][kRegisters];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; i++) {
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; r++) sums[i][r] = factors[i] * read<Register<T>>(rows + i * padded + r * kWidth<T>);
  }
  for (int64_t j = 0; j < keys; j++, values += 2 * padded) {
    Register<T> v[kRegisters], dv[kRegisters];
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; r++) {
      v[r] = read<Register<T>>(values + r * kWidth<T>);
      dv[r] = read<Register<T>>(values + padded + r * kWidth<T>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; i++) {
      const Register<T> p = splat(scores[2 * i * kKeyBlock + j]);
      const Register<T> p_tangent = splat(scores[(2 * i + 1) * kKeyBlock + j]);
#pragma GCC unroll 2
      for (int r = 0; r < kRegisters; r++) {
        sums[i][r] = multiply_add<T>(p_tangent, v[r], sums[i][r]);
        sums[i][r] = multiply_add<T>(p, dv[r], sums[i][r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; i++) {
#pragma GCC unroll 2
    for (int r = 0; r < kRegisters; r++) write(rows + i * padded + r * kWidth<T>, sums[i][r]);
  }
}

template <typename T, int kQueries>
void tile(const AttentionArguments& a, const AttentionScratch<T>& s, const TilePlace& at) {
  for (int i = 0; i < kQueries; i++) {
    const T *q = row_of<T>(a.q, at.batch, at.head, at.query + i),
            *dq = row_of<T>(a.dq, at.batch, at.head, at.query + i);
    T* const packed = s.queries + 2 * i * a.depth;
    for (int64_t d = 0; d < a.depth; d++) packed[2 * d] = q[d], packed[2 * d + 1] = dq[d];
  }
  score_tile<T, kQueries>(s, a.depth, at.keys);
  T factors[kQueries];
  for (int i = 0; i < kQueries; i++) factors[i] = softmax_tangent_row(a, s, at, i, s.scores + 2 * i * kKeyBlock);
  const int64_t padded = padded_width(a.width);
  T* const rows = s.rows + (at.query - at.first_query) * padded;
  int64_t e = 0;
  for (; e + 2 * kWidth<T> <= padded; e += 2 * kWidth<T>) {
    add_values<T, kQueries, 2>(s.scores, s.values + e, factors, at.keys, padded, rows + e);
  }
  if (e < padded) add_values<T, kQueries, 1>(s.scores, s.values + e, factors, at.keys, padded, rows + e);
}

template <typename T, int kQueries = kTile>
void tile_of(int64_t queries, const AttentionArguments& a, const AttentionScratch<T>& s, const TilePlace& at) {
  if constexpr (kQueries > 1) {
    if (queries < kQueries) return tile_of<T, kQueries - 1>(queries, a, s, at);
  }
  tile<T, kQueries>(a, s, at);
}

// dout = (row - weighted out) / total; zero for a query whose keys are all masked.
template <typename T>
void finish(const AttentionArguments& a, const AttentionScratch<T>& s, int64_t batch, int64_t head, int64_t begin,
            int64_t end) {
  for (int64_t query = begin; query < end; query++) {
    const T *row = s.rows + (query - begin) * padded_width(a.width), *out = row_of<T>(a.out, batch, head, query);
    const T total = s.total[query - begin], weighted = s.weighted[query - begin];
    T* const result = static_cast<T*>(a.result) + ((batch * a.queries + query) * a.heads + head) * a.width;
    for (int64_t e = 0; e < a.width; e++) result[e] = total == 0 ? 0 : (row[e] - weighted * out[e]) / total;
  }
}

template <typename T>
void attention_block(const AttentionArguments& a, int64_t batch, int64_t head, int64_t begin, int64_t end,
                     void* memory) {
  const AttentionScratch<T> s(static_cast<T*>(memory), a.depth, padded_width(a.width));
  for (int64_t i = 0; i < kQueryBlock; i++) s.largest[i] = -INFINITY, s.total[i] = 0, s.weighted[i] = 0;
  prefetch_rows<T>(a.q, batch, head, begin, end, a.depth);
  prefetch_rows<T>(a.dq, batch, head, begin, end, a.depth);
  prefetch_rows<T>(a.out, batch, head, begin, end, a.width);
  memset(s.rows, 0, kQueryBlock * padded_width(a.width) * sizeof(T));
  const int64_t last_key = a.is_causal && end < a.keys ? end : a.keys;
  const int64_t tiles = (end - begin + kTile - 1) / kTile;  // of almost equal size
  for (int64_t key = 0; key < last_key; key += kKeyBlock) {
    TilePlace at{batch, head, begin, begin, key, last_key - key < kKeyBlock ? last_key - key : kKeyBlock};
    pack(a, s, at);
    const int64_t keys = at.keys;
    for (int64_t t = 0; t < tiles; t++) {
      at.query = begin + t * (end - begin) / tiles;
      const int64_t next = begin + (t + 1) * (end - begin) / tiles;
      at.keys = keys;
      at.keys = seen_keys(a, at, next - 1);
      if (at.keys > 0) tile_of<T>(next - at.query, a, s, at);
    }
  }
  finish(a, s, batch, head, begin, end);
}

}  // namespace
}  // namespace curveball::cpu
