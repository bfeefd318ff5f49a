// m <- alpha m + (1 - alpha) delta of a share of a block, and the norm of the new m before it is written.

#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

static float* new_momentum(const Numbers& m, const float* delta, int64_t start, int64_t length, float alpha,
                           float* buffer) {
  alignas(64) float copy[piece];
  const float* ROOTFREE_RESTRICT old = load(m, start, length, copy);
  const float* ROOTFREE_RESTRICT x = delta + start;
  float* ROOTFREE_RESTRICT target = buffer;
  const float beta = 1 - alpha;
  for (int64_t i = 0; i < length; ++i) {
    target[i] = alpha * old[i] + beta * x[i];
  }
  return buffer;
}

static float frobenius(const Numbers& m, const float* delta, int64_t length, float alpha) {
  alignas(64) float buffer[piece];
  double total = 0;
  for (int64_t start = 0; start < length; start += piece) {
    const int64_t some = smaller(piece, length - start);
    Lanes sums;
    add_squares(sums, new_momentum(m, delta, start, some, alpha, buffer), some);
    total += sums.total();
  }
  return static_cast<float>(total);
}

// The largest sum of a row; infinity where one is not finite, since a maximum would lose a NaN.
static float largest_row_sum(const Numbers& m, const float* delta, int64_t length, int64_t cols, float alpha) {
  alignas(64) float buffer[piece];
  float largest = 0;
  for (int64_t row = 0; row < length; row += cols) {
    double total = 0;
    for (int64_t start = 0; start < cols; start += piece) {
      const int64_t some = smaller(piece, cols - start);
      Lanes sums;
      add_magnitudes(sums, new_momentum(m, delta, row + start, some, alpha, buffer), some);
      total += sums.total();
    }
    const float sum = static_cast<float>(total);
    const float finite = is_finite(sum) ? sum : float_of(0x7F800000u);
    largest = finite > largest ? finite : largest;
  }
  return largest;
}

float share_norm(const Numbers& m, const float* delta, int64_t length, int64_t cols, float alpha, bool row_sum) {
  return row_sum ? largest_row_sum(m, delta, length, cols, alpha) : frobenius(m, delta, length, alpha);
}

void share_momentum(const Numbers& m, const float* delta, int64_t length, float alpha) {
  alignas(64) float buffer[piece];
  for (int64_t start = 0; start < length; start += piece) {
    const int64_t some = smaller(piece, length - start);
    store(m, start, some, new_momentum(m, delta, start, some, alpha, buffer));
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
