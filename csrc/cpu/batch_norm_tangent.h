// Tangents of batch norm, a channel at a time, or, where channels are last in memory, a row of channels at a time.
//
// With x^ = (x - mean) rstd:  dy = weight rstd (dx - <dx> - x^ <x^ dx>) + dweight x^ + dbias, which for one channel is
// scale (dx - shift) + slope (x - mean) + offset. The means are taken over the channel, in double; they are absent if
// the statistics are given.
#pragma once

#include "rounds.h"
#include "tangent_kernels.h"

namespace curveball::cpu {
namespace {

// The factors of one channel.
template <typename T>
struct Channel {
  T mean, shift, scale, slope, offset;
};

// From the means of dx and of (x - mean) dx over the channel, which are zero where the statistics are given.
template <typename T>
Channel<T> make_channel(const BatchNormArguments& a, int64_t channel, double mean, double mean_product) {
  const auto of = [channel](const void* vector, double otherwise) {
    return vector ? static_cast<double>(static_cast<const T*>(vector)[channel]) : otherwise;
  };
  const double rstd = of(a.rstd, 0.0), scale = of(a.weight, 1.0) * rstd;
  const double slope = rstd * (of(a.dweight, 0.0) - scale * rstd * mean_product);
  return {static_cast<const T*>(a.mean)[channel], static_cast<T>(mean), static_cast<T>(scale), static_cast<T>(slope),
          static_cast<T>(of(a.dbias, 0.0))};
}

// kRound elements, or `count` and zeros, of which it adds up dx and (x - mean) dx.
template <typename T>
CURVEBALL_LANES void add_round(const T* dx, const T* x, const T* mean, Sum& sum, Sum& product_sum) {
  for (int64_t group = 0; group < kGroups; group++) {
    const auto tangent = load(dx + group * kLanes);
    sum.groups[group] += widen(tangent);
    product_sum.groups[group] =
        add_product(product_sum.groups[group], load(x + group * kLanes) - load(mean + group * kLanes), tangent);
  }
}

template <typename T>
void batch_norm_planes(const BatchNormArguments& a, int64_t begin, int64_t end) {
  const double count = static_cast<double>(a.batch * a.plane);
  for (int64_t channel = begin; channel < end; channel++) {
    Sum sum, product_sum;
    T means[kRound];
    for (T& mean : means) mean = static_cast<const T*>(a.mean)[channel];
    for (int64_t n = 0; a.training && n < a.batch; n++) {
      const int64_t first = (n * a.channels + channel) * a.plane;
      const T *dx = static_cast<const T*>(a.dx) + first, *x = static_cast<const T*>(a.x) + first;
      int64_t i = 0;
      for (; i + kRound <= a.plane; i += kRound) add_round(dx + i, x + i, means, sum, product_sum);
      const int64_t rest = a.plane - i;
      if (rest) add_round(Padded<T>(dx + i, rest).data, Padded<T>(x + i, rest).data, means, sum, product_sum);
    }
    const Channel<T> c = make_channel<T>(a, channel, sum.total() / count, product_sum.total() / count);
    const Round<T> mean = round_of(c.mean), shift = round_of(c.shift), scale = round_of(c.scale),
                   slope = round_of(c.slope), offset = round_of(c.offset);
    for (int64_t n = 0; n < a.batch; n++) {
      const int64_t first = (n * a.channels + channel) * a.plane;
      const T *dx = static_cast<const T*>(a.dx) + first, *x = static_cast<const T*>(a.x) + first;
      T* dy = static_cast<T*>(a.dy) + first;
      for_each_round(0, a.plane, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Round<T> centered = load_round(x + i, count) - mean, tangent = load_round(dx + i, count) - shift;
        store_round(dy + i, scale * tangent + (slope * centered + offset), count);
      });
    }
  }
}

// Rows are taken a few at a time: so a sum is loaded once for them all, and memory is read nearly in order.
constexpr int64_t kSummedRows = 8, kWrittenRows = 64;

template <typename T>
void batch_norm_sums(const BatchNormArguments& a, int64_t begin, int64_t end, double* sums) {
  const T *dx = static_cast<const T*>(a.dx), *x = static_cast<const T*>(a.x), *mean = static_cast<const T*>(a.mean);
  for (int64_t rows = begin; rows < end; rows += kSummedRows) {
    const int64_t rows_end = rows + kSummedRows < end ? rows + kSummedRows : end;
    for (int64_t channel = 0; channel < a.channels; channel += kRound) {
      const int64_t count = a.channels - channel < kRound ? a.channels - channel : kRound;
      const Padded<T> means(mean + channel, count);
      Sum sum, product_sum;
      memcpy(sum.groups, sums + channel, count * sizeof(double));
      memcpy(product_sum.groups, sums + a.channels + channel, count * sizeof(double));
      for (int64_t row = rows; row < rows_end; row++) {
        const T *dx_row = dx + row * a.channels + channel, *x_row = x + row * a.channels + channel;
        if (count == kRound) {
          add_round(dx_row, x_row, means.data, sum, product_sum);
        } else {
          add_round(Padded<T>(dx_row, count).data, Padded<T>(x_row, count).data, means.data, sum, product_sum);
        }
      }
      memcpy(sums + channel, sum.groups, count * sizeof(double));
      memcpy(sums + a.channels + channel, product_sum.groups, count * sizeof(double));
    }
  }
}

template <typename T>
void batch_norm_rows(const BatchNormArguments& a, int64_t begin, int64_t end, const double* means) {
  for (int64_t rows = begin; rows < end; rows += kWrittenRows) {
    const int64_t rows_end = rows + kWrittenRows < end ? rows + kWrittenRows : end;
    for_each_round(0, a.channels, [&](int64_t channel, auto count) __attribute__((always_inline)) {
      T factors[5][kRound] = {};
      for (int64_t i = 0; i < kRound && channel + i < a.channels; i++) {
        const Channel<T> c = make_channel<T>(a, channel + i, means[channel + i], means[a.channels + channel + i]);
        const T values[] = {c.mean, c.shift, c.scale, c.slope, c.offset};
        for (int f = 0; f < 5; f++) factors[f][i] = values[f];
      }
      const Round<T> mean = load_round(factors[0], Whole{}), shift = load_round(factors[1], Whole{}),
                     scale = load_round(factors[2], Whole{}), slope = load_round(factors[3], Whole{}),
                     offset = load_round(factors[4], Whole{});
      for (int64_t row = rows; row < rows_end; row++) {
        const int64_t first = row * a.channels + channel;
        const Round<T> centered = load_round(static_cast<const T*>(a.x) + first, count) - mean;
        const Round<T> tangent = load_round(static_cast<const T*>(a.dx) + first, count) - shift;
        store_round(static_cast<T*>(a.dy) + first, scale * tangent + (slope * centered + offset), count);
      }
    });
  }
}

}  // namespace
}  // namespace curveball::cpu
