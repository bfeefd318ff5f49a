// torch.ops.rootfree_native.kron_gather on a CPU: G [L, p, d] from tiles of gradients of any strides, and the sums of
// the squares of G, C and K.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace rootfree::cpu {
namespace {

constexpr int64_t share_rows = 64;  // rows that are summed up at a time

// `squares` [1 + F, L, shares], FP32: of rows 64 i and following of G and of every factor, in share i.
std::tuple<at::Tensor, at::Tensor> kron_gather(at::TensorList grads, at::IntArrayRef tiles, int64_t rows, int64_t cols,
                                               at::TensorList factors, const std::optional<at::Tensor>& grad_scale,
                                               at::ScalarType dtype, bool maximize) {
  TORCH_CHECK_VALUE(!grads.empty(), "no gradients: pass one at least.");
  for (const at::Tensor& x : factors) {
    check_contiguous("a factor", x);
  }
  const Kernels& k = kernels();
  const std::vector<Block> blocks = blocks_of(tiles, rows, cols);
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const at::Tensor batch = at::empty({num_blocks, rows, cols}, grads[0].options().dtype(dtype));
  const int64_t shares = (std::max(rows, cols) + share_rows - 1) / share_rows;
  const at::Tensor squares =
      at::empty({1 + static_cast<int64_t>(factors.size()), num_blocks, shares}, batch.options().dtype(at::kFloat));
  const float factor = (maximize ? -1.0f : 1.0f) / value_of(grad_scale, 1.0f);

  std::vector<at::Tensor> sources;  // gradients as matrices of dtypes that kernels read
  for (const at::Tensor& grad : grads) {
    const at::Tensor matrix = grad.dim() == 2 ? grad : grad.reshape({grad.size(0), -1});
    sources.push_back(matrix.scalar_type() == at::kDouble ? matrix.to(at::kFloat) : matrix);
  }
  const std::vector<Matrix> matrices = matrices_of(sources);
  const Numbers out = numbers_of(batch);
  auto* sums = squares.mutable_data_ptr<float>();

  at::parallel_for(0, squares.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i % shares, block = i / shares % num_blocks, which = i / (shares * num_blocks);
      const int64_t first = share * share_rows;
      if (which == 0) {
        const Matrix source = block_of(matrices[blocks[block].index], blocks[block]);
        const int64_t some = std::clamp<int64_t>(rows - first, 0, share_rows);
        const Matrix part{source.numbers.from(first * source.row_stride), source.row_stride, source.col_stride};
        sums[i] = k.gather(part, some, cols, factor, out.from((block * rows + first) * cols));
      } else {
        const at::Tensor& x = factors[which - 1];
        const int64_t n = x.size(-1), some = std::clamp<int64_t>(n - first, 0, share_rows);
        const Matrix part{numbers_of(x).from((block * n + first) * n), n, 1};
        sums[i] = k.gather(part, some, n, 1.0f, {nullptr, Dtype::f32});
      }
    }
  });
  return {batch, squares};
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("kron_gather", &kron_gather); }

}  // namespace rootfree::cpu
