// The launcher of the normalised momentum. Nothing of PyTorch is needed to compile it.

#pragma once

#include "dtypes.h"

namespace rootfree::cuda {

// A row of the table of sides: where m and delta lie, [L, ...] each; the numbers of a block, of its last axis and of a
// share; into how many shares a block is cut; how many programs the side has, and which is the first.
struct SideRow {
  int64_t momentum, delta, size, cols, share_size, shares, programs, first_program;
};

enum class Clip : int { frobenius = 0, row_sum = 1, none = 2 };

// What the kernels read, all of it on the device but for the numbers here.
struct MomentumArguments {
  const SideRow* sides;   // [num_sides]; shares are whole rows where the clip is by row sums
  const int32_t* owners;  // [programs]: whose side a program works on
  float* sums;            // [programs]: for the kernels' use
  const float* found_inf;
  float* clips;                  // [num_sides, num_blocks]: the result
  float alpha, one_minus_alpha;  // alpha2
  int num_sides;
  int64_t num_blocks;  // L
};

// Both launches: m in place, in FP32 or BF16, and the clips; cudaErrorInvalidValue of FP16. Delta is FP32.
cudaError_t clipped_momentum(const MomentumArguments& arguments, Dtype dtype, Clip clip, int64_t programs,
                             cudaStream_t stream);

}  // namespace rootfree::cuda
