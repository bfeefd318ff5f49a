// The interface of the loops in cpu/kernels/*.cpp, which are compiled once for each instruction set and chosen at run
// time.
//
// Kernels include no header of PyTorch: its inline functions would be compiled with instructions that the processor may
// lack, and the linker might keep those copies for the whole library.

#pragma once

#include "../rf_rmsprop.h"
#include "../rounding.h"

namespace rootfree::cpu {

enum class Dtype : int { f32, bf16, f16 };

// The address of elements whose dtype is known at run time.
struct TypedPointer {
  void* data;
  Dtype dtype;

  // Return the address of the element `start` places further on.
  TypedPointer offset(int64_t start) const {
    return {static_cast<char*>(data) + start * (dtype == Dtype::f32 ? 4 : 2), dtype};
  }
};

// Elements, and what is needed to round new values into their place.
struct Stored {
  TypedPointer value;
  int16_t* residual;  // null unless rounding is compensated
  Rounding rounding;
  uint32_t key;  // of the random bits; unused unless rounding is stochastic
};

// Contiguous elements of a parameter, its state and its gradient.
struct DiagonalChunk {
  Stored param, square;
  TypedPointer buffer, grad;
  uint32_t first;  // index of the first element in its tensor, for the random bits
  int64_t length;
};

// A matrix of any strides, which are counted in elements.
struct Matrix {
  TypedPointer elements;
  int64_t row_stride, col_stride;
};

// The terms of new momentum m = alpha2 m + (1 - alpha2) (a S + t D - c I), contiguous n x n matrices. S, D and m are
// symmetric, and only their lower triangles are read. D.data is null without damping.
struct MomentumUpdate {
  TypedPointer product, damping, old_m, new_m;  // S, D, m, m
  int64_t n;
  float product_factor, damping_factor, diagonal, momentum;  // a, t, c, alpha2
};

// A row of a block of weights, of its momentum (and residual), and of the preconditioned gradient u. The strides are
// those between neighbours of the row; u is contiguous. buffer.data is null if the momentum averages gradients.
struct WeightRow {
  Stored weight;
  TypedPointer buffer, direction;
  float scale;  // of u
  int64_t weight_stride, buffer_stride, residual_stride;
  uint32_t first;  // index of the first element in its block, for the random bits
  int64_t length;
};

// Scalars that all elements of a batch of weights share. `averages` says that the momentum averages gradients.
struct WeightScalars {
  float lr, momentum, weight_decay, shrinkage;  // as in DiagonalScalars
  bool averages;
};

// Scalars that all elements of a tensor share in the scaled diagonal step.
struct ScaledScalars {
  float grad_factor, decay, growth;  // as in DiagonalScalars
  float damping;                     // lambda, or its root if `whitened`
  float scale;                       // of u
  WeightScalars weight;
  bool whitened, nesterov;
};

// A row of a block of momentum M, whose neighbours are `buffer_stride` apart, and of the gradient, which is contiguous.
struct GradientRow {
  TypedPointer buffer, grad;
  int64_t buffer_stride, length;
};

// A share is the contiguous part of one block that one thread works on at a time. A tile is a square of tile_size rows
// and columns of a matrix, smaller at its lower and right edges; tile (i, j) begins at row i * tile_size.
struct Kernels {
  // Step a chunk in place. Return whether an element was skipped because its new state would not be finite.
  bool (*rf_rmsprop)(const DiagonalChunk&, const DiagonalScalars&);

  // Return the sum of squares of factor * gradient of a chunk.
  double (*gradient_squares)(const DiagonalChunk&, float factor);

  // Return the sum of squares of u of a chunk in the scaled diagonal step, before `scale` is applied.
  double (*scaled_squares)(const DiagonalChunk&, const ScaledScalars&);

  // Step a chunk in place, by the scaled diagonal step. Return whether an element of u counted as 0 because it is not
  // finite.
  bool (*scaled_rmsprop)(const DiagonalChunk&, const ScaledScalars&);

  // Return a norm of alpha m + (1 - alpha) delta over a share: the sum of squares, or the largest absolute row sum of
  // rows of `cols` elements.
  float (*share_norm)(const TypedPointer& m, const float* delta, int64_t length, int64_t cols, float alpha,
                      bool row_sum);

  // Update m <- alpha m + (1 - alpha) delta in place.
  void (*share_momentum)(const TypedPointer& m, const float* delta, int64_t length, float alpha);

  // Write factor * matrix to `out`, contiguously, and return the sum of squares of the rounded result. If out.data is
  // null, write nothing and return the sum of squares of the matrix.
  float (*gather)(const Matrix&, int64_t rows, int64_t cols, float factor, const TypedPointer& out);

  // Write a tile of new momentum and its mirror image. Return the sum of squares of both. If `row_sums` [tiles][n] is
  // not null, write to it the absolute row sums of the tile, at [tile_col], and of its mirror image, at [tile_row].
  float (*momentum_tile)(const MomentumUpdate&, int64_t tile_row, int64_t tile_col, float* row_sums);

  // Copy a tile in the lower triangle of a symmetric n x n matrix to its mirror image above the diagonal.
  void (*mirror_tile)(const TypedPointer& matrix, int64_t n, int64_t tile_row, int64_t tile_col);

  // Transpose a tile of a rows x cols matrix into its place in a cols x rows matrix. Their dtypes have one size.
  void (*transpose_tile)(const TypedPointer& source, const TypedPointer& target, int64_t rows, int64_t cols,
                         int64_t tile_row, int64_t tile_col);

  // Update C <- C - scale * Y in place. `first` is the index of the first element in its block, for the random bits.
  void (*update_factor)(const Stored& factor, const TypedPointer& product, uint32_t first, int64_t length, float scale);

  // Update C <- C - scale * (X + X') in place for a tile of the lower triangle, and copy it to its mirror image. C is a
  // symmetric n x n matrix, X is a contiguous n x n matrix.
  void (*update_symmetric_tile)(const Stored& factor, const TypedPointer& product, int64_t n, int64_t tile_row,
                                int64_t tile_col, float scale);

  // Update M <- momentum * M + (1 - momentum) * G in place, and write the new M over G. With `nesterov`, write
  // (1 - momentum) * G + momentum * M instead.
  void (*average_gradient_row)(const GradientRow&, float momentum, bool nesterov);

  // Return the sum of squares of a row of u, in which elements that are not finite count as 0.
  float (*direction_squares)(const TypedPointer& direction, int64_t length);

  // Step a row of weights in place, and its momentum unless that averages gradients. Return whether an element of u
  // counted as 0 because it is not finite.
  bool (*step_weight_row)(const WeightRow&, const WeightScalars&);
};

constexpr int64_t tile_size = 32;  // two FP32 tiles, 8 KiB, fit the first-level cache

// Return the number of tiles along an axis of n elements.
inline int64_t num_tiles(int64_t n) { return (n + tile_size - 1) / tile_size; }

// Return the kernels for the best instruction set of the processor. As in PyTorch, the environment variable
// ATEN_CPU_CAPABILITY selects a lesser one.
const Kernels& kernels();

}  // namespace rootfree::cpu
