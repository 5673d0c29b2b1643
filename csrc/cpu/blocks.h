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

  // Calls work(block, index of the block) for every block. Threads share by elements, not by blocks, so that a
  // list of one large and many tiny tensors is shared fairly too: a thread takes the blocks that begin in its part.
  template <typename Work>
  void run(const Work& work) const {
    torch::stable::parallel_for(0, total_, kBlockSize, [&](int64_t from, int64_t to) {
      auto block = std::lower_bound(list_.begin(), list_.end(), from,
                                    [](const Block& b, int64_t place) { return b.place < place; });
      for (; block != list_.end() && block->place < to; ++block) work(*block, block - list_.begin());
    });
  }

 private:
  std::vector<Block> list_;
  int64_t total_ = 0;
};

}  // namespace curveball::cpu
