// The operators on lists of parameters, on the CPU; and the schemas of all operators torch.ops.curveball_fused.*.
// Built on LibTorch's stable ABI only, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../formulas.h"
#include "../schemas.h"
#include "../tensor_checks.h"
#include "blocks.h"
#include "kernels.h"

namespace curveball::cpu {
namespace {

// lr as a number; a tensor, if given, overrides it (then a scheduler or a captured graph may change it in place).
double learning_rate(double lr, const std::optional<Tensor>& lr_tensor) {
  return lr_tensor ? read_number(*lr_tensor, "lr_tensor") : lr;
}

// One index of the lists: addresses and dtypes, read once, outside the parallel region.
struct Update {
  void *w, *z;
  const void* r;
  UpdateDTypes dtypes;
  UpdateBlock block;
  int64_t group;
};

// z <- (rho - beta s) z - beta r;  w <- (1 - lr weight_decay) w + lr z, with each group's own lr and weight_decay.
// If beta or rho is not finite (solve's signal for a step to skip), w and z stay. Returns the scalars with the z.z that
// is there now, and with M where the groups' rates differ.
Tensor update_cpu(std::vector<Tensor> params, std::vector<Tensor> z, std::vector<Tensor> r, Tensor scalars,
                  std::vector<int64_t> group_sizes, std::vector<double> lr, std::vector<double> weight_decay,
                  std::optional<Tensor> lr_tensor) {
  check_update_lists(params, z, r, group_sizes, lr, weight_decay);
  const double* s = read_doubles(scalars, kScalarCount, "scalars");
  if (lr_tensor) lr = read_numbers(*lr_tensor, lr.size(), "lr_tensor");
  const bool skip = !is_finite(s[kBeta]) || !is_finite(s[kRho]);
  const Kernels& kernels = chosen_kernels();

  Blocks blocks;
  std::vector<Update> updates;
  updates.reserve(params.size());
  for (size_t g = 0, i = 0; g < group_sizes.size(); g++) {
    for (int64_t n = 0; n < group_sizes[g]; n++, i++) {
      const UpdateDTypes dtypes = check_update(params[i], z[i], r[i], i);
      updates.push_back({params[i].mutable_data_ptr(), z[i].mutable_data_ptr(), r[i].const_data_ptr(), dtypes,
                         kernels.update[dtypes.w][dtypes.r], static_cast<int64_t>(g)});
      blocks.add(i, params[i].numel());
    }
  }

  std::vector<double> partial(blocks.size());
  blocks.run([&](const Block& b, int64_t index) {
    const Update& u = updates[b.tensor];
    void* const z_block = at(u.z, b.begin, u.dtypes.z);
    const UpdateArguments arguments{s[kBeta], s[kRho], s[kDirectionDamping], lr[u.group], weight_decay[u.group]};
    partial[index] =
        skip ? kernels.squares[u.dtypes.z](z_block, b.count)
             : u.block(at(u.w, b.begin, u.dtypes.w), z_block, at(u.r, b.begin, u.dtypes.r), b.count, arguments);
  });
  std::vector<double> squares(lr.size());
  for (size_t i = 0; i < partial.size(); i++) squares[updates[blocks[i].tensor].group] += partial[i];
  Tensor next = new_doubles(scalars, {kScalarCount});
  finish_update(s, squares.data(), lr.data(), static_cast<int>(lr.size()), next.mutable_data_ptr<double>());
  return next;
}

struct Dots {
  const void *z, *r;
  DType z_dtype, r_dtype;
  DotsBlock block;
};

// [z.z, z.r, r.r] in one pass over both lists. With empty lists the dispatcher has no device to choose by and raises;
// the Python layer answers that case.
Tensor dots_cpu(std::vector<Tensor> z, std::vector<Tensor> r) {
  check_lengths(z.size(), "z", r.size(), "r");
  const Kernels& kernels = chosen_kernels();
  Blocks blocks;
  std::vector<Dots> pairs;
  pairs.reserve(z.size());
  for (size_t i = 0; i < z.size(); i++) {
    const auto [z_dtype, r_dtype] = check_dots(z[i], r[i], i);
    pairs.push_back({z[i].const_data_ptr(), r[i].const_data_ptr(), z_dtype, r_dtype, kernels.dots[z_dtype][r_dtype]});
    blocks.add(i, z[i].numel());
  }

  std::vector<double> partial(3 * blocks.size());
  blocks.run([&](const Block& b, int64_t index) {
    const Dots& p = pairs[b.tensor];
    p.block(at(p.z, b.begin, p.z_dtype), at(p.r, b.begin, p.r_dtype), b.count, &partial[3 * index]);
  });
  return three_sums(z[0], partial);
}

Tensor solve_cpu(Tensor scalars, Tensor loss, Tensor products, std::optional<Tensor> dots, std::optional<double> beta,
                 std::optional<double> rho, double lr, std::optional<Tensor> lr_tensor, double theta, double average,
                 bool bounded) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const double* five = read_doubles(products, 5, "products");
  const double* three = dots ? read_doubles(*dots, 3, "dots") : nullptr;
  Tensor next = new_doubles(scalars, {kScalarCount});
  const SolveOptions options{
      beta ? &*beta : nullptr, rho ? &*rho : nullptr, learning_rate(lr, lr_tensor), theta, average, bounded};
  solve(previous, read_number(loss, "loss"), five, three, options, next.mutable_data_ptr<double>());
  return next;
}

Tensor adapt_damping_cpu(Tensor scalars, Tensor new_loss, double low, double high, double factor, double minimum,
                         double maximum) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  Tensor next = new_doubles(scalars, {kScalarCount});
  adapt_damping(previous, read_number(new_loss, "new_loss"), {low, high, factor, minimum, maximum},
                next.mutable_data_ptr<double>());
  return next;
}

Tensor keep_coefficients_cpu(Tensor scalars, Tensor loss, Tensor slope, std::optional<Tensor> room, double sign) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const double* fall = read_doubles(slope, 1, "slope");
  Tensor next = new_doubles(scalars, {kScalarCount});
  keep_coefficients(previous, read_number(loss, "loss"), *fall, room.has_value(),
                    room ? read_number(*room, "room") : 0.0, sign, next.mutable_data_ptr<double>());
  return next;
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY(curveball_fused, m) { curveball::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("update_", TORCH_BOX(&curveball::cpu::update_cpu));
  m.impl("dots", TORCH_BOX(&curveball::cpu::dots_cpu));
  m.impl("solve", TORCH_BOX(&curveball::cpu::solve_cpu));
  m.impl("adapt_damping", TORCH_BOX(&curveball::cpu::adapt_damping_cpu));
  m.impl("keep_coefficients", TORCH_BOX(&curveball::cpu::keep_coefficients_cpu));
}
