// Sums in a fixed order, so that they do not depend on the instruction set or the number of threads.

#pragma once

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

constexpr int64_t num_lanes = 16;  // partial sums, as many as the widest register (AVX-512) has elements

// Partial sums: element i of an array is added to sum[i % num_lanes].
struct Lanes {
  alignas(64) float sum[num_lanes] = {};

  // Return the sum of the partial sums.
  float total() const {
    double total = 0;
    for (float x : sum) {
      total += x;
    }
    return static_cast<float>(total);
  }
};

// Add the squares of x to the partial sums.
static inline void add_squares(Lanes& lanes, const float* ROOTFREE_RESTRICT x, int64_t length) {
  int64_t i = 0;
  for (; i + num_lanes <= length; i += num_lanes) {
    for (int64_t j = 0; j < num_lanes; ++j) {
      lanes.sum[j] += x[i + j] * x[i + j];
    }
  }
  for (int64_t j = 0; i + j < length; ++j) {
    lanes.sum[j] += x[i + j] * x[i + j];
  }
}

// Add the absolute values of x to the partial sums.
static inline void add_magnitudes(Lanes& lanes, const float* ROOTFREE_RESTRICT x, int64_t length) {
  int64_t i = 0;
  for (; i + num_lanes <= length; i += num_lanes) {
    for (int64_t j = 0; j < num_lanes; ++j) {
      lanes.sum[j] += float_of(bits_of(x[i + j]) & 0x7FFFFFFFu);
    }
  }
  for (int64_t j = 0; i + j < length; ++j) {
    lanes.sum[j] += float_of(bits_of(x[i + j]) & 0x7FFFFFFFu);
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
