// The operators torch.ops.curveball_fused.* and their CPU implementations.
// Built on LibTorch's stable ABI only, so one binary serves torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "math.h"
#include "schemas.h"

namespace curveball {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor new_doubles(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

// lr as a number; a tensor, if given, overrides it (then a scheduler or a captured graph may change it in place).
double learning_rate(double lr, const std::optional<Tensor>& lr_tensor) {
  return lr_tensor ? read_number(*lr_tensor, "lr_tensor") : lr;
}

char* at(void* data, int64_t element, cpu::DType dtype) { return static_cast<char*>(data) + element * bytes(dtype); }

const char* at(const void* data, int64_t element, cpu::DType dtype) {
  return static_cast<const char*>(data) + element * bytes(dtype);
}

// One index of the lists: addresses and dtypes, read once, outside the parallel region.
struct Update {
  void *w, *z;
  const void* r;
  cpu::DType w_dtype, z_dtype, r_dtype;
  cpu::UpdateBlock block;
  int64_t group;
};

const cpu::Kernels& chosen_kernels() {
  const cpu::Kernels* kernels = cpu::kernels();
  STD_TORCH_CHECK(kernels, "CURVEBALL_INSTRUCTION_SET names an instruction set that cannot run here: unset it.");
  return *kernels;
}

// z <- (rho - beta lambda) z - beta r;  w <- (1 - lr weight_decay) w + lr z, with each group's own lr and weight_decay.
// If beta or rho is not finite (solve's signal for a step to skip), w and z stay. Returns the scalars with the z.z that
// is there now, and with M where the groups' rates differ.
Tensor update_cpu(std::vector<Tensor> params, std::vector<Tensor> z, std::vector<Tensor> r, Tensor scalars,
                  std::vector<int64_t> group_sizes, std::vector<double> lr, std::vector<double> weight_decay,
                  std::optional<Tensor> lr_tensor) {
  check_lengths(params.size(), "params", z.size(), "z");
  check_lengths(params.size(), "params", r.size(), "r");
  check_groups(params.size(), group_sizes, lr, weight_decay);
  const double* s = read_doubles(scalars, kScalarCount, "scalars");
  if (lr_tensor) lr = read_numbers(*lr_tensor, lr.size(), "lr_tensor");
  const bool skip = !is_finite(s[kBeta]) || !is_finite(s[kRho]);
  const cpu::Kernels& kernels = chosen_kernels();

  cpu::Blocks blocks;
  std::vector<Update> updates;
  updates.reserve(params.size());
  for (size_t g = 0, i = 0; g < group_sizes.size(); g++) {
    for (int64_t n = 0; n < group_sizes[g]; n++, i++) {
      const cpu::DType w_dtype = dtype_of(params[i], "params", i), z_dtype = dtype_of(z[i], "z", i),
                       r_dtype = dtype_of(r[i], "r", i);
      check_state_dtype(w_dtype, z_dtype, i);
      const cpu::UpdateBlock block = kernels.update[w_dtype][r_dtype];
      STD_TORCH_CHECK(block, "r[", i, "] has dtype ", name_of(r_dtype), " beside a ", name_of(w_dtype),
                      " parameter: convert r to the parameter's dtype or to that of z.");
      check_dense(params[i], "params", i);
      check_same_layout(params[i], "params", z[i], "z", i);
      check_same_layout(params[i], "params", r[i], "r", i);
      updates.push_back({params[i].mutable_data_ptr(), z[i].mutable_data_ptr(), r[i].const_data_ptr(), w_dtype, z_dtype,
                         r_dtype, block, static_cast<int64_t>(g)});
      blocks.add(i, params[i].numel());
    }
  }

  std::vector<double> partial(blocks.size());
  blocks.run([&](const cpu::Block& b, int64_t index) {
    const Update& u = updates[b.tensor];
    void* const z_block = at(u.z, b.begin, u.z_dtype);
    const cpu::UpdateArguments arguments{s[kBeta], s[kRho], s[kLambda], lr[u.group], weight_decay[u.group]};
    partial[index] =
        skip ? kernels.squares[u.z_dtype](z_block, b.count)
             : u.block(at(u.w, b.begin, u.w_dtype), z_block, at(u.r, b.begin, u.r_dtype), b.count, arguments);
  });
  std::vector<double> squares(lr.size());
  for (size_t i = 0; i < partial.size(); i++) squares[updates[blocks[i].tensor].group] += partial[i];
  Tensor next = new_doubles(scalars, {kScalarCount});
  finish_update(s, squares.data(), lr.data(), static_cast<int>(lr.size()), next.mutable_data_ptr<double>());
  return next;
}

struct Dots {
  const void *z, *r;
  cpu::DType z_dtype, r_dtype;
  cpu::DotsBlock block;
};

// [z.z, z.r, r.r] in one pass over both lists. With empty lists the dispatcher has no device to choose by and raises;
// the Python layer answers that case.
Tensor dots_cpu(std::vector<Tensor> z, std::vector<Tensor> r) {
  check_lengths(z.size(), "z", r.size(), "r");
  cpu::Blocks blocks;
  std::vector<Dots> pairs;
  pairs.reserve(z.size());
  for (size_t i = 0; i < z.size(); i++) {
    const cpu::DType z_dtype = dtype_of(z[i], "z", i), r_dtype = dtype_of(r[i], "r", i);
    const cpu::DotsBlock block = chosen_kernels().dots[z_dtype][r_dtype];
    STD_TORCH_CHECK(block, "z[", i, "] has dtype ", name_of(z_dtype), ": convert it to float32 or float64.");
    check_dense(z[i], "z", i);
    check_same_layout(z[i], "z", r[i], "r", i);
    pairs.push_back({z[i].const_data_ptr(), r[i].const_data_ptr(), z_dtype, r_dtype, block});
    blocks.add(i, z[i].numel());
  }

  std::vector<double> partial(3 * blocks.size());
  blocks.run([&](const cpu::Block& b, int64_t index) {
    const Dots& p = pairs[b.tensor];
    p.block(at(p.z, b.begin, p.z_dtype), at(p.r, b.begin, p.r_dtype), b.count, &partial[3 * index]);
  });
  Tensor result = new_doubles(z[0], {3});
  double* sums = result.mutable_data_ptr<double>();
  sums[0] = sums[1] = sums[2] = 0.0;
  for (size_t i = 0; i < partial.size(); i++) sums[i % 3] += partial[i];
  return result;
}

Tensor solve_cpu(Tensor scalars, Tensor loss, Tensor products, std::optional<Tensor> dots, std::optional<double> beta,
                 std::optional<double> rho, double lr, std::optional<Tensor> lr_tensor) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const double* five = read_doubles(products, 5, "products");
  const double* three = dots ? read_doubles(*dots, 3, "dots") : nullptr;
  Tensor next = new_doubles(scalars, {kScalarCount});
  solve(previous, read_number(loss, "loss"), five, three, beta ? &*beta : nullptr, rho ? &*rho : nullptr,
        learning_rate(lr, lr_tensor), next.mutable_data_ptr<double>());
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

}  // namespace
}  // namespace curveball

STABLE_TORCH_LIBRARY(curveball_fused, m) { curveball::define_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("update_", TORCH_BOX(&curveball::update_cpu));
  m.impl("dots", TORCH_BOX(&curveball::dots_cpu));
  m.impl("solve", TORCH_BOX(&curveball::solve_cpu));
  m.impl("adapt_damping", TORCH_BOX(&curveball::adapt_damping_cpu));
}
