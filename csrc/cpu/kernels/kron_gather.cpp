// Copy a block of a gradient, of any strides, to a contiguous matrix, and compute the sum of its squares.

#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// Return `length` <= buffer_length elements of a row as FP32: the matrix's own memory if possible, else `buffer`.
static const float* load_row(const Matrix& matrix, int64_t start, int64_t length, float* buffer) {
  if (matrix.col_stride == 1) {
    return load(matrix.elements, start, length, buffer);
  }
  const TypedPointer there = matrix.elements.offset(start);
  if (there.dtype == Dtype::f32) {
    copy_strided<float>(there.data, matrix.col_stride, buffer, 1, length);
    return buffer;
  }
  uint16_t packed[buffer_length];
  copy_strided<uint16_t>(there.data, matrix.col_stride, packed, 1, length);
  return load(TypedPointer{packed, there.dtype}, 0, length, buffer);
}

float gather(const Matrix& matrix, int64_t rows, int64_t cols, float factor, const TypedPointer& out) {
  alignas(64) float copy[buffer_length], scaled[buffer_length];
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; col += buffer_length) {
      const int64_t length = minimum(buffer_length, cols - col);
      const float* x = load_row(matrix, row * matrix.row_stride + col * matrix.col_stride, length, copy);
      if (out.data) {
        for (int64_t i = 0; i < length; ++i) {
          scaled[i] = x[i] * factor;
        }
        store(out, row * cols + col, length, scaled);
        // Sum up the rounded elements: read back what was stored.
        x = load(out, row * cols + col, length, scaled);
      }
      Lanes sums;
      add_squares(sums, x, length);
      total += sums.total();
    }
  }
  return static_cast<float>(total);
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
