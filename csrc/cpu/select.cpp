// Chooses the table of loops for this processor, once.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace curveball::cpu {

extern const Kernels default_kernels;

#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;

namespace {

bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const char* compiled_instruction_sets() { return "avx512,avx2,default"; }
#else
const char* compiled_instruction_sets() { return "default"; }
#endif

namespace {

const Kernels* select(const char* wanted) {
  const auto fits = [wanted](const Kernels& k) { return !wanted || !*wanted || !strcmp(wanted, k.name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (fits(avx512_kernels) && has_avx512()) return &avx512_kernels;
  if (fits(avx2_kernels) && has_avx2()) return &avx2_kernels;
#endif
  return fits(default_kernels) ? &default_kernels : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = select(getenv("CURVEBALL_INSTRUCTION_SET"));
  return chosen;
}

const Kernels& chosen_kernels() {
  const Kernels* const chosen = kernels();
  STD_TORCH_CHECK(chosen, "CURVEBALL_INSTRUCTION_SET names an instruction set that cannot run here: unset it.");
  return *chosen;
}

}  // namespace curveball::cpu
