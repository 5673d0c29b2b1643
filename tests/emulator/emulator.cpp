#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>

#if !defined(__x86_64__)
#error "The emulator switches fibers in x86-64 assembly; there is no version for this processor."
#endif

// Saves the callee-saved registers on the running stack, its pointer in *save, and goes on where `stack` left off.
// (swapcontext would make a system call for each switch.)
extern "C" void curveball_switch_stack(void** save, void* stack);
asm(R"(
.text
.globl curveball_switch_stack
.hidden curveball_switch_stack
.type curveball_switch_stack, @function
curveball_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size curveball_switch_stack, .-curveball_switch_stack
)");

// All variables declared __shared__, see cuda_on_cpu.h; the linker knows the ends of the section, if there is one.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_curveball_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_curveball_shared[];

namespace emulator {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024, kPageBytes = 4096, kGuardBytes = 1024, kDefaultSharedLimit = 48 * 1024;
constexpr unsigned char kGuard = 0xa5;

enum State { kReady, kAtBarrier, kAtExchange, kDone };

struct Thread {
  void* stack;  // where to go on
  State state;
  Site site;      // of the waiting
  unsigned mask;  // of an exchange: who takes part,
  uint64_t bits;  // what this lane brings and then takes,
  int source;     // and from which lane
};

void fail(const std::string& message) { throw std::runtime_error("emulated kernel: " + message); }

std::string at(const Site& site) {
  std::ostringstream text;
  text << " at " << site.file << ":" << site.line;
  return text.str();
}

// One stack for each thread of a block, with a page below it that must not be touched. Kept from launch to launch.
unsigned char* stacks() {
  static unsigned char* const all = [] {
    const size_t bytes = kMaxThreads * (kStackBytes + kPageBytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks");
    unsigned char* base = static_cast<unsigned char*>(memory);
    for (int i = 0; i < kMaxThreads; i++) mprotect(base + i * (kStackBytes + kPageBytes), kPageBytes, PROT_NONE);
    return base;
  }();
  return all;
}

class Device {
 public:
  Device(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel)
      : kernel_(kernel), random_(settings.seed + 1), threads_(threads), shared_(shared_bytes + kGuardBytes + 16) {
    dynamic_shared_ = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_.data()) + 15) & ~15ull);
    shared_bytes_ = shared_bytes;
    running.block_size = {static_cast<unsigned>(threads), 1, 1};
    running.grid_size = {static_cast<unsigned>(blocks), 1, 1};
    running.dynamic_shared = dynamic_shared_;
  }

  void run() {
    const int64_t all = running.grid_size.x;
    const int64_t first = settings.block_limit ? std::max<int64_t>(0, all - settings.block_limit) : 0;
    std::vector<unsigned> order;
    for (int64_t block = first; block < all; block++) order.push_back(static_cast<unsigned>(block));
    std::shuffle(order.begin(), order.end(), random_);
    for (const unsigned block : order) run_block(block);
  }

  // The running thread stops here until the scheduler lets it go on.
  Thread& wait(State state, Site site) {
    Thread& me = threads_[current_];
    me.state = state;
    me.site = site;
    curveball_switch_stack(&me.stack, scheduler_);
    return me;
  }

  uint64_t exchange(unsigned mask, uint64_t bits, int source, Site site) {
    const int lane = current_ % kWarp;
    if (!(mask >> lane & 1)) fail("a lane calls a warp function without being in its mask" + at(site));
    if (!(mask >> source & 1)) fail("a lane asks for the value of one that is not in the mask" + at(site));
    Thread& me = threads_[current_];
    me.mask = mask;
    me.bits = bits;
    me.source = source;
    return wait(kAtExchange, site).bits;
  }

 private:
  static void enter();

  void run_block(unsigned block) {
    running.block.x = block;
    memset(__start_curveball_shared, settings.poison, __stop_curveball_shared - __start_curveball_shared);
    memset(dynamic_shared_, settings.poison, shared_bytes_);
    memset(dynamic_shared_ + shared_bytes_, kGuard, kGuardBytes);
    for (size_t i = 0; i < threads_.size(); i++) {
      // As if `enter` had been called from nowhere (a zero return address keeps the stack aligned as the ABI wants).
      void** top = reinterpret_cast<void**>(stacks() + (i + 1) * (kStackBytes + kPageBytes));
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&Device::enter);
      for (int saved = 0; saved < 6; saved++) *--top = nullptr;
      threads_[i] = {top, kReady, {}, 0, 0, 0};
    }
    while (run_to_barrier()) {
    }
    for (size_t i = 0; i < kGuardBytes; i++) {
      if (dynamic_shared_[shared_bytes_ + i] != kGuard) fail("writes past the end of dynamic shared memory");
    }
  }

  // Runs every warp until it waits at a barrier of the block, or is done. False: the whole block is done.
  bool run_to_barrier() {
    std::vector<size_t> warps((threads_.size() + kWarp - 1) / kWarp);
    for (size_t w = 0; w < warps.size(); w++) warps[w] = w * kWarp;
    // Either in lockstep, more or less, or one warp far ahead of the others.
    const bool lockstep = random_() % 2;
    std::shuffle(warps.begin(), warps.end(), random_);
    while (!warps.empty()) {
      if (lockstep) std::swap(warps.back(), warps[random_() % warps.size()]);
      if (!run_warp(warps.back())) warps.pop_back();
    }
    const Thread* waiting = nullptr;
    size_t done = 0;
    for (const Thread& thread : threads_) {
      if (thread.state == kDone) {
        done++;
      } else if (waiting && !(waiting->site == thread.site)) {
        fail("threads wait at different barriers," + at(waiting->site) + " and" + at(thread.site));
      } else {
        waiting = &thread;
      }
    }
    if (waiting && done) fail("some threads have left the kernel while others wait at the barrier" + at(waiting->site));
    for (Thread& thread : threads_) thread.state = kReady;
    return waiting;
  }

  // Each ready lane runs to its next wait, in random order. Then exchanges happen for which all lanes have come. False:
  // none of the lanes can go on by itself.
  bool run_warp(size_t first) {
    const int lanes = static_cast<int>(std::min<size_t>(kWarp, threads_.size() - first));
    Thread* const warp = &threads_[first];
    const int start = random_() % kWarp, step = 2 * (random_() % kWarp) + 1;  // odd: meets every lane once
    for (int i = 0; i < kWarp; i++) {
      const int lane = (start + i * step) % kWarp;
      if (lane < lanes && warp[lane].state == kReady) resume(first + lane);
    }
    bool any = false;
    const Thread* stuck = nullptr;
    for (int lane = 0; lane < lanes; lane++) {
      if (warp[lane].state != kAtExchange) continue;
      if (!all_there(warp, lanes, warp[lane])) {
        stuck = &warp[lane];
        continue;
      }
      const unsigned mask = warp[lane].mask;
      uint64_t brought[kWarp];
      for (int l = 0; l < lanes; l++) brought[l] = warp[l].bits;
      for (int l = 0; l < lanes; l++) {
        if (!(mask >> l & 1)) continue;
        warp[l].bits = brought[warp[l].source];
        warp[l].state = kReady;
      }
      any = true;
    }
    if (stuck && !any) {
      fail("a lane waits in vain for others of its mask, which are elsewhere or have left the kernel," +
           at(stuck->site));
    }
    return any;
  }

  // Whether every lane of the mask waits for the same exchange.
  bool all_there(const Thread* warp, int lanes, const Thread& one) const {
    for (int lane = 0; lane < kWarp; lane++) {
      if (!(one.mask >> lane & 1)) continue;
      if (lane >= lanes) return false;
      const Thread& other = warp[lane];
      if (other.state != kAtExchange || other.mask != one.mask || !(other.site == one.site)) return false;
    }
    return true;
  }

  void resume(size_t thread) {
    current_ = static_cast<int>(thread);
    running.thread.x = static_cast<unsigned>(thread);
    curveball_switch_stack(&scheduler_, threads_[thread].stack);
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  const std::function<void()>& kernel_;
  std::minstd_rand random_;
  std::vector<Thread> threads_;
  std::vector<unsigned char> shared_;
  unsigned char* dynamic_shared_;
  size_t shared_bytes_;
  int current_ = 0;
  void* scheduler_ = nullptr;
  std::string error_;
};

