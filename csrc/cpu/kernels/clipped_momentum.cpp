// m <- alpha m + (1 - alpha) delta of a share of a block, and the norm of the new m before it is written. A share is
// the contiguous part of one block that one thread works on at a time.

#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// Write `length` elements of the new m to `buffer`, in FP32, and return `buffer`.
static float* new_momentum(const TypedPointer& m, const float* delta, int64_t start, int64_t length, float alpha,
                           float* buffer) {
  alignas(64) float copy[buffer_length];
  const float* ROOTFREE_RESTRICT old = load(m, start, length, copy);
  const float* ROOTFREE_RESTRICT x = delta + start;
  float* ROOTFREE_RESTRICT target = buffer;
  const float beta = 1 - alpha;
  for (int64_t i = 0; i < length; ++i) {
    target[i] = alpha * old[i] + beta * x[i];
  }
  return buffer;
}

// Return the sum of squares of the new m.
static float sum_of_squares(const TypedPointer& m, const float* delta, int64_t length, float alpha) {
  alignas(64) float buffer[buffer_length];
  double total = 0;
  for (int64_t start = 0; start < length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, length - start);
    Lanes sums;
    add_squares(sums, new_momentum(m, delta, start, count, alpha, buffer), count);
    total += sums.total();
  }
  return static_cast<float>(total);
}

// Return the largest absolute row sum of the new m, infinity if one is not finite. A maximum alone would drop a NaN.
static float largest_row_sum(const TypedPointer& m, const float* delta, int64_t length, int64_t cols, float alpha) {
  alignas(64) float buffer[buffer_length];
  float largest = 0;
  for (int64_t row = 0; row < length; row += cols) {
    double total = 0;
    for (int64_t start = 0; start < cols; start += buffer_length) {
      const int64_t count = minimum(buffer_length, cols - start);
      Lanes sums;
      add_magnitudes(sums, new_momentum(m, delta, row + start, count, alpha, buffer), count);
      total += sums.total();
    }
    const float sum = static_cast<float>(total);
    const float finite = is_finite(sum) ? sum : float_of(0x7F800000u);
    largest = finite > largest ? finite : largest;
  }
  return largest;
}

float share_norm(const TypedPointer& m, const float* delta, int64_t length, int64_t cols, float alpha, bool row_sum) {
  return row_sum ? largest_row_sum(m, delta, length, cols, alpha) : sum_of_squares(m, delta, length, alpha);
}

void share_momentum(const TypedPointer& m, const float* delta, int64_t length, float alpha) {
  alignas(64) float buffer[buffer_length];
  for (int64_t start = 0; start < length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, length - start);
    store(m, start, count, new_momentum(m, delta, start, count, alpha, buffer));
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
