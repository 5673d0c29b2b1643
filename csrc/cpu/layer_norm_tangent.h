// Tangents of layer norm and RMS norm, a row at a time.
//
// With x^ = (x - mean) rstd:  dy = weight rstd (dx - <dx> - x^ <x^ dx>) + dweight x^ + dbias. A row is read twice,
// first for the two means, then to write; in between, it lies in the cache.
#pragma once

#include "rounds.h"
#include "tangent_kernels.h"

namespace curveball::cpu {
namespace {

// So many elements are added up in the type of the row, and those sums in double.
constexpr int64_t kPartialSum = 1024;

template <typename T>
CURVEBALL_LANES void layer_norm_row(const T* dx, const T* x, T mean_, T rstd_, bool centered, const T* weight,
                                    const T* dweight, const T* dbias, T* dy, int64_t size) {
  const Round<T> mean = round_of(mean_), rstd = round_of(rstd_);
  double sum = 0.0, product_sum = 0.0;
  for (int64_t begin = 0; begin < size; begin += kPartialSum) {
    Round<T> partial = {}, product_partial = {};
    const int64_t end = begin + kPartialSum < size ? begin + kPartialSum : size;
    for_each_round(begin, end, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Round<T> tangent = load_round(dx + i, count);
      partial = partial + tangent;
      product_partial = product_partial + (load_round(x + i, count) - mean) * rstd * tangent;
    });
    sum += partial.total();
    product_sum += product_partial.total();
  }
  const Round<T> mean_tangent = round_of(centered ? static_cast<T>(sum / size) : T(0));
  const Round<T> mean_product = round_of(static_cast<T>(product_sum / size));
  for_each_round(0, size, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Round<T> normal = (load_round(x + i, count) - mean) * rstd;
    Round<T> result = rstd * (load_round(dx + i, count) - mean_tangent - normal * mean_product);
    if (weight) result = load_round(weight + i, count) * result;
    if (dweight) result = result + load_round(dweight + i, count) * normal;
    if (dbias) result = result + load_round(dbias + i, count);
    store_round(dy + i, result, count);
  });
}

template <typename T>
void layer_norm_rows(const LayerNormArguments& a, int64_t begin, int64_t end) {
  const T *mean = static_cast<const T*>(a.mean), *rstd = static_cast<const T*>(a.rstd);
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = row * a.size;
    layer_norm_row(static_cast<const T*>(a.dx) + first, static_cast<const T*>(a.x) + first, mean ? mean[row] : T(0),
                   rstd[row], mean != nullptr, static_cast<const T*>(a.weight), static_cast<const T*>(a.dweight),
                   static_cast<const T*>(a.dbias), static_cast<T*>(a.dy) + first, a.size);
  }
}

}  // namespace
}  // namespace curveball::cpu
