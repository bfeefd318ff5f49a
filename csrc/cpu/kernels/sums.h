// Sums in a fixed order, whatever the instruction set and the number of threads.

#pragma once

#include "numbers.h"

namespace rootfree::cpu::ROOTFREE_ISA {

constexpr int64_t lanes = 16;  // sums that run side by side, so that they fill a register of any instruction set

struct Lanes {
  alignas(64) float sum[lanes] = {};

  float total() const {
    double total = 0;
    for (float x : sum) {
      total += x;
    }
    return static_cast<float>(total);
  }
};

static inline void add_squares(Lanes& lanes_, const float* ROOTFREE_RESTRICT x, int64_t length) {
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) {
      lanes_.sum[j] += x[i + j] * x[i + j];
    }
  }
  for (int64_t j = 0; i + j < length; ++j) {
    lanes_.sum[j] += x[i + j] * x[i + j];
  }
}

static inline void add_magnitudes(Lanes& lanes_, const float* ROOTFREE_RESTRICT x, int64_t length) {
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) {
      lanes_.sum[j] += float_of(bits_of(x[i + j]) & 0x7FFFFFFFu);
    }
  }
  for (int64_t j = 0; i + j < length; ++j) {
    lanes_.sum[j] += float_of(bits_of(x[i + j]) & 0x7FFFFFFFu);
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