Device* device = nullptr;

// The first and last function on a thread's stack: no exception may leave it, and it never returns.
void Device::enter() {
  try {
    device->kernel_();
  } catch (const std::exception& error) {
    device->error_ = error.what();
  }
  device->wait(kDone, {});
  abort();
}

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

}  // namespace

void run(int64_t blocks, int threads, size_t shared_bytes, const void* function, const std::function<void()>& kernel) {
  if (settings.threads && threads > kWarp) threads = settings.threads;
  launches.push_back({blocks, threads, shared_bytes});
  if (blocks < 1 || blocks > 0x7fffffff) fail("a launch of " + std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > kMaxThreads) fail("a launch of " + std::to_string(threads) + " threads per block");
  const auto limit = shared_limits().find(function);
  if (shared_bytes > (limit == shared_limits().end() ? kDefaultSharedLimit : limit->second)) {
    fail("a launch with more dynamic shared memory than it has asked for with raise_shared_limit");
  }
  Device new_device(blocks, threads, shared_bytes, kernel);
  device = &new_device;
  new_device.run();
}

void allow_shared(const void* function, int bytes) {
  if (bytes > settings.max_shared_bytes) fail("raise_shared_limit beyond what the device has");
  shared_limits()[function] = bytes;
}

void block_barrier(Site site) { device->wait(kAtBarrier, site); }
uint64_t exchange(unsigned mask, uint64_t bits, int source, Site site) {
  return device->exchange(mask, bits, source, site);
}

}  // namespace emulator
