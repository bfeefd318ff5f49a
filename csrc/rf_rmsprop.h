// The RF-RMSProp update of one element, shared by the CPU and CUDA kernels (Lin et al., ICML 2024, Fig. 4 and 6):
//
//     s <- (1 - beta2 gamma) s + beta2 B g^2,    m <- alpha1 m + g / (s + lambda) + kappa mu,    mu <- mu - beta1 m
//
// s accumulates the squared gradient g, m is the momentum buffer, mu the weight. There is no square root.

#pragma once

#include "rounding.h"

namespace rootfree {

// Scalars that all elements of a tensor share.
struct DiagonalScalars {
  float grad_factor;   // sign / grad_scale; NaN if GradScaler found an overflow, so that no element changes
  float lr;            // beta1
  float decay;         // 1 - beta2 gamma
  float growth;        // beta2 B
  float momentum;      // alpha1
  float damping;       // lambda
  float weight_decay;  // kappa, or 0 if weight decay is decoupled
  float shrinkage;     // beta1 kappa if weight decay is decoupled, else 0
};

// The state of one element: s, m and mu.
struct DiagonalValues {
  float square, buffer, weight;
};

// Return the new values. If s or g / (s + lambda) would not be finite, set `keep` to false and return the old values.
ROOTFREE_INLINE DiagonalValues diagonal_step(float grad, DiagonalValues old, const DiagonalScalars& scalars,
                                             bool& keep) {
  const float g = grad * scalars.grad_factor;
  const float square = old.square * scalars.decay + scalars.growth * g * g;
  const float direction = g / (square + scalars.damping);
  keep = is_finite(square + direction);
  // A coefficient of 0 is tested for, because 0 times an infinite weight is NaN.
  const float l2 = scalars.weight_decay != 0 ? scalars.weight_decay * old.weight : 0.0f;
  const float shrunk = scalars.shrinkage != 0 ? scalars.shrinkage * old.weight : 0.0f;
  const float buffer = scalars.momentum * old.buffer + direction + l2;
  const float weight = old.weight - shrunk - scalars.lr * buffer;
  return {select(keep, square, old.square), select(keep, buffer, old.buffer), select(keep, weight, old.weight)};
}

}  // namespace rootfree
