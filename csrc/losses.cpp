// The operators on losses, on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "loss_checks.h"

namespace curveball {
namespace {

using Products = std::tuple<Tensor, Tensor, Tensor>;
using Numbers = std::unique_ptr<char[]>;

// Elements of a block: few, so that the blocks are shared out evenly, for these loops do more than cross memory.
constexpr int64_t kLossBlock = 16384;

const cpu::LossKernels& loss_kernels() {
  const cpu::Kernels* kernels = cpu::kernels();
  STD_TORCH_CHECK(kernels, "CURVEBALL_INSTRUCTION_SET names an instruction set that cannot run here: unset it.");
  return kernels->losses;
}

// Contiguous and uninitialized. By torch's C interface: torch::stable::new_empty looks its operator up by name, which
// takes longer than the loops over a small loss.
Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), number,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_tensor({sizes.begin(), sizes.end()}, x.scalar_type());
}

// Memory for `count` numbers of the type that x is computed in, and the padding that the loops want.
Numbers new_numbers(DType x, int64_t count) {
  return Numbers(new char[(count + cpu::kLossPadding) * (x == kFloat64 ? sizeof(double) : sizeof(float))]);
}

// ---------------------------------------------------------------------------------------------- sums

struct Sums {
  double of[3];

  Sums times(double first, double others) const { return {first * of[0], others * of[1], others * of[2]}; }
};

// work(begin, end, memory of this thread, sums) for blocks of at most `size` of n things. The sums are added in the
// order of the blocks, which depend on the sizes only: the same bits for any number of threads.
template <typename Memory, typename Work>
Sums sum_blocks(int64_t n, int64_t size, const Memory& memory, const Work& work) {
  const int64_t blocks = (n + size - 1) / size;
  std::vector<Sums> partial(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    const auto own = memory();
    for (int64_t b = from; b < to; b++) work(b * size, std::min(n, (b + 1) * size), own.get(), partial[b].of);
  });
  Sums total{};
  for (const Sums& p : partial) {
    for (int k = 0; k < 3; k++) total.of[k] += p.of[k];
  }
  return total;
}

// The loss, and the two products of before the pull-back.
std::pair<Tensor, Tensor> first_results(const Sums& sums) {
  Tensor loss = new_tensor({}, ScalarType::Double), products = new_tensor({2}, ScalarType::Double);
  *loss.mutable_data_ptr<double>() = sums.of[0];
  std::copy(sums.of + 1, sums.of + 3, products.mutable_data_ptr<double>());
  return {loss, products};
}

// All five products.
Tensor all_products(const double* first, const Sums& sums) {
  Tensor five = new_tensor({5}, ScalarType::Double);
  double* const result = five.mutable_data_ptr<double>();
  std::copy(first, first + 2, result);
  std::copy(sums.of, sums.of + 3, result + 2);
  return five;
}

// ---------------------------------------------------------------------------------------------- cross-entropy

// The weights; with label smoothing, which needs a number for each class, ones that `ones` will hold, if there are
// none.
template <typename C>
void find_weights(cpu::CrossEntropy& a, const Tensor& x, const std::optional<Tensor>& weight, bool mean,
                  Numbers& ones) {
  const C* w = weights_of<C>(x, weight, "weight");
  a.weights = w ? std::accumulate(w, w + a.classes, 0.0) : static_cast<double>(a.classes);
  double own = 0.0;
  for (int64_t n = 0; mean && n < x.size(0); n++) {
    const int64_t y = a.target[n];
    if (y != a.ignore_index && y >= 0 && y < a.classes) own += w ? w[y] : C(1);
  }
  a.inverse = mean ? 1.0 / own : 1.0;
  if (!w && a.smooth != 0.0) {
    ones = new_numbers(dtype_of(x, "x", 0), a.classes);
    C* const filled = reinterpret_cast<C*>(ones.get());
    std::fill(filled, filled + a.classes, C(1));
    w = filled;
  }
  a.weight = w;
}

