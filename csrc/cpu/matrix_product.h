// Products of small matrices, for the rotations into the eigenbases of a metric and for its Kronecker factors.
//
// A BLAS is as fast on large matrices; but a net has dozens of small ones, of which each call there costs as much as
// the product, and it can do nothing with a matrix while that is in the cache. Its headers are not part of torch's
// stable ABI, either.
#pragma once

#include "registers.h"
#include "subnormals.h"
#include "sums.h"

namespace curveball::cpu {
namespace {

// Rows and registers of a row that are summed at once: all sums, and what they are made of, fit in the registers.
#if defined(CURVEBALL_AVX512)
constexpr int kProductRows = 12;
#else
constexpr int kProductRows = 6;
#endif
constexpr int64_t kProductRegisters = 2;
template <typename T>
constexpr int64_t kProductColumns = kProductRegisters * kWidth<T>;
// How much of the inner dimension is packed at once: it stays in the first cache.
constexpr int64_t kPackedDepth = 256;

// A matrix by its strides, in elements: the one of its transpose has them exchanged.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;

  Strided transposed() const { return {data, column, row}; }
  Strided from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// packed[k][j] = b[k][j] for j < columns, and zero from there to kProductColumns.
template <typename T>
CURVEBALL_LANES void pack_columns(const Strided<T>& b, int64_t depth, int64_t columns, T* packed) {
  constexpr int64_t kColumns = kProductColumns<T>;
  if (columns < kColumns) memset(packed, 0, depth * kColumns * sizeof(T));
  if (b.column == 1 && columns == kColumns) {
    for (int64_t k = 0; k < depth; k++) memcpy(packed + k * kColumns, b.data + k * b.row, kColumns * sizeof(T));
  } else {
    // Along what is contiguous in b if its rows are not.
    for (int64_t j = 0; j < columns; j++) {
      const T* const from = b.data + j * b.column;
      for (int64_t k = 0; k < depth; k++) packed[k * kColumns + j] = from[k * b.row];
    }
  }
}

// How a product is written: c <- keep c + scale a b.
template <typename T>
struct Blend {
  T keep, scale;
};

template <typename T>
CURVEBALL_LANES void blend_row(const Register<T>* sums, const Blend<T>& blend, T* c) {
#pragma GCC unroll 2
  for (int64_t r = 0; r < kProductRegisters; r++, c += kWidth<T>) {
    const Register<T> scaled = blend.scale * sums[r];
    write(c, blend.keep == 0 ? scaled : blend.keep * read<Register<T>>(c) + scaled);
  }
}

// kRows rows of `columns` <= kProductColumns columns of c.
template <typename T, int kRows>
void sum_rows(const Strided<T>& a, const T* packed, int64_t depth, int64_t columns, T* c, int64_t c_row,
              const Blend<T>& blend) {
  Register<T> sums[kRows][kProductRegisters] = {};
  const T* rows[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++) rows[i] = a.data + i * a.row;
  for (int64_t k = 0; k < depth; k++) {
    Register<T> b[kProductRegisters];
#pragma GCC unroll 2
    for (int64_t r = 0; r < kProductRegisters; r++) b[r] = read<Register<T>>(packed + r * kWidth<T>);
    packed += kProductColumns<T>;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i++) {
      const Register<T> a_i = splat(*rows[i]);
      rows[i] += a.column;
#pragma GCC unroll 2
      for (int64_t r = 0; r < kProductRegisters; r++) sums[i][r] = multiply_add<T>(a_i, b[r], sums[i][r]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++) {
    T* const to = c + i * c_row;
    if (columns == kProductColumns<T>) {
      blend_row(sums[i], blend, to);
    } else {
      T room[kProductColumns<T> > kRound ? kProductColumns<T> : kRound] = {};
      if (blend.keep != 0) copy_some(room, to, columns);
      blend_row(sums[i], blend, room);
      copy_some(to, room, columns);
    }
  }
}

template <typename T, int kRows = kProductRows>
void sum_rows_of(int64_t rows, const Strided<T>& a, const T* packed, int64_t depth, int64_t columns, T* c,
                 int64_t c_row, const Blend<T>& blend) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return sum_rows_of<T, kRows - 1>(rows, a, packed, depth, columns, c, c_row, blend);
  }
  sum_rows<T, kRows>(a, packed, depth, columns, c, c_row, blend);
}

// c <- keep c + scale a b, c being m x n with rows that are contiguous and `c_row` apart, and the inner dimension
// `depth`. kUpper: what is left of the diagonal is computed only here and there.
//
// The gradient of a net that has learned its data is so small that its products with a basis or with itself are often
// subnormal: all products took four times as long then.
template <bool kUpper = false, typename T>
void multiply(const Strided<T>& a, const Strided<T>& b, int64_t m, int64_t n, int64_t depth, T* c, int64_t c_row,
              Blend<T> blend = {0, 1}) {
  const SubnormalsAreZero subnormals_are_zero;
  T packed[kPackedDepth * kProductColumns<T>];
  const int64_t strips = (m + kProductRows - 1) / kProductRows;  // of almost equal height
  for (int64_t k = 0; k < depth; k += kPackedDepth) {
    const int64_t some = depth - k < kPackedDepth ? depth - k : kPackedDepth;
    for (int64_t j = 0; j < n; j += kProductColumns<T>) {
      const int64_t columns = n - j < kProductColumns<T> ? n - j : kProductColumns<T>;
      pack_columns(b.from(k, j), some, columns, packed);
      for (int64_t s = 0; s < strips; s++) {
        const int64_t begin = s * m / strips, end = (s + 1) * m / strips;
        if (kUpper && begin >= j + columns) break;
        sum_rows_of<T>(end - begin, a.from(begin, k), packed, some, columns, c + begin * c_row + j, c_row, blend);
      }
    }
    blend.keep = 1;
  }
}

// c <- keep c + scale a a', c being m x m and symmetric.
template <typename T>
void add_gram(const Strided<T>& a, int64_t m, int64_t depth, T* c, int64_t c_row, const Blend<T>& blend) {
  multiply<true>(a, a.transposed(), m, m, depth, c, c_row, blend);
  for (int64_t i = 1; i < m; i++) {
    for (int64_t j = 0; j < i; j++) c[i * c_row + j] = c[j * c_row + i];
  }
}

}  // namespace
}  // namespace curveball::cpu
