// The operator of a metric on lists of tensors, on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../formulas.h"
#include "../tensor_checks.h"
#include "blocks.h"
#include "kernels.h"

namespace curveball::cpu {
namespace {

// One index of the lists: addresses and dtypes, read once, outside the parallel region.
struct Precondition {
  void *u, *v;
  const void *r, *z;
  PreconditionDTypes dtypes;
  PreconditionBlock block;
};

// u <- r / p with p = sqrt(v' / weight) + eps, v' = decay v + (1 - decay) r^2. With scalars of which beta and rho are
// finite (solve has a step to take), v <- v'. Returns [z.Pz, z.r, r.u].
Tensor precondition_cpu(std::vector<Tensor> u, std::vector<Tensor> v, std::vector<Tensor> r, std::vector<Tensor> z,
                        Tensor weight, double decay, double eps, std::optional<Tensor> scalars) {
  check_precondition_lists(u, v, r, z, decay, eps);
  const double* s = scalars ? read_doubles(*scalars, kRho + 1, "scalars") : nullptr;
  const DiagonalArguments arguments{decay, *read_doubles(weight, 1, "weight"), eps,
                                    s && is_finite(s[kBeta]) && is_finite(s[kRho])};
  const Kernels& kernels = chosen_kernels();

  Blocks blocks;
  std::vector<Precondition> entries;
  entries.reserve(v.size());
  for (size_t i = 0; i < v.size(); i++) {
    const PreconditionDTypes dtypes = check_precondition(u[i], v[i], r[i], z.empty() ? nullptr : &z[i], i);
    entries.push_back({u[i].mutable_data_ptr(), v[i].mutable_data_ptr(), r[i].const_data_ptr(),
                       z.empty() ? nullptr : z[i].const_data_ptr(), dtypes,
                       kernels.metric.precondition[dtypes.v][dtypes.r]});
    blocks.add(i, v[i].numel());
  }

  std::vector<double> partial(3 * blocks.size());
  blocks.run([&](const Block& b, int64_t index) {
    const Precondition& e = entries[b.tensor];
    e.block(at(e.u, b.begin, e.dtypes.v), at(e.v, b.begin, e.dtypes.v), at(e.r, b.begin, e.dtypes.r),
            e.z ? at(e.z, b.begin, e.dtypes.v) : nullptr, b.count, arguments, &partial[3 * index]);
  });
  return three_sums(weight, partial);
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("precondition_", TORCH_BOX(&curveball::cpu::precondition_cpu));
}
