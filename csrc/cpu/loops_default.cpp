// The loops for every processor of the architecture that the compiler targets (x86-64: SSE2).
#include "loops.h"
#include "tangent_loops.h"

namespace curveball::cpu {

extern const Kernels default_kernels;
const Kernels default_kernels = with_tangents(make_kernels("default"));

}  // namespace curveball::cpu
