// The operators torch.ops.curveball_fused.*: schemas, argument checks, and the CPU implementations.
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
};

const cpu::Kernels& chosen_kernels() {
  const cpu::Kernels* kernels = cpu::kernels();
  STD_TORCH_CHECK(kernels, "CURVEBALL_INSTRUCTION_SET names an instruction set that cannot run here: unset it.");
  return *kernels;
}

// z <- (rho - beta lambda) z - beta r;  w <- (1 - lr weight_decay) w + lr z;  returns z.z of the new z.
// If beta or rho is not finite (solve's signal for a step to skip), w and z stay and z.z is that of the old z.
Tensor update_cpu(std::vector<Tensor> params, std::vector<Tensor> z, std::vector<Tensor> r, Tensor coefficients,
                  double lr, double weight_decay, std::optional<Tensor> lr_tensor) {
  check_lengths(params.size(), "params", z.size(), "z");
  check_lengths(params.size(), "params", r.size(), "r");
  const double* c = read_doubles(coefficients, 3, "coefficients");
  const cpu::UpdateArguments arguments{c[0], c[1], c[2], learning_rate(lr, lr_tensor), weight_decay};
  const bool skip = !is_finite(arguments.beta) || !is_finite(arguments.rho);
  const cpu::Kernels& kernels = chosen_kernels();

  cpu::Blocks blocks;
  std::vector<Update> updates;
  updates.reserve(params.size());
  for (size_t i = 0; i < params.size(); i++) {
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
                       r_dtype, block});
    blocks.add(i, params[i].numel());
  }

  std::vector<double> partial(blocks.size());
  blocks.run([&](const cpu::Block& b, int64_t index) {
    const Update& u = updates[b.tensor];
    void* const z_block = at(u.z, b.begin, u.z_dtype);
    partial[index] =
        skip ? kernels.squares[u.z_dtype](z_block, b.count)
             : u.block(at(u.w, b.begin, u.w_dtype), z_block, at(u.r, b.begin, u.r_dtype), b.count, arguments);
  });
  Tensor result = new_doubles(coefficients, {});
  double sum = 0.0;
  for (const double p : partial) sum += p;
  *result.mutable_data_ptr<double>() = sum;
  return result;
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

STABLE_TORCH_LIBRARY(curveball_fused, m) {
  m.def(
      "update_(Tensor(a!)[] params, Tensor(b!)[] z, Tensor[] r, Tensor coefficients, float lr, float weight_decay, "
      "Tensor? lr_tensor=None) -> Tensor");
  m.def("dots(Tensor[] z, Tensor[] r) -> Tensor");
  m.def(
      "solve(Tensor scalars, Tensor loss, Tensor products, Tensor? dots, float? beta, float? rho, float lr, "
      "Tensor? lr_tensor=None) -> Tensor");
  m.def(
      "adapt_damping(Tensor scalars, Tensor new_loss, float low, float high, float factor, float minimum, "
      "float maximum) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("update_", TORCH_BOX(&curveball::update_cpu));
  m.impl("dots", TORCH_BOX(&curveball::dots_cpu));
  m.impl("solve", TORCH_BOX(&curveball::solve_cpu));
  m.impl("adapt_damping", TORCH_BOX(&curveball::adapt_damping_cpu));
}
