// The loops of the Kronecker metric: a piece of a matrix there and back through its eigenbases while it is in the
// cache, and its Kronecker factors.
#pragma once

#include "kernels.h"
#include "matrix_product.h"
#include "preconditioner_loops.h"

namespace curveball::cpu {
namespace {

template <typename T>
Strided<T> strided(const ConstMatrix& m) {
  return {static_cast<const T*>(m.data), m.row, 1};
}

template <typename T>
CURVEBALL_LANES void copy_rows(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) memcpy(to + i * to_row, from + i * from_row, columns * sizeof(T));
}

// to <- Q'm S, with contiguous rows.
template <typename T>
void to_bases(const Tile& t, const ConstMatrix& m, T* room, T* to) {
  Strided<T> now = strided<T>(m);
  if (t.left.data) {
    T* const product = t.right.data ? room : to;
    multiply(strided<T>(t.left).transposed(), now, t.rows, t.columns, t.rows, product, t.columns);
    now = {product, t.columns, 1};
  }
  if (t.right.data) multiply(now, strided<T>(t.right), t.rows, t.columns, t.columns, to, t.columns);
}

// u <- Q m S', m with contiguous rows.
template <typename T>
void from_bases(const Tile& t, const T* m, T* room) {
  Strided<T> now{m, t.columns, 1};
  T* const u = static_cast<T*>(t.u.data);
  if (t.left.data) {
    T* const product = t.right.data ? room : u;
    const int64_t row = t.right.data ? t.columns : t.u.row;
    multiply(strided<T>(t.left), now, t.rows, t.columns, t.rows, product, row);
    now = {product, row, 1};
  }
  if (t.right.data) multiply(now, strided<T>(t.right).transposed(), t.rows, t.columns, t.columns, u, t.u.row);
}

template <typename T>
void tile_block(const Tile& t, const DiagonalArguments& a, void* scratch, double* result) {
  const int64_t n = t.rows * t.columns;
  T *const turned = static_cast<T*>(scratch), *const v = turned + n, *const z = v + n, *const room = z + n;
  to_bases(t, t.r, room, turned);
  copy_rows(turned, t.columns, static_cast<T*>(t.turned.data), t.turned.row, t.rows, t.columns);
  copy_rows(static_cast<const T*>(t.v.data), t.v.row, v, t.columns, t.rows, t.columns);
  if (t.z.data) to_bases(t, t.z, room, z);
  precondition_block<T, T>(turned, v, turned, t.z.data ? z : nullptr, n, a, result);
  from_bases(t, turned, room);
}

template <typename T>
void average_block(void* v_, const void* r_, int64_t n, double decay) {
  T* v = static_cast<T*>(v_);
  const T* r = static_cast<const T*>(r_);
  const auto factors = diagonal_factors<T>(decay, 1, 0);
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) {
    write(v + i, next_v(read<Register<T>>(v + i), read<Register<T>>(r + i), factors));
  }
  for (; i < n; i++) v[i] = next_v(v[i], r[i], factors);
}

template <typename T>
void gram_block(const Gram& g) {
  const Strided<T> m = strided<T>(g.m);
  add_gram(g.of_columns ? m.transposed() : m, g.rows, g.columns, static_cast<T*>(g.factor.data), g.factor.row,
           Blend<T>{static_cast<T>(g.keep), static_cast<T>(1 - g.keep)});
}

}  // namespace
}  // namespace curveball::cpu
