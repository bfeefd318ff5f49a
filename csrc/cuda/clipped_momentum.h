// The launcher of clipped_momentum. It does not depend on PyTorch, so that nvcc alone can check it.
//
// A side is one of the two Kronecker factors of a batch of blocks. A share is the contiguous part of one block that one
// program works on. A program is a CUDA thread block: "block" always means a block of a matrix here.

#pragma once

#include "dtypes.h"

namespace rootfree::cuda {

// A row of the table of sides.
struct SideRow {
  int64_t momentum, delta;          // addresses of m and delta, [L, ...] each
  int64_t size, cols, share_size;   // elements of a block, of its last axis, of a share
  int64_t shares;                   // shares of a block
  int64_t programs, first_program;  // the side's programs: their number, and the index of the first
};

// The norm that clips: the Frobenius norm, the largest absolute row sum, or none.
enum class Clip : int { frobenius = 0, row_sum = 1, none = 2 };

// The arguments of the kernels. Pointers are to device memory.
struct MomentumArguments {
  const SideRow* sides;          // [num_sides]; for Clip::row_sum a share is a whole number of rows
  const int32_t* owners;         // [programs]: index of the side that a program works on
  float* sums;                   // [programs]: scratch memory for the partial norms
  const float* found_inf;        // [1]: not 0 skips every block
  float* clips;                  // [num_sides, num_blocks]: output
  float alpha, one_minus_alpha;  // alpha2
  int num_sides;
  int64_t num_blocks;  // L
};

// Update m in place and write the clips, in two launches. `dtype` is that of m, FP32 or BF16; delta is FP32.
// Return cudaErrorInvalidValue for FP16.
cudaError_t clipped_momentum(const MomentumArguments& arguments, Dtype dtype, Clip clip, int64_t programs,
                             cudaStream_t stream);

}  // namespace rootfree::cuda
