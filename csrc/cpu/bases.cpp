// The operators of the Kronecker metric, on the CPU: each takes all parameters, in pieces that fit in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <vector>

#include "../formulas.h"
#include "../tensor_checks.h"
#include "blocks.h"
#include "kernels.h"

namespace curveball::cpu {
namespace {

// Bits of an entry of `sides`.
enum { kLeft = 1, kRight = 2 };
// How long a piece of a side without a basis is.
constexpr int64_t kPlainPiece = 128;
// Multiply-adds from which a thread of its own pays, and those that an element costs beside the products.
constexpr int64_t kGrain = 1 << 19, kElementCost = 16;

// One side of a parameter's matrix, cut into pieces. `square` is its bases or factors, one after the other.
struct Side {
  char* square = nullptr;  // null: none
  int64_t length = 0, piece = kPlainPiece;
  DType dtype = kFloat32;

  int64_t pieces() const { return (length + piece - 1) / piece; }
  int64_t begin(int64_t p) const { return p * piece; }
  int64_t size(int64_t p) const { return std::min(piece, length - begin(p)); }
  Matrix matrix(int64_t p) const { return {square ? at(square, p * piece * piece, dtype) : nullptr, piece}; }
  ConstMatrix const_matrix(int64_t p) const { return {matrix(p).data, piece}; }
};

struct Sides {
  Side left, right;
};

// Reads the bases or factors of the parameters, in their order, from a list that has those that there are.
class SidesReader {
 public:
  SidesReader(const std::vector<Tensor>& squares, const char* name, const std::vector<int64_t>& sides)
      : squares_(squares), name_(name) {
    size_t wanted = 0;
    for (const int64_t side : sides) {
      STD_TORCH_CHECK(0 <= side && side <= (kLeft | kRight), "sides has an entry of ", side, ": 0, 1, 2 or 3.");
      wanted += (side & kLeft ? 1 : 0) + (side & kRight ? 1 : 0);
    }
    STD_TORCH_CHECK(wanted == squares.size(), name, " has ", squares.size(), " tensors but sides asks for ", wanted,
                    ": pass one for each bit.");
  }

  // Those of the next parameter, which is like `v`.
  Sides next(const Tensor& v, DType dtype, int64_t sides) {
    STD_TORCH_CHECK(!sides || (v.dim() > 1 && v.numel()), name_, "[", next_,
                    "] is for a tensor that is no matrix, or has no elements: it must be None.");
    const int64_t rows = v.dim() > 1 ? v.size(0) : 1;
    return {side(rows, dtype, sides & kLeft), side(rows ? v.numel() / rows : 0, dtype, sides & kRight)};
  }

 private:
  Side side(int64_t length, DType dtype, bool has_square) {
    if (!has_square) return {nullptr, length, kPlainPiece, dtype};
    const Tensor& square = squares_[next_];
    STD_TORCH_CHECK(dtype_of(square, name_, next_) == dtype && square.is_contiguous(), name_, "[", next_,
                    "] must be contiguous ", name_of(dtype), ".");
    const int64_t dims = square.dim();
    STD_TORCH_CHECK(dims == 2 || dims == 3, name_, "[", next_, "] must have two or three dimensions; it has ", dims,
                    ".");
    const Side found{static_cast<char*>(square.mutable_data_ptr()), length, square.size(dims - 1), dtype};
    STD_TORCH_CHECK(square.size(dims - 2) == found.piece && found.piece > 0 &&
                        (dims == 2 ? found.piece == length : found.pieces() == square.size(0)),
                    name_, "[", next_, "] does not fit a side of ", length,
                    ": it must be n x n, or k x b x b with as few pieces as reach over the side.");
    next_++;
    return found;
  }

  const std::vector<Tensor>& squares_;
  const char* name_;
  size_t next_ = 0;
};

// One entry of the lists, without or with sides.
DType check_entry(const Tensor& v, const Tensor& other, const char* name, size_t index, bool has_sides) {
  const DType dtype = dtype_of(v, "v", index);
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kFloat64, "v[", index, "] has dtype ", name_of(dtype),
                  ": convert it to float32 or float64.");
  STD_TORCH_CHECK(dtype_of(other, name, index) == dtype, name, "[", index, "] must have the dtype of v[", index, "], ",
                  name_of(dtype), ".");
  check_dense(v, "v", index);
  check_same_layout(v, "v", other, name, index);
  STD_TORCH_CHECK(!has_sides || v.is_contiguous(), "v[", index, "] has bases and must be contiguous.");
  return dtype;
}

// A part of a parameter: a tile, or, without bases, some elements in a single row.
struct Part {
  int64_t place;
  DType dtype;
  Tile tile;
  bool has_bases;
};

class Parts {
 public:
  // Elements without bases: a single row.
  void add(Tile whole, DType dtype, int64_t numel) {
    for (int64_t begin = 0; begin < numel; begin += kBlockSize) {
      Tile tile = moved(whole, begin, dtype);
      tile.rows = 1, tile.columns = std::min(kBlockSize, numel - begin);
      push(tile, dtype, false, kElementCost);
    }
  }

