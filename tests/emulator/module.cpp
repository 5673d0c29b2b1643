// The module _emulator. Importing it registers the emulated kernels as torch.ops.curveball_emulated.*, on CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/schemas.h"
#include "emulator.h"

STABLE_TORCH_LIBRARY(curveball_emulated, library) { curveball::define_operators(library); }

std::vector<double> selftest(const std::string& name);

PYBIND11_MODULE(_emulator, m) {
  using emulator::settings;
  m.doc() = "CUDA kernels on the CPU: torch.ops.curveball_emulated.*, and what a test may set.";
  m.def("reset", [] { settings = emulator::Settings(); }, "All settings as they were at first.");
  m.def("set_seed", [](unsigned seed) { settings.seed = seed; }, "The order of blocks, warps and lanes.");
  m.def("set_poison", [](int byte) { settings.poison = byte; }, "What shared memory holds at a block's start.");
  m.def("set_threads", [](int threads) { settings.threads = threads; }, "Block size; 0: what the operator asks for.");
  m.def("set_block_limit", [](int64_t blocks) { settings.block_limit = blocks; }, "Run only a grid's last blocks.");
  m.def("set_max_shared_bytes", [](int bytes) { settings.max_shared_bytes = bytes; }, "What the device has.");
  m.def("selftest", &selftest, "Runs a kernel with a mistake.");
  m.def(
      "launches",
      [] {
        std::vector<std::tuple<int64_t, int, size_t>> list;
        for (const auto& launch : emulator::launches)
          list.emplace_back(launch.blocks, launch.threads, launch.shared_bytes);
        emulator::launches.clear();
        return list;
      },
      "(blocks, threads, shared bytes) of every launch since the last call.");
}
