// The diagonal step of one number, on CPUs and GPUs alike (Lin et al., ICML 2024, Fig. 4 and 6):
//
//     s <- (1 - beta2 gamma) s + beta2 B g^2,    m <- alpha1 m + g / (s + lambda) + kappa mu,    mu <- mu - beta1 m

#pragma once

#include "rounding.h"

namespace rootfree {

// What is the same for every number of a tensor.
struct DiagonalNumbers {
  float grad_factor;   // sign / grad_scale; NaN where GradScaler found an overflow, so that no number steps
  float lr;            // beta1
  float decay;         // 1 - beta2 gamma
  float growth;        // beta2 B
  float momentum;      // alpha1
  float damping;       // lambda
  float weight_decay;  // kappa, 0 where it is decoupled
  float shrinkage;     // beta1 kappa where it is decoupled, else 0
};

struct DiagonalValues {
  float square, buffer, weight;
};

// The new values; the old ones, and keep = false, where s or g / (s + lambda) would not be finite.
ROOTFREE_INLINE DiagonalValues diagonal_step(float grad, DiagonalValues old, const DiagonalNumbers& n, bool& keep) {
  const float g = grad * n.grad_factor;
  const float square = old.square * n.decay + n.growth * g * g;
  const float direction = g / (square + n.damping);
  keep = is_finite(square + direction);
  // A decay of 0 times a weight that is not finite would be NaN.
  const float l2 = n.weight_decay != 0 ? n.weight_decay * old.weight : 0.0f;
  const float shrunk = n.shrinkage != 0 ? n.shrinkage * old.weight : 0.0f;
  const float buffer = n.momentum * old.buffer + direction + l2;
  const float weight = old.weight - shrunk - n.lr * buffer;
  return {select(keep, square, old.square), select(keep, buffer, old.buffer), select(keep, weight, old.weight)};
}

}  // namespace rootfree