  void add(const Tile& whole, DType dtype, const Sides& sides) {
    const auto& [left, right] = sides;
    for (int64_t i = 0; i < left.pieces(); i++) {
      for (int64_t j = 0; j < right.pieces(); j++) {
        Tile tile = moved(whole, left.begin(i) * right.length + right.begin(j), dtype);
        tile.rows = left.size(i), tile.columns = right.size(j);
        tile.left = left.const_matrix(i), tile.right = right.const_matrix(j);
        push(tile, dtype, true, kElementCost + 2 * ((left.square ? tile.rows : 0) + (right.square ? tile.columns : 0)));
      }
    }
  }

  size_t size() const { return list_.size(); }

  template <typename Work>
  void run(const Work& work) const {
    share_out(list_, total_, kGrain, [&](const Part& part, int64_t index) { work(part, index); });
  }

  int64_t scratch_bytes() const { return scratch_bytes_; }

 private:
  static Tile moved(Tile tile, int64_t elements, DType dtype) {
    tile.u.data = at(tile.u.data, elements, dtype), tile.v.data = at(tile.v.data, elements, dtype);
    tile.r.data = at(tile.r.data, elements, dtype);
    if (tile.turned.data) tile.turned.data = at(tile.turned.data, elements, dtype);
    if (tile.z.data) tile.z.data = at(tile.z.data, elements, dtype);
    return tile;
  }

  void push(const Tile& tile, DType dtype, bool has_bases, int64_t cost) {
    list_.push_back({total_, dtype, tile, has_bases});
    total_ += tile.rows * tile.columns * cost;
    if (has_bases) scratch_bytes_ = std::max(scratch_bytes_, tile_scratch(tile.rows, tile.columns) * bytes(dtype));
  }

