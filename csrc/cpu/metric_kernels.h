// What the loops of a metric offer, one table per instruction set; preconditioner.cpp and bases.cpp call them.
// curveball_fused/ops/preconditioners.py says what the operators compute.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace curveball::cpu {

// The numbers of one pass with Adam's diagonal, and whether the new v is kept.
struct DiagonalArguments {
  double decay, weight, eps;
  bool keep_v;
};

// Writes u, and v if it is kept, of n elements, and [z.Pz, z.r, r.u]. u may be r; z may be null: no sums with it.
using PreconditionBlock = void (*)(void* u, void* v, const void* r, const void* z, int64_t n,
                                   const DiagonalArguments& arguments, double* result);
// v <- decay v + (1 - decay) r^2 of n elements.
using AverageBlock = void (*)(void* v, const void* r, int64_t n, double decay);

// A matrix in memory, from its first element on; rows are contiguous, and `row` elements apart.
struct ConstMatrix {
  const void* data;
  int64_t row;
};
struct Matrix {
  void* data;
  int64_t row;
};

// A piece of a parameter's matrix, for which both bases are one matrix each; data is null for a basis that is the
// identity, of which there is at most one, and for z where there are to be no sums with it.
struct Tile {
  Matrix u, turned;
  ConstMatrix v, r, z, left, right;
  int64_t rows, columns;
};
// How many elements of memory a tile needs.
constexpr int64_t tile_scratch(int64_t rows, int64_t columns) { return 4 * rows * columns; }
// turned <- Q'r S, u <- Q (turned / p) S', and [z.Pz, z.r, r.u] in these bases.
using TileBlock = void (*)(const Tile& tile, const DiagonalArguments& arguments, void* scratch, double* result);

// L <- keep L + (1 - keep) m m', L being rows x rows; where `of_columns`, of the columns of m, with m'm.
struct Gram {
  Matrix factor;
  ConstMatrix m;
  int64_t rows, columns;
  bool of_columns;
  double keep;
};
using GramBlock = void (*)(const Gram& gram);

// Null where a dtype is not offered.
struct MetricKernels {
  PreconditionBlock precondition[kDTypeCount][kDTypeCount];  // [dtype of v][dtype of r]
  AverageBlock average[kDTypeCount];
  TileBlock tile[kDTypeCount];
  GramBlock gram[kDTypeCount];
};

}  // namespace curveball::cpu
