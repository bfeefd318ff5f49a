// The loops over numbers, compiled once for every instruction set (cpu/kernels/*.cpp) and chosen when run.
//
// They know no headers of PyTorch, so that nothing of it is compiled with instructions that a processor may lack.

#pragma once

#include "../rf_rmsprop.h"
#include "../rounding.h"

namespace rootfree::cpu {

enum class Dtype : int { f32, bf16, f16 };

// Numbers of a dtype somewhere in memory.
struct Numbers {
  void* data;
  Dtype dtype;

  Numbers from(int64_t start) const {
    return {static_cast<char*>(data) + start * (dtype == Dtype::f32 ? 4 : 2), dtype};
  }
};

// Numbers with all that is needed to write new ones in their place.
struct Stored {
  Numbers value;
  int16_t* residual;  // where rounding is compensated, else null
  Rounding rounding;
  uint32_t key;  // of the random bits, where rounding is stochastic
};

// Neighbouring numbers of a tensor. `first` is the index of the first one, for the random bits.
struct DiagonalPiece {
  Stored param, square;
  Numbers buffer, grad;
  uint32_t first;
  int64_t length;
};

// A matrix of any strides, counted in numbers.
struct Matrix {
  Numbers numbers;
  int64_t row_stride, col_stride;
};

// What new momentum m = alpha2 m + (1 - alpha2) (a S + t D - c I) is made of: n x n matrices, row by row. Of the
// symmetric S, D and m the lower triangles are read. D.data may be null.
struct MomentumUpdate {
  Numbers product, damping, old_m, new_m;
  int64_t n;
  float product_factor, damping_factor, diagonal, momentum;  // a, t, c, alpha2
};

// A row of weights, of their momentum (and residual), and of the preconditioned gradient u, which is without gaps;
// strides are those between neighbours of the row.
struct WeightRow {
  Stored weight;
  Numbers buffer, direction;
  int64_t weight_stride, buffer_stride, residual_stride;
  uint32_t first;
  int64_t length;
};

struct WeightStep {
  float lr, momentum, weight_decay, shrinkage;  // as in DiagonalNumbers
};

struct Kernels {
  // The diagonal step. Gives whether a number was left out.
  bool (*rf_rmsprop)(const DiagonalPiece&, const DiagonalNumbers&);

  // Of alpha m + (1 - alpha) delta: the sum of squares, or the largest row sum of rows of `cols`.
  float (*share_norm)(const Numbers& m, const float* delta, int64_t length, int64_t cols, float alpha, bool row_sum);

  // m <- alpha m + (1 - alpha) delta
  void (*share_momentum)(const Numbers& m, const float* delta, int64_t length, float alpha);

  // out <- factor * matrix, row by row. Gives the sum of squares of what was written, of `factor` = 1 and no `out` that
  // of the matrix itself.
  float (*gather)(const Matrix&, int64_t rows, int64_t cols, float factor, const Numbers& out);

  // A tile of new momentum and its mirror image. Gives the sum of squares of both, and, where `row_sums` [tiles][n] is
  // not null, the sums of magnitudes of the rows of both: of the tile at [tile_col], of its image at [tile_row].
  float (*momentum_tile)(const MomentumUpdate&, int64_t tile_row, int64_t tile_col, float* row_sums);

  // The mirror image of a tile of a symmetric n x n matrix, of which the lower triangle was there.
  void (*mirror_tile)(const Numbers& matrix, int64_t n, int64_t tile_row, int64_t tile_col);

  // A tile of a rows x cols matrix, transposed, into its place in a cols x rows one; both FP32 or both of 16 bits.
  void (*transpose_tile)(const Numbers& source, const Numbers& target, int64_t rows, int64_t cols, int64_t tile_row,
                         int64_t tile_col);

  // C <- C - scale * Y
  void (*move_factor)(const Stored& factor, const Numbers& product, uint32_t first, int64_t length, float scale);

  // The heavy-ball step of a row of weights.
  void (*weight_row)(const WeightRow&, const WeightStep&);
};

constexpr int64_t tile_size = 32;

inline int64_t num_tiles(int64_t n) { return (n + tile_size - 1) / tile_size; }

// Those for the best instruction set that the processor has; as in PyTorch, ATEN_CPU_CAPABILITY chooses a lesser one.
const Kernels& kernels();

}  // namespace rootfree::cpu
