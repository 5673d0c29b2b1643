// torch's parallel_for on four threads of its own, linked into the library that ThreadSanitizer watches. That of torch
// goes through OpenMP, whose waiting the sanitizer does not see: it would take every parallel loop for a race.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  constexpr int64_t threads = 4;
  const int64_t grain = std::max<int64_t>({1, grain_size, (end - begin + threads - 1) / threads});
  std::vector<std::thread> workers;
  for (int64_t from = begin; from < end; from += grain)
    workers.emplace_back(func, from, std::min(from + grain, end), ctx);
  for (std::thread& worker : workers) worker.join();
  return 0;
}
