// Walks lists of tensors in blocks of a fixed size, on all threads, in one parallel region.
//
// The blocks depend on the sizes of the tensors only, each block leaves its own partial sum, and those are added in
// block order: the result has the same bits for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensor_checks.h"

namespace curveball::cpu {

// Small enough for the caches and for an even share of work, large enough to make the bookkeeping invisible.
constexpr int64_t kBlockSize = 32768;

struct Block {
  int64_t tensor;  // which tensor of the list
  int64_t begin;   // its first element in that tensor
  int64_t count;   // how many elements
  int64_t place;   // its first element if all tensors stood in a row
};

inline char* at(void* data, int64_t element, DType dtype) { return static_cast<char*>(data) + element * bytes(dtype); }

inline const char* at(const void* data, int64_t element, DType dtype) {
  return static_cast<const char*>(data) + element * bytes(dtype);
}

// Calls work(item, its index) for every item of a list, on all threads. Each has a `place`, where its work begins if
// all stood in a row, up to `total`. Threads share by that, not by items, so that one large and many tiny ones are
// shared fairly too: a thread takes the items that begin in its part, of `grain` at least.
template <typename Item, typename Work>
void share_out(const std::vector<Item>& list, int64_t total, int64_t grain, const Work& work) {
  torch::stable::parallel_for(0, total, grain, [&](int64_t from, int64_t to) {
    auto item =
        std::lower_bound(list.begin(), list.end(), from, [](const Item& i, int64_t place) { return i.place < place; });
    for (; item != list.end() && item->place < to; ++item) work(*item, item - list.begin());
  });
}

// The three sums of which each part of the work has left its own, side by side: added in the order of the parts.
inline Tensor three_sums(const Tensor& like, const std::vector<double>& partial) {
  Tensor result = new_doubles(like, {3});
  double* sums = result.mutable_data_ptr<double>();
  sums[0] = sums[1] = sums[2] = 0.0;
  for (size_t i = 0; i < partial.size(); i++) sums[i % 3] += partial[i];
  return result;
}

class Blocks {
 public:
  void add(int64_t tensor, int64_t numel) {
    for (int64_t begin = 0; begin < numel; begin += kBlockSize) {
      const int64_t count = std::min(kBlockSize, numel - begin);
      list_.push_back({tensor, begin, count, total_});
      total_ += count;
    }
  }

  size_t size() const { return list_.size(); }

  const Block& operator[](size_t index) const { return list_[index]; }

  // Calls work(block, index of the block) for every block.
  template <typename Work>
  void run(const Work& work) const {
    share_out(list_, total_, kBlockSize, work);
  }

 private:
  std::vector<Block> list_;
  int64_t total_ = 0;
};

}  // namespace curveball::cpu
