// torch.ops.rootfree_native.kron_gather on a CPU: gather a batch of blocks G [L, p, d] from tiles of gradients of any
// strides, and compute sums of squares of G, C and K on the way.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace rootfree::cpu {
namespace {

// Rows of a block whose squares are added into one partial sum (SHARE_ROWS of rootfree_kernels/native/cpu.py).
constexpr int64_t share_rows = 64;

// Return G [L, p, d] in `dtype`, and `squares` [1 + factors, L, shares] in FP32: the sums of squares of G and of every
// factor. Share i is rows share_rows * i up to share_rows * (i + 1); it is 0 if a matrix has no such rows.
std::tuple<at::Tensor, at::Tensor> kron_gather(at::TensorList grads,    // of any shapes and strides
                                               at::IntArrayRef tiles,   // four integers for each gradient
                                               int64_t rows,            // p
                                               int64_t cols,            // d
                                               at::TensorList factors,  // C [L, p, p], K [L, d, d], or none
                                               const std::optional<at::Tensor>& grad_scale, at::ScalarType dtype,
                                               bool maximize) {
  TORCH_CHECK_VALUE(!grads.empty(), "there are no gradients: pass at least one.");
  for (const at::Tensor& x : factors) {
    check_contiguous("a factor", x);
  }
  const Kernels& k = kernels();
  const std::vector<Block> blocks = blocks_of(tiles, rows, cols);
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const at::Tensor batch = at::empty({num_blocks, rows, cols}, grads[0].options().dtype(dtype));
  const int64_t num_shares = (std::max(rows, cols) + share_rows - 1) / share_rows;
  const at::Tensor squares =
      at::empty({1 + static_cast<int64_t>(factors.size()), num_blocks, num_shares}, batch.options().dtype(at::kFloat));
  const float factor = (maximize ? -1.0f : 1.0f) / item_or(grad_scale, 1.0f);

  std::vector<at::Tensor> sources;  // gradients as matrices, in dtypes that kernels read
  for (const at::Tensor& grad : grads) {
    const at::Tensor matrix = grad.dim() == 2 ? grad : grad.reshape({grad.size(0), -1});
    sources.push_back(matrix.scalar_type() == at::kDouble ? matrix.to(at::kFloat) : matrix);
  }
  const std::vector<Matrix> matrices = matrices_of(sources);
  const TypedPointer out = pointer_to(batch);
  auto* sums = squares.mutable_data_ptr<float>();

  at::parallel_for(0, squares.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i % num_shares, block = i / num_shares % num_blocks, which = i / (num_shares * num_blocks);
      const int64_t first = share * share_rows;
      if (which == 0) {  // G
        const Matrix source = block_of(matrices[blocks[block].index], blocks[block]);
        const int64_t count = std::clamp<int64_t>(rows - first, 0, share_rows);
        const Matrix part{source.elements.offset(first * source.row_stride), source.row_stride, source.col_stride};
        sums[i] = k.gather(part, count, cols, factor, out.offset((block * rows + first) * cols));
      } else {  // a factor
        const at::Tensor& x = factors[which - 1];
        const int64_t n = x.size(-1), count = std::clamp<int64_t>(n - first, 0, share_rows);
        const Matrix part{pointer_to(x).offset((block * n + first) * n), n, 1};
        sums[i] = k.gather(part, count, n, 1.0f, {nullptr, Dtype::f32});
      }
    }
  });
  return {batch, squares};
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("kron_gather", &kron_gather); }

}  // namespace rootfree::cpu
