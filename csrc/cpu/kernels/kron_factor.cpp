// The loops between the matrix products of a factor update: the new m and its norm, the step of the factor, and copies
// of tiles to their transposed places.

#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

using Tile = float[tile_size][tile_size];

static void transpose(const Tile& source, Tile& target) {
  for (int64_t i = 0; i < tile_size; ++i) {
    for (int64_t j = 0; j < tile_size; ++j) {
      target[j][i] = source[i][j];
    }
  }
}

// Write the upper left height x width elements of a tile to an n x n matrix. `corner` is the index of the first one.
static void store_tile(const TypedPointer& x, int64_t corner, int64_t n, int64_t height, int64_t width,
                       const Tile& tile) {
  for (int64_t i = 0; i < height; ++i) {
    store(x, corner + i * n, width, tile[i]);
  }
}

// Copy the elements below the diagonal to those above it.
static void mirror_within(Tile& tile, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = i + 1; j < size; ++j) {
      tile[i][j] = tile[j][i];
    }
  }
}

static float sum_of_squares(const Tile& tile, int64_t height, int64_t width) {
  Lanes sums;
  for (int64_t i = 0; i < height; ++i) {
    add_squares(sums, tile[i], width);
  }
  return sums.total();
}

// Write the absolute row sums of a tile to `out`.
static void absolute_row_sums(const Tile& tile, int64_t height, int64_t width, float* out) {
  for (int64_t i = 0; i < height; ++i) {
    Lanes sums;
    add_magnitudes(sums, tile[i], width);
    out[i] = sums.total();
  }
}

// Write a row of a tile of the new m to `target`, without the term of the diagonal.
static void new_row(const MomentumUpdate& u, int64_t start, int64_t width, float* ROOTFREE_RESTRICT target) {
  alignas(64) float buffers[3][tile_size];
  const float alpha = u.momentum, beta = 1 - alpha;
  const float a = u.product_factor, t = u.damping_factor;
  const float* ROOTFREE_RESTRICT product = load(u.product, start, width, buffers[0]);
  const float* ROOTFREE_RESTRICT old = load(u.old_m, start, width, buffers[1]);
  if (u.damping.data) {
    const float* ROOTFREE_RESTRICT damping = load(u.damping, start, width, buffers[2]);
    for (int64_t j = 0; j < width; ++j) {
      target[j] = alpha * old[j] + beta * (a * product[j] + t * damping[j]);
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      target[j] = alpha * old[j] + beta * (a * product[j]);
    }
  }
}

float momentum_tile(const MomentumUpdate& u, int64_t tile_row, int64_t tile_col, float* row_sums) {
  alignas(64) Tile tile, mirrored;
  const int64_t n = u.n, row = tile_row * tile_size, col = tile_col * tile_size;
  const int64_t height = minimum(tile_size, n - row), width = minimum(tile_size, n - col);
  for (int64_t i = 0; i < height; ++i) {
    new_row(u, (row + i) * n + col, width, tile[i]);
  }
  const bool diagonal = tile_row == tile_col;
  if (diagonal) {  // this tile is its own mirror image
    for (int64_t i = 0; i < height; ++i) {
      tile[i][i] -= (1 - u.momentum) * u.diagonal;
    }
    mirror_within(tile, height);
  }
  store_tile(u.new_m, row * n + col, n, height, width, tile);
  if (row_sums) {
    absolute_row_sums(tile, height, width, row_sums + tile_col * n + row);
  }
  const float squares = sum_of_squares(tile, height, width);
  if (diagonal) {
    return squares;
  }
  transpose(tile, mirrored);
  store_tile(u.new_m, col * n + row, n, width, height, mirrored);
  if (row_sums) {
    absolute_row_sums(mirrored, width, height, row_sums + tile_row * n + col);
  }
  return 2 * squares;
}