// Either operator; `a` has what only that one knows.
Sums cross_entropy(cpu::CrossEntropy& a, const cpu::CrossEntropyBlock (&blocks)[kDTypeCount], const Tensor& x,
                   const Tensor& v, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                   bool mean, double label_smoothing, double sign) {
  const DType dtype = dtype_of(x, "x", 0);
  a.x = x.const_data_ptr();
  a.v = v.const_data_ptr();
  a.target = target.const_data_ptr<int64_t>();
  a.classes = x.size(1);
  a.ignore_index = ignore_index;
  a.keep = 1.0 - label_smoothing;
  a.smooth = label_smoothing / a.classes;
  a.sign = sign;
  Numbers ones;
  (dtype == kFloat64 ? find_weights<double> : find_weights<float>)(a, x, weight, mean, ones);
  const int64_t rows = std::max<int64_t>(1, kLossBlock / std::max<int64_t>(1, a.classes));
  return sum_blocks(
      x.size(0), rows, [&] { return new_numbers(dtype, a.classes); },
      [&](int64_t begin, int64_t end, void* scratch, double* sums) { blocks[dtype](a, begin, end, scratch, sums); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_cotangent(Tensor x, Tensor v, Tensor target,
                                                                  std::optional<Tensor> weight, int64_t ignore_index,
                                                                  bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  Tensor c = new_like(x);
  Tensor rows = new_tensor({x.size(0), 3}, arithmetic_of(x));
  cpu::CrossEntropy a{};
  a.c = c.mutable_data_ptr();
  a.rows = rows.mutable_data_ptr();
  const Sums sums = cross_entropy(a, loss_kernels().cross_entropy_cotangent, x, v, target, weight, ignore_index, mean,
                                  label_smoothing, sign);
  const auto [loss, products] = first_results(sums.times(a.inverse, a.sign * a.inverse));  // D = 0: 0 * inf = NaN
  return {loss, c, products, rows};
}

Tensor cross_entropy_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight, Tensor rows,
                          Tensor products, int64_t ignore_index, bool mean, double label_smoothing, double sign) {
  check_cross_entropy(x, v, target, weight);
  check_like(x, u, "u");
  check_place(x, u, "u");
  check_rows(x, rows);
  const double* first = products_of(x, products);
  cpu::CrossEntropy a{};
  a.u = u.const_data_ptr();
  a.rows = const_cast<void*>(rows.const_data_ptr());
  const Sums sums = cross_entropy(a, loss_kernels().cross_entropy_products, x, v, target, weight, ignore_index, mean,
                                  label_smoothing, sign);
  return all_products(first, sums.times(sign, sign));  // 1/D is in `rows`
}

// ---------------------------------------------------------------------------------------------- elementwise losses

// Numbers that repeat after `period` elements, and some of them again, so that a round can begin anywhere. Without a
// weight, ones.
struct Repeated {
  Numbers numbers;
  int64_t period;
};

template <typename C>
Repeated repeated(const Tensor& x, const std::optional<Tensor>& weight, const char* name) {
  constexpr int64_t kOnes = 128;
  const auto [values, length] = periodic<C>(x, weight, name);
  const int64_t period = values && length > 0 ? length : kOnes;
  Numbers numbers = new_numbers(dtype_of(x, "x", 0), period);
  C* const filled = reinterpret_cast<C*>(numbers.get());
  for (int64_t i = 0; i < period; i++) filled[i] = values && length > 0 ? values[i] : C(1);
  for (int64_t i = 0; i < cpu::kLossPadding; i++) filled[period + i] = filled[i % period];
  return {std::move(numbers), period};
}

// One operator's arguments, checked, and the memory behind its weights.
struct ElementsCall {
  Repeated weight, pos_weight;
  cpu::Elements arguments;

  ElementsCall(const Tensor& x, const Tensor& v, const Tensor& target, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& pos_weight, bool mean, double sign) {
    check_elements(x, v, target);
    const auto make = dtype_of(x, "x", 0) == kFloat64 ? repeated<double> : repeated<float>;
    this->weight = make(x, weight, "weight");
    this->pos_weight = make(x, pos_weight, "pos_weight");
    arguments = {x.const_data_ptr(),
                 v.const_data_ptr(),
                 nullptr,
                 target.const_data_ptr(),
                 nullptr,
                 this->weight.numbers.get(),
                 this->pos_weight.numbers.get(),
                 this->weight.period,
                 this->pos_weight.period,
                 mean ? 1.0 / x.numel() : 1.0,  // the mean of nothing is NaN: 0 * inf
                 sign};
  }

  Sums sum(const cpu::ElementsBlock (&blocks)[kDTypeCount], const Tensor& x) const {
    const cpu::ElementsBlock block = blocks[dtype_of(x, "x", 0)];
    return sum_blocks(
        x.numel(), kLossBlock, [] { return Numbers(); },
        [&](int64_t begin, int64_t end, void*, double* sums) { block(arguments, begin, end, sums); });
  }
};

Products element_products(ElementsCall call, const cpu::ElementsBlock (&blocks)[kDTypeCount], const Tensor& x) {
  Tensor c = new_like(x);
  call.arguments.c = c.mutable_data_ptr();
  const double scale = call.arguments.scale;
  const auto [loss, products] = first_results(call.sum(blocks, x).times(scale, call.arguments.sign * scale));
  return {loss, c, products};
}

Tensor element_dots(ElementsCall call, const cpu::ElementsBlock (&blocks)[kDTypeCount], const Tensor& x,
                    const Tensor& u, const Tensor& products) {
  check_like(x, u, "u");
  check_place(x, u, "u");
  const double* first = products_of(x, products);
  call.arguments.u = u.const_data_ptr();
  const double factor = call.arguments.sign * call.arguments.scale;
  return all_products(first, call.sum(blocks, x).times(factor, factor));
}

Products mse_cotangent(Tensor x, Tensor v, Tensor target, bool mean, double sign) {
  return element_products({x, v, target, std::nullopt, std::nullopt, mean, sign}, loss_kernels().mse_cotangent, x);
}

Tensor mse_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor products, bool mean, double sign) {
  return element_dots({x, v, target, std::nullopt, std::nullopt, mean, sign}, loss_kernels().mse_products, x, u, products);
}

Products bce_cotangent(Tensor x, Tensor v, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                      bool mean, double sign) {
  return element_products({x, v, target, weight, pos_weight, mean, sign}, loss_kernels().bce_cotangent, x);
}

Tensor bce_products(Tensor x, Tensor v, Tensor u, Tensor target, std::optional<Tensor> weight,
                std::optional<Tensor> pos_weight, Tensor products, bool mean, double sign) {
  return element_dots({x, v, target, weight, pos_weight, mean, sign}, loss_kernels().bce_products, x, u, products);
}

}  // namespace
}  // namespace curveball

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("cross_entropy_cotangent", TORCH_BOX(&curveball::cross_entropy_cotangent));
  m.impl("cross_entropy_products", TORCH_BOX(&curveball::cross_entropy_products));
  m.impl("mse_cotangent", TORCH_BOX(&curveball::mse_cotangent));
  m.impl("mse_products", TORCH_BOX(&curveball::mse_products));
  m.impl("bce_cotangent", TORCH_BOX(&curveball::bce_cotangent));
  m.impl("bce_products", TORCH_BOX(&curveball::bce_products));
}
