// torch.ops.rootfree_native.clipped_momentum on a CPU:
//
//     m <- alpha2 m + (1 - alpha2) delta,    clip <- 1 / max(1, norm of m)
//
// The first pass computes the norm of the new m, in one partial sum for each share of a block. The second pass writes
// m. Sums are always added in the same order, so that results do not depend on the number of threads.
//
// A side is one of the two Kronecker factors of a batch of blocks. A share is the contiguous part of one block that one
// program, an iteration of the parallel loops, works on.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "tensors.h"

namespace rootfree::cpu {
namespace {

enum Clip : int64_t { frobenius, row_sum, none };

// A row of the table of sides.
struct Side {
  int64_t momentum, delta;              // addresses of m and delta, [L, ...] each
  int64_t size, cols, share_size;       // elements of a block, of its last axis, of a share
  int64_t num_shares;                   // shares of a block
  int64_t num_programs, first_program;  // the side's programs: their number, and the index of the first
};

// `length` elements of block `block` of side `side`.
struct Share {
  TypedPointer momentum;
  const float* delta;
  int64_t length, side, block;
};

// Return the share that a program works on.
Share share_of(const Side* sides, const int32_t* owners, int64_t program, at::ScalarType dtype) {
  const Side& side = sides[owners[program]];
  const int64_t index = program - side.first_program;
  const int64_t block = index / side.num_shares, start = index % side.num_shares * side.share_size;
  const int64_t first = block * side.size + start;
  return {pointer_at(side.momentum, dtype).offset(first), reinterpret_cast<const float*>(side.delta) + first,
          std::min(side.size - start, side.share_size), owners[program], block};
}

// Return the norm of a block of a side from the partial norms of its shares.
float norm_of(const Side& side, const float* sums, int64_t block, int64_t clip) {
  const float* partial_norms = sums + side.first_program + block * side.num_shares;
  double total = 0;
  for (int64_t share = 0; share < side.num_shares; ++share) {
    total = clip == row_sum ? std::max<double>(total, partial_norms[share]) : total + partial_norms[share];
  }
  return clip == row_sum ? total : std::sqrt(static_cast<float>(total));
}

// Write the clips 1 / max(1, norm). If a block is not finite on one side, its clips are 0 on all sides.
void make_clips(const Side* sides, const float* sums, bool overflow, int64_t clip,
                const at::Tensor& clips) {  // [sides, L]
  auto result = clips.accessor<float, 2>();
  for (int64_t block = 0; block < result.size(1); ++block) {
    bool ok = !overflow;
    for (int64_t side = 0; side < result.size(0); ++side) {
      const float norm = norm_of(sides[side], sums, block, clip);
      ok &= is_finite(norm);
      result[side][block] = clip == none ? 1.0f : 1.0f / std::max(norm, 1.0f);
    }
    for (int64_t side = 0; side < result.size(0) && !ok; ++side) {
      result[side][block] = 0;
    }
  }
}

void clipped_momentum(const at::Tensor& sides,      // int64 [sides, 8]
                      const at::Tensor& owners,     // int32 [programs]
                      const at::Tensor& sums,       // float32 [programs]
                      const at::Tensor& found_inf,  // float32 [1]
                      const at::Tensor& clips,      // float32 [sides, L]
                      double riemannian_momentum, at::ScalarType dtype, int64_t clip) {
  const Kernels& k = kernels();
  const auto* rows = static_cast<const Side*>(sides.const_data_ptr());
  const int32_t* side_of_program = owners.const_data_ptr<int32_t>();
  const auto alpha = static_cast<float>(riemannian_momentum);
  auto* norms = sums.mutable_data_ptr<float>();
  const auto result = clips.accessor<float, 2>();

  at::parallel_for(0, owners.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t program = begin; program < end; ++program) {
      const Share s = share_of(rows, side_of_program, program, dtype);
      norms[program] = k.share_norm(s.momentum, s.delta, s.length, rows[s.side].cols, alpha, clip == row_sum);
    }
  });
  make_clips(rows, norms, found_inf.item<float>() != 0, clip, clips);
  at::parallel_for(0, owners.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t program = begin; program < end; ++program) {
      const Share s = share_of(rows, side_of_program, program, dtype);
      if (result[s.side][s.block] != 0) {
        k.share_momentum(s.momentum, s.delta, s.length, alpha);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("clipped_momentum", &clipped_momentum); }

}  // namespace rootfree::cpu