template <typename T>
static void transpose_elements(const T* source, T* target, int64_t rows, int64_t cols, int64_t row, int64_t col) {
  T tile[tile_size][tile_size];
  const int64_t height = minimum(tile_size, rows - row), width = minimum(tile_size, cols - col);
  for (int64_t i = 0; i < height; ++i) {
    std::memcpy(tile[i], source + (row + i) * cols + col, width * sizeof(T));
  }
  for (int64_t j = 0; j < width; ++j) {
    T* ROOTFREE_RESTRICT to = target + (col + j) * rows + row;
    for (int64_t i = 0; i < height; ++i) {
      to[i] = tile[i][j];
    }
  }
}

void transpose_tile(const TypedPointer& source, const TypedPointer& target, int64_t rows, int64_t cols,
                    int64_t tile_row, int64_t tile_col) {
  const int64_t row = tile_row * tile_size, col = tile_col * tile_size;
  if (source.dtype == Dtype::f32) {
    transpose_elements(static_cast<const float*>(source.data), static_cast<float*>(target.data), rows, cols, row, col);
  } else {
    transpose_elements(static_cast<const uint16_t*>(source.data), static_cast<uint16_t*>(target.data), rows, cols, row,
                       col);
  }
}

// Copy a tile in the lower triangle of a symmetric n x n matrix to its mirror image above the diagonal.
template <typename T>
static void mirror_elements(T* matrix, int64_t n, int64_t tile_row, int64_t tile_col) {
  const int64_t row = tile_row * tile_size, col = tile_col * tile_size;
  if (tile_row != tile_col) {
    return transpose_elements(matrix, matrix, n, n, row, col);
  }
  const int64_t size = minimum(tile_size, n - row);
  T* const tile = matrix + row * n + col;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = i + 1; j < size; ++j) {
      tile[i * n + j] = tile[j * n + i];
    }
  }
}

void mirror_tile(const TypedPointer& matrix, int64_t n, int64_t tile_row, int64_t tile_col) {
  if (matrix.dtype == Dtype::f32) {
    mirror_elements(static_cast<float*>(matrix.data), n, tile_row, tile_col);
  } else {
    mirror_elements(static_cast<uint16_t*>(matrix.data), n, tile_row, tile_col);
  }
}

void update_factor(const Stored& factor, const TypedPointer& product, uint32_t first, int64_t length, float scale) {
  alignas(64) float factors[buffer_length], products[buffer_length];
  for (int64_t start = 0; start < length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, length - start);
    float* ROOTFREE_RESTRICT c = load(factor, start, count, factors);
    const float* ROOTFREE_RESTRICT y = load(product, start, count, products);
    for (int64_t i = 0; i < count; ++i) {
      c[i] -= scale * y[i];
    }
    store(factor, start, count, first + static_cast<uint32_t>(start), c);
  }
}

void update_symmetric_tile(const Stored& factor, const TypedPointer& product, int64_t n, int64_t tile_row,
                           int64_t tile_col, float scale) {
  alignas(64) Tile tile, mirrored, transposed;
  alignas(64) float factors[tile_size], products[tile_size];
  const int64_t row = tile_row * tile_size, col = tile_col * tile_size;
  const int64_t height = minimum(tile_size, n - row), width = minimum(tile_size, n - col);
  for (int64_t j = 0; j < width; ++j) {
    const float* x = load(product, (col + j) * n + row, height, products);
    std::memcpy(mirrored[j], x, height * sizeof(float));
  }
  transpose(mirrored, transposed);
  for (int64_t i = 0; i < height; ++i) {
    const int64_t start = (row + i) * n + col;
    const float* ROOTFREE_RESTRICT c = load(factor, start, width, factors);
    const float* ROOTFREE_RESTRICT x = load(product, start, width, products);
    for (int64_t j = 0; j < width; ++j) {
      tile[i][j] = c[j] - scale * (x[j] + transposed[i][j]);
    }
    store(factor, start, width, static_cast<uint32_t>(start), tile[i]);
  }
  // Copy what was stored, so that both halves are rounded by the random bits of the lower one.
  mirror_tile(factor.value, n, tile_row, tile_col);
  if (factor.rounding == Rounding::compensated) {
    mirror_elements(factor.residual, n, tile_row, tile_col);
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
