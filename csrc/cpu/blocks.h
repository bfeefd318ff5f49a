// Where the blocks of a batch are: rootfree_kernels/blocks.py cuts weights and gradients into tiles of equal blocks.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "tensors.h"

namespace rootfree::cpu {

// A block of tensor `index` of a list. Its upper left element is at (row, col).
struct Block {
  int64_t index, row, col;
};

// Return the blocks of one tile of each tensor: tile by tile, and row by row within a tile. `tiles` has four integers
// for each tensor: first row, blocks down, first column, blocks across.
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

// View a tensor as a matrix [shape[0], rest]. It must have two axes or be contiguous.
inline Matrix matrix_of(const at::Tensor& x) {
  const int64_t cols = x.dim() == 2 ? x.size(1) : x.numel() / std::max<int64_t>(x.size(0), 1);
  return {pointer_to(x), x.dim() == 2 ? x.stride(0) : cols, x.dim() == 2 ? x.stride(1) : 1};
}

// View every tensor as a matrix.
inline std::vector<Matrix> matrices_of(at::TensorList tensors) {
  std::vector<Matrix> matrices;
  matrices.reserve(tensors.size());
  for (const at::Tensor& x : tensors) {
    matrices.push_back(matrix_of(x));
  }
  return matrices;
}

// Return the part of a matrix that begins at the block's upper left element.
inline Matrix block_of(const Matrix& matrix, const Block& block) {
  const int64_t start = block.row * matrix.row_stride + block.col * matrix.col_stride;
  return {matrix.elements.offset(start), matrix.row_stride, matrix.col_stride};
}

}  // namespace rootfree::cpu