  std::vector<Part> list_;
  int64_t total_ = 0, scratch_bytes_ = 0;
};

// turned <- Q'r S and u <- Q (turned / p) S' with p = sqrt(v' / weight) + eps, v' = decay v + (1 - decay) turned^2, for
// each parameter with its Q and S, of which `sides` says whether there are any; turned stays where there are none, and
// r is what it would be. Returns [z.Pz, z.r, r.u].
Tensor precondition_in_bases_cpu(std::vector<Tensor> u, std::vector<Tensor> turned, std::vector<Tensor> v,
                                 std::vector<Tensor> r, std::vector<Tensor> z, std::vector<Tensor> bases,
                                 std::vector<int64_t> sides, Tensor weight, double decay, double eps) {
  check_precondition_lists(u, v, r, z, decay, eps);
  check_lengths(v.size(), "v", turned.size(), "turned");
  check_lengths(v.size(), "v", sides.size(), "sides");
  SidesReader reader(bases, "bases", sides);
  const DiagonalArguments arguments{decay, *read_doubles(weight, 1, "weight"), eps, false};
  const Kernels& kernels = chosen_kernels();

  Parts parts;
  for (size_t i = 0; i < v.size(); i++) {
    const bool has_sides = sides[i] != 0;
    const DType dtype = check_entry(v[i], r[i], "r", i, has_sides);
    check_entry(v[i], u[i], "u", i, has_sides);
    if (!z.empty()) check_entry(v[i], z[i], "z", i, has_sides);
    if (has_sides) check_entry(v[i], turned[i], "turned", i, has_sides);
    const Sides both = reader.next(v[i], dtype, sides[i]);
    const int64_t row = both.right.length;
    const Tile whole{{u[i].mutable_data_ptr(), row},
                     {has_sides ? turned[i].mutable_data_ptr() : nullptr, row},
                     {v[i].const_data_ptr(), row},
                     {r[i].const_data_ptr(), row},
                     {z.empty() ? nullptr : z[i].const_data_ptr(), row},
                     {},
                     {},
                     0,
                     0};
    has_sides ? parts.add(whole, dtype, both) : parts.add(whole, dtype, v[i].numel());
  }

  std::vector<double> partial(3 * parts.size());
  parts.run([&](const Part& part, int64_t index) {
    thread_local std::vector<char> scratch;
    const Tile& t = part.tile;
    double* const sums = &partial[3 * index];
    if (part.has_bases) {
      if (static_cast<int64_t>(scratch.size()) < parts.scratch_bytes()) scratch.resize(parts.scratch_bytes());
      kernels.metric.tile[part.dtype](t, arguments, scratch.data(), sums);
    } else {  // v is written only where it is kept
      kernels.metric.precondition[part.dtype][part.dtype](t.u.data, const_cast<void*>(t.v.data), t.r.data, t.z.data,
                                                          t.columns, arguments, sums);
    }
  });
  return three_sums(weight, partial);
}

// One index of the lists of averages.
struct Average {
  void* v;
  const void* turned;
  DType dtype;
};

struct Statistic {
  int64_t place;
  DType dtype;
  Gram gram;
};

// The trace of a matrix times its transpose, which must not overflow: the factor would never be finite again.
bool is_usable(const Kernels& kernels, const Tensor& r, DType dtype) {
  const double trace = kernels.squares[dtype](r.const_data_ptr(), r.numel());
  const double largest = dtype == kFloat32 ? std::numeric_limits<float>::max() : std::numeric_limits<double>::max();
  return trace <= largest / 2;
}

// If beta and rho are finite (the step was taken): v <- decay v + (1 - decay) turned^2; and where `gather`, factors <-
// decay factors + (1 - decay) r r' or r' r, if all of these are finite. Returns the scalars with the new weight.
Tensor update_statistics_cpu(std::vector<Tensor> v, std::vector<Tensor> turned, std::vector<Tensor> factors,
                             std::vector<Tensor> r, std::vector<int64_t> sides, Tensor weight, double decay,
                             Tensor scalars, bool gather) {
  check_lengths(v.size(), "v", turned.size(), "turned");
  check_lengths(v.size(), "v", r.size(), "r");
  check_lengths(v.size(), "v", sides.size(), "sides");
  const double* s = read_doubles(scalars, kScalarCount, "scalars");
  const double new_weight = *read_doubles(weight, 1, "weight");
  SidesReader reader(factors, "factors", sides);
  const Kernels& kernels = chosen_kernels();
  const bool is_taken = is_finite(s[kBeta]) && is_finite(s[kRho]);

  Blocks blocks;
  std::vector<Average> averages;
  std::vector<Statistic> statistics;
  int64_t total = 0;
  bool usable = is_taken && gather;
  for (size_t i = 0; i < v.size(); i++) {
    const bool has_sides = sides[i] != 0;
    const DType dtype = check_entry(v[i], turned[i], "turned", i, has_sides);
    averages.push_back({v[i].mutable_data_ptr(), turned[i].const_data_ptr(), dtype});
    blocks.add(i, v[i].numel());
    const Sides both = reader.next(v[i], dtype, sides[i]);
    if (!gather || !has_sides) continue;
    check_entry(v[i], r[i], "r", i, has_sides);
    usable = usable && is_usable(kernels, r[i], dtype);
    for (const bool of_columns : {false, true}) {
      const Side &side = of_columns ? both.right : both.left, &other = of_columns ? both.left : both.right;
      for (int64_t p = 0; side.square && p < side.pieces(); p++) {
        const int64_t row = both.right.length, size = side.size(p);
        const void* const m = at(r[i].const_data_ptr(), side.begin(p) * (of_columns ? 1 : row), dtype);
        statistics.push_back({total, dtype, {side.matrix(p), {m, row}, size, other.length, of_columns, decay}});
        total += size * size * other.length;
      }
    }
  }
  if (is_taken) {
    blocks.run([&](const Block& b, int64_t) {
      const auto& [v_i, turned_i, dtype] = averages[b.tensor];
      kernels.metric.average[dtype](at(v_i, b.begin, dtype), at(turned_i, b.begin, dtype), b.count, decay);
    });
  }
  if (usable) {
    share_out(statistics, total, kGrain,
              [&](const Statistic& statistic, int64_t) { kernels.metric.gram[statistic.dtype](statistic.gram); });
  }
  Tensor next = new_doubles(scalars, {kScalarCount});
  double* const written = next.mutable_data_ptr<double>();
  std::copy(s, s + kScalarCount, written);
  if (is_taken) written[kGathered] = new_weight;
  return next;
}

}  // namespace
}  // namespace curveball::cpu

STABLE_TORCH_LIBRARY_IMPL(curveball_fused, CPU, m) {
  m.impl("precondition_in_bases", TORCH_BOX(&curveball::cpu::precondition_in_bases_cpu));
  m.impl("update_statistics_", TORCH_BOX(&curveball::cpu::update_statistics_cpu));
}
