// The mean curvature q of a block, a scale for its damping and for the start of its factors:
//
//     q <- 0.95 q + 0.05 B mean(G^2),    and q = B mean(G^2) when the first gradient comes that is not 0
//
// q stays while the gradient is 0. q = 0 means that no other gradient has come yet. See
// rootfree_kernels/eager/curvature.py.

#pragma once

#include "../rounding.h"

namespace rootfree::cpu {

constexpr float curvature_step = 0.05f;  // the weight of the newest mean square in q

// q before it is stored, whether the block starts, and whether its gradient is 0.
struct Curvature {
  float value;
  bool starts, idle;
};

// Return the curvature after a gradient with B mean(G^2) = `mean_square`. Nothing starts if GradScaler found an
// `overflow`.
inline Curvature follow(float old, float mean_square, bool overflow) {
  const bool starts = old == 0 && mean_square > 0 && is_finite(mean_square) && !overflow;
  const bool idle = mean_square == 0;
  return {starts ? mean_square : idle ? old : old + curvature_step * (mean_square - old), starts, idle};
}

}  // namespace rootfree::cpu
