// The operators on lists of parameters, for CUDA: argument checks, launches, registration. Built on LibTorch's stable
// ABI only; compiles for the emulator too.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../tensor_checks.h"
#include "dots.cuh"
#include "launch.h"
#include "preconditioner.cuh"
#include "solve.cuh"
#include "update.cuh"

namespace curveball::cuda {
namespace {

Numbers numbers_of(const Tensor& tensor, size_t count, const char* name) {
  const DType dtype = dtype_of(tensor, name, 0);
  STD_TORCH_CHECK(tensor.numel() == static_cast<int64_t>(count) && tensor.is_contiguous(), name,
                  " must be contiguous with ", count, " element(s); it has ", tensor.numel(), ".");
  return {tensor.const_data_ptr(), dtype};
}

Numbers optional_numbers(const std::optional<Tensor>& tensor, size_t count, const char* name) {
  return tensor ? numbers_of(*tensor, count, name) : Numbers{nullptr, kFloat64};
}

// ---------------------------------------------------------------------------------------------- lists

// One index of the lists, as a kernel sees it: the address of each operand, as many as there are.
struct Entry {
  void* data[4];
  int64_t numel;
  int first_partial;
  int group = 0;
  double lr = 0.0, weight_decay = 0.0;
};

int64_t chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

void* address(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

// The entries of each combination of dtypes: [of w, v or z][of r].
using Entries = std::vector<Entry>[kDTypeCount][kDTypeCount];

// Gives every tensor that is not empty the places of its chunks' sums, in the order of the list: so the order of
// summation depends neither on dtypes nor on the number of launches.
class Places {
 public:
  int next(int64_t numel) {
    const int64_t begin = end_;
    end_ += chunks(numel);
    STD_TORCH_CHECK(end_ <= 0x7fffffff, "too many elements for one call: ", end_, " chunks.");
    return static_cast<int>(begin);
  }
  int end() const { return static_cast<int>(end_); }

 private:
  int64_t end_ = 0;
};

template <int Operands, int Capacity>
void fill(TensorList<Operands, Capacity>& list, int i, const Entry& e) {
  list.first_partial[i] = e.first_partial;
  list.numel[i] = e.numel;
  for (int operand = 0; operand < Operands; operand++) list.data[operand][i] = e.data[operand];
}

template <int Capacity>
void fill(UpdateList<Capacity>& list, int i, const Entry& e) {
  fill(static_cast<TensorList<3, Capacity>&>(list), i, e);
  list.group[i] = e.group;
  list.lr[i] = e.lr;
  list.weight_decay[i] = e.weight_decay;
}

template <typename List, typename Launch>
void launch_list(const Entry* entries, int count, const Launch& launch_) {
  List list;
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) {
    list.first_block[i] = static_cast<int>(blocks);
    fill(list, i, entries[i]);
    blocks += chunks(entries[i].numel);
  }
  list.tensors = count;
  launch_(list, blocks);
}

// launch_(list, blocks) for as many lists as it takes.
template <template <int> class List, typename Launch>
void launch_lists(const std::vector<Entry>& entries, const Launch& launch_) {
  for (size_t begin = 0; begin < entries.size(); begin += kLongList) {
    const int count = static_cast<int>(std::min<size_t>(kLongList, entries.size() - begin));
    if (count <= kShortList) {
      launch_list<List<kShortList>>(&entries[begin], count, launch_);
    } else {
      launch_list<List<kLongList>>(&entries[begin], count, launch_);
    }
  }
}

void check_device(const Tensor& tensor, const char* list, size_t index, const Tensor& other) {
  STD_TORCH_CHECK(tensor.get_device_index() == other.get_device_index(), list, "[", index, "] is on GPU ",
                  tensor.get_device_index(), ", others on GPU ", other.get_device_index(),
                  ": move all tensors to one.");
}

// ---------------------------------------------------------------------------------------------- update

struct UpdateCall {
  const double* scalars;
  Numbers lr_tensor;
  double* partials;
  Stream stream;
};

template <typename W, typename R>
void launch_update(const std::vector<Entry>& entries, const UpdateCall& call) {
  launch_lists<UpdateList>(entries, [&](const auto& list, int64_t blocks) {
    constexpr int capacity = sizeof(list.numel) / sizeof(list.numel[0]);
    launch(update_kernel<W, Compute<W>, R, capacity>, blocks, kListThreads, 0, call.stream, list, call.scalars,
           call.lr_tensor, call.partials);
  });
}

void launch_updates(const Entries& entries, const UpdateCall& call) {
  launch_update<Float16, Float16>(entries[kFloat16][kFloat16], call);
  launch_update<Float16, float>(entries[kFloat16][kFloat32], call);
  launch_update<BFloat16, BFloat16>(entries[kBFloat16][kBFloat16], call);
  launch_update<BFloat16, float>(entries[kBFloat16][kFloat32], call);
  launch_update<float, float>(entries[kFloat32][kFloat32], call);
  launch_update<double, double>(entries[kFloat64][kFloat64], call);
}

// As curveball_fused.ops.update_ says; two launches for any number of groups up to kGroupsPerLaunch, of tensors up to
// kLongList, if they have one dtype.
Tensor update_cuda(std::vector<Tensor> params, std::vector<Tensor> z, std::vector<Tensor> r, Tensor scalars,
                   std::vector<int64_t> group_sizes, std::vector<double> lr, std::vector<double> weight_decay,
                   std::optional<Tensor> lr_tensor) {
  check_update_lists(params, z, r, group_sizes, lr, weight_decay);
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const Numbers rates = optional_numbers(lr_tensor, lr.size(), "lr_tensor");
  if (lr_tensor) check_device(*lr_tensor, "lr_tensor", 0, scalars);

  Entries entries;
  Places places;
  std::vector<int> group_ends;
  for (size_t g = 0, i = 0; g < group_sizes.size(); g++) {
    for (int64_t n = 0; n < group_sizes[g]; n++, i++) {
      const UpdateDTypes dtypes = check_update(params[i], z[i], r[i], i);
      check_device(params[i], "params", i, scalars);
      check_device(z[i], "z", i, scalars);
      check_device(r[i], "r", i, scalars);
      const int64_t numel = params[i].numel();
      if (numel == 0) continue;
      entries[dtypes.w][dtypes.r].push_back({{params[i].mutable_data_ptr(), z[i].mutable_data_ptr(), address(r[i])},
                                             numel,
                                             places.next(numel),
                                             static_cast<int>(g),
                                             lr[g],
                                             weight_decay[g]});
    }
    group_ends.push_back(places.end());
  }

  const DeviceGuard guard(scalars.get_device_index());
  const Stream stream = current_stream(scalars.get_device_index());
  const int64_t groups = static_cast<int64_t>(lr.size());
  Tensor scratch = new_doubles(scalars, {places.end() + 2 * groups}), next = new_doubles(scalars, {kScalarCount});
  double* partials = scratch.mutable_data_ptr<double>();
  double *squares = partials + places.end(), *used_lr = squares + groups;
  launch_updates(entries, {previous, rates, partials, stream});

  int64_t begin = 0;
  do {
    GroupList list;
    list.begin = static_cast<int>(begin);
    list.count = static_cast<int>(std::min<int64_t>(kGroupsPerLaunch, groups - begin));
    list.first_partial = begin ? group_ends[begin - 1] : 0;
    std::copy_n(group_ends.begin() + begin, list.count, list.end_partial);
    std::copy_n(lr.begin() + begin, list.count, list.lr);
    begin += list.count;
    list.last = begin == groups;
    launch(finish_update_kernel<kFinishThreads>, 1, kFinishThreads, 0, stream, list, partials, rates, previous, squares,
           used_lr, next.mutable_data_ptr<double>());
  } while (begin < groups);
  return next;
}

// ---------------------------------------------------------------------------------------------- dots

template <typename Z, typename R>
void launch_dots(const std::vector<Entry>& entries, double* partials, Stream stream) {
  launch_lists<DotsList>(entries, [&](const auto& list, int64_t blocks) {
    constexpr int capacity = sizeof(list.numel) / sizeof(list.numel[0]);
    launch(dots_kernel<Z, R, capacity>, blocks, kListThreads, 0, stream, list, partials);
  });
}

// With empty lists the dispatcher has no device to choose by and raises; the Python layer answers that case.
Tensor dots_cuda(std::vector<Tensor> z, std::vector<Tensor> r) {
  check_lengths(z.size(), "z", r.size(), "r");
  Entries entries;
  Places places;
  for (size_t i = 0; i < z.size(); i++) {
    const auto [z_dtype, r_dtype] = check_dots(z[i], r[i], i);
    check_device(z[i], "z", i, z[0]);
    check_device(r[i], "r", i, z[0]);
    const int64_t numel = z[i].numel();
    if (numel == 0) continue;
    entries[z_dtype][r_dtype].push_back({{address(z[i]), address(r[i])}, numel, places.next(numel)});
  }

  const DeviceGuard guard(z[0].get_device_index());
  const Stream stream = current_stream(z[0].get_device_index());
  Tensor scratch = new_doubles(z[0], {3 * int64_t(places.end())}), result = new_doubles(z[0], {3});
  double* partials = scratch.mutable_data_ptr<double>();
  launch_dots<float, Float16>(entries[kFloat32][kFloat16], partials, stream);
  launch_dots<float, BFloat16>(entries[kFloat32][kBFloat16], partials, stream);
  launch_dots<float, float>(entries[kFloat32][kFloat32], partials, stream);
  launch_dots<float, double>(entries[kFloat32][kFloat64], partials, stream);
  launch_dots<double, Float16>(entries[kFloat64][kFloat16], partials, stream);
  launch_dots<double, BFloat16>(entries[kFloat64][kBFloat16], partials, stream);
  launch_dots<double, float>(entries[kFloat64][kFloat32], partials, stream);
  launch_dots<double, double>(entries[kFloat64][kFloat64], partials, stream);
  launch(finish_dots_kernel<kFinishThreads>, 1, kFinishThreads, 0, stream, partials, places.end(),
         result.mutable_data_ptr<double>());
  return result;
}

// ---------------------------------------------------------------------------------------------- precondition

struct PreconditionCall {
  const double* weight;
  double decay, eps;
  const double* scalars;  // or null
  double* partials;
  Stream stream;
};

template <typename V, typename R>
void launch_precondition(const Entries& entries, const PreconditionCall& call) {
  launch_lists<DiagonalList>(entries[dtype_of_type<V>][dtype_of_type<R>], [&](const auto& list, int64_t blocks) {
    constexpr int capacity = sizeof(list.numel) / sizeof(list.numel[0]);
    launch(precondition_kernel<V, R, capacity>, blocks, kListThreads, 0, call.stream, list, call.weight, call.decay,
           call.eps, call.scalars, call.partials);
  });
}

// As curveball_fused.ops.precondition_ says, with u given.
Tensor precondition_cuda(std::vector<Tensor> u, std::vector<Tensor> v, std::vector<Tensor> r, std::vector<Tensor> z,
                         Tensor weight, double decay, double eps, std::optional<Tensor> scalars) {
  check_precondition_lists(u, v, r, z, decay, eps);
  const double* weight_data = read_doubles(weight, 1, "weight");
  const double* scalars_data = scalars ? read_doubles(*scalars, 2, "scalars") : nullptr;
  if (scalars) check_device(*scalars, "scalars", 0, weight);
  Entries entries;
  Places places;
  for (size_t i = 0; i < v.size(); i++) {
    const Tensor* z_i = z.empty() ? nullptr : &z[i];
    const auto [v_dtype, r_dtype] = check_precondition(u[i], v[i], r[i], z_i, i);
    check_device(u[i], "u", i, weight);
    check_device(v[i], "v", i, weight);
    check_device(r[i], "r", i, weight);
    if (z_i) check_device(*z_i, "z", i, weight);
    const int64_t numel = v[i].numel();
    if (numel == 0) continue;
    entries[v_dtype][r_dtype].push_back(
        {{u[i].mutable_data_ptr(), v[i].mutable_data_ptr(), address(r[i]), z_i ? address(*z_i) : nullptr},
         numel,
         places.next(numel)});
  }

  const DeviceGuard guard(weight.get_device_index());
  const Stream stream = current_stream(weight.get_device_index());
  Tensor scratch = new_doubles(weight, {3 * int64_t(places.end())}), result = new_doubles(weight, {3});
  double* partials = scratch.mutable_data_ptr<double>();
  const PreconditionCall call{weight_data, decay, eps, scalars_data, partials, stream};
  launch_precondition<float, Float16>(entries, call);
  launch_precondition<float, BFloat16>(entries, call);
  launch_precondition<float, float>(entries, call);
  launch_precondition<double, Float16>(entries, call);
  launch_precondition<double, BFloat16>(entries, call);
  launch_precondition<double, double>(entries, call);
  launch(finish_dots_kernel<kFinishThreads>, 1, kFinishThreads, 0, stream, partials, places.end(),
         result.mutable_data_ptr<double>());
  return result;
}

// ---------------------------------------------------------------------------------------------- scalars

Tensor solve_cuda(Tensor scalars, Tensor loss, Tensor products, std::optional<Tensor> dots, std::optional<double> beta,
                  std::optional<double> rho, double lr, std::optional<Tensor> lr_tensor, double theta, double average,
                  bool bounded) {
  SolveArguments a;
  a.previous = read_doubles(scalars, kScalarCount, "scalars");
  a.products = read_doubles(products, 5, "products");
  a.dots = dots ? read_doubles(*dots, 3, "dots") : nullptr;
  a.loss = numbers_of(loss, 1, "loss");
  a.lr_tensor = optional_numbers(lr_tensor, 1, "lr_tensor");
  a.lr = lr;
  a.beta_is_fixed = beta.has_value();
  a.beta = beta.value_or(0.0);
  a.rho_is_fixed = rho.has_value();
  a.rho = rho.value_or(0.0);
  a.theta = theta;
  a.average = average;
  a.bounded = bounded;
  check_device(loss, "loss", 0, scalars);
  check_device(products, "products", 0, scalars);
  if (dots) check_device(*dots, "dots", 0, scalars);
  if (lr_tensor) check_device(*lr_tensor, "lr_tensor", 0, scalars);

  const DeviceGuard guard(scalars.get_device_index());
  Tensor next = new_doubles(scalars, {kScalarCount});
  a.next = next.mutable_data_ptr<double>();
  launch(solve_kernel, 1, 1, 0, current_stream(scalars.get_device_index()), a);
  return next;
}

Tensor adapt_damping_cuda(Tensor scalars, Tensor new_loss, double low, double high, double factor, double minimum,
                          double maximum) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const Numbers loss = numbers_of(new_loss, 1, "new_loss");
  check_device(new_loss, "new_loss", 0, scalars);
  const DeviceGuard guard(scalars.get_device_index());
  Tensor next = new_doubles(scalars, {kScalarCount});
  launch(adapt_damping_kernel, 1, 1, 0, current_stream(scalars.get_device_index()), previous, loss,
         DampingRule{low, high, factor, minimum, maximum}, next.mutable_data_ptr<double>());
  return next;
}

Tensor keep_coefficients_cuda(Tensor scalars, Tensor loss, Tensor slope, std::optional<Tensor> room, double sign) {
  const double* previous = read_doubles(scalars, kScalarCount, "scalars");
  const Numbers value = numbers_of(loss, 1, "loss");
  const double* fall = read_doubles(slope, 1, "slope");
  const Numbers most = optional_numbers(room, 1, "room");
  check_device(loss, "loss", 0, scalars);
  check_device(slope, "slope", 0, scalars);
  if (room) check_device(*room, "room", 0, scalars);
  const DeviceGuard guard(scalars.get_device_index());
  Tensor next = new_doubles(scalars, {kScalarCount});
  launch(keep_coefficients_kernel, 1, 1, 0, current_stream(scalars.get_device_index()), previous, value, fall, most,
         sign, next.mutable_data_ptr<double>());
  return next;
}

}  // namespace
}  // namespace curveball::cuda

CURVEBALL_REGISTER(library) {
  library.impl("update_", TORCH_BOX(&curveball::cuda::update_cuda));
  library.impl("dots", TORCH_BOX(&curveball::cuda::dots_cuda));
  library.impl("precondition_", TORCH_BOX(&curveball::cuda::precondition_cuda));
  library.impl("solve", TORCH_BOX(&curveball::cuda::solve_cuda));
  library.impl("adapt_damping", TORCH_BOX(&curveball::cuda::adapt_damping_cuda));
  library.impl("keep_coefficients", TORCH_BOX(&curveball::cuda::keep_coefficients_cuda));
}
