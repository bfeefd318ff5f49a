// The step of weights along a direction u, with or without heavy-ball momentum:
//
//     m <- alpha1 m + u + kappa w,    w <- w - beta1 m                    (L2 decay)
//     m <- alpha1 m + u,              w <- (1 - beta1 kappa) w - beta1 m  (decoupled)
//                                     w <- (1 - beta1 kappa) w - beta1 u  (the momentum averages gradients)

#pragma once

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

static inline uint32_t larger_magnitude(uint32_t pattern, float x) {
  const uint32_t other = bits_of(x) & 0x7FFFFFFFu;
  return pattern > other ? pattern : other;
}

// Step contiguous elements along scale * u, where elements of u that are not finite count as 0. Return whether there are
// any. m is not touched if the momentum averages gradients.
static inline bool step_weights(float* ROOTFREE_RESTRICT w, float* ROOTFREE_RESTRICT m,
                                const float* ROOTFREE_RESTRICT u, int64_t length, float scale,
                                const WeightScalars& scalars) {
  uint32_t worst = 0;  // the largest magnitude of u as a bit pattern: NaN and infinities are the largest
  // A coefficient of 0 is tested for, because 0 times an infinite weight is NaN.
  if (scalars.averages) {
    for (int64_t i = 0; i < length; ++i) {
      worst = larger_magnitude(worst, u[i]);
      const float along = scale * (is_finite(u[i]) ? u[i] : 0.0f);
      const float shrunk = scalars.shrinkage != 0 ? scalars.shrinkage * w[i] : 0.0f;
      w[i] = w[i] - shrunk - scalars.lr * along;
    }
    return worst >= 0x7F800000u;
  }
  for (int64_t i = 0; i < length; ++i) {
    worst = larger_magnitude(worst, u[i]);
    const float along = scale * (is_finite(u[i]) ? u[i] : 0.0f);
    const float l2 = scalars.weight_decay != 0 ? scalars.weight_decay * w[i] : 0.0f;
    const float shrunk = scalars.shrinkage != 0 ? scalars.shrinkage * w[i] : 0.0f;
    m[i] = scalars.momentum * m[i] + along + l2;
    w[i] = w[i] - shrunk - scalars.lr * m[i];
  }
  return worst >= 0x7F800000u;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
