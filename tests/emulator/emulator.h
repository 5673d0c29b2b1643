// A CUDA device made of fibers: every thread of a block has its own stack, and a scheduler lets them run in turn, from
// one point of synchronization to the next, in an order that a seed decides.
//
// It shows wrong indices, missing barriers and divergence. It can't show races within the memory model, nor speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Where in the kernel's text a thread waits.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || !strcmp(file, other.file));
  }
};

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

// What a test may set.
struct Settings {
  unsigned seed = 0;              // decides the order of blocks, warps and lanes
  int poison = 0xff;              // shared memory is filled with this byte before each block (0xff: NaN)
  int threads = 0;                // replaces the block size of launches with more than one warp; 0: as launched
  int64_t block_limit = 0;        // larger grids run only their last blocks, this many; 0: all
  int max_shared_bytes = 232448;  // a block's limit of dynamic shared memory, as of an H100
};
inline Settings settings;
inline std::vector<Launch> launches;

// Runs `kernel` once for each thread of the grid. Throws std::runtime_error if the kernel does what a GPU would not
// forgive.
void run(int64_t blocks, int threads, size_t shared_bytes, const void* function, const std::function<void()>& kernel);

void allow_shared(const void* function, int bytes);

// ------------------------------------------------------------------------- called by kernels, on a thread's fiber

// What the running thread sees as threadIdx and so on.
struct Running {
  Index thread, block, block_size, grid_size;
  void* dynamic_shared;
};
inline Running running;

void block_barrier(Site site);
// Waits for the lanes in `mask`, all at the same site, then returns the bits that lane `source` brought along.
uint64_t exchange(unsigned mask, uint64_t bits, int source, Site site);

}  // namespace emulator
