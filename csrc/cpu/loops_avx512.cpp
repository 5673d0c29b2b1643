// The loops for x86-64 processors with AVX-512. Nothing in here may run before select.cpp has asked the processor.
#if defined(__x86_64__)

// Standard headers first, for any processor; what follows the pragma is compiled for this one only.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define CURVEBALL_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,f16c")
#endif

#include "loops.h"
#include "tangent_loops.h"

namespace curveball::cpu {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = with_tangents(make_kernels("avx512"));

}  // namespace curveball::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86-64
