// Where the blocks of a batch lie: tiles of weights and gradients, as rootfree_kernels/blocks.py cuts them.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "tensors.h"

namespace rootfree::cpu {

// A block of tensor `index` of a list, whose upper left number is at (row, col).
struct Block {
  int64_t index, row, col;
};

// The blocks of one tile of each tensor, tile by tile and each row by row; four numbers say what a tile is.
inline std::vector<Block> blocks_of(at::IntArrayRef tiles, int64_t rows, int64_t cols) {
  std::vector<Block> blocks;
  for (size_t tile = 0; tile + 3 < tiles.size(); tile += 4) {
    const int64_t row = tiles[tile], down = tiles[tile + 1], col = tiles[tile + 2], across = tiles[tile + 3];
    for (int64_t i = 0; i < down * across; ++i) {
      blocks.push_back({static_cast<int64_t>(tile) / 4, row + i / across * rows, col + i % across * cols});
    }
  }
  return blocks;
}

// A tensor as a matrix [shape[0], rest]: one of two axes, or a contiguous one.
inline Matrix matrix_of(const at::Tensor& x) {
  const int64_t cols = x.dim() == 2 ? x.size(1) : x.numel() / std::max<int64_t>(x.size(0), 1);
  return {numbers_of(x), x.dim() == 2 ? x.stride(0) : cols, x.dim() == 2 ? x.stride(1) : 1};
}

inline std::vector<Matrix> matrices_of(at::TensorList tensors) {
  std::vector<Matrix> matrices;
  matrices.reserve(tensors.size());
  for (const at::Tensor& x : tensors) {
    matrices.push_back(matrix_of(x));
  }
  return matrices;
}

inline Matrix block_of(const Matrix& matrix, const Block& block) {
  const int64_t start = block.row * matrix.row_stride + block.col * matrix.col_stride;
  return {matrix.numbers.from(start), matrix.row_stride, matrix.col_stride};
}

}  // namespace rootfree::cpu
