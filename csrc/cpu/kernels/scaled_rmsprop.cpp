// A chunk of a tensor in the scaled diagonal step. M' is the gradient g, its average M, or Nesterov's (1 - alpha1) g +
// alpha1 M:
//
//     s <- (1 - beta2 gamma) s + beta2 B g^2,    M <- alpha1 M + (1 - alpha1) g
//     u = M' / (s + lambda)  or  M' / (sqrt(s) + sqrt(lambda)),    w <- (1 - beta1 kappa) w - beta1 u
//
// Without averages of gradients, u takes the heavy-ball step of kron_step.cpp. u is computed from s as it is stored.

#include <math.h>

#include "step_weights.h"
#include "sums.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// The new s and M, and u, of some elements.
struct Directions {
  alignas(64) float square[buffer_length], buffer[buffer_length], along[buffer_length];
};

// Replace elements by what `load` would return after they were stored. `index` is the first element's.
static void round_as_stored(const Stored& target, uint32_t index, int64_t length, float* elements) {
  if (target.value.dtype == Dtype::f32) {
    return;
  }
  uint16_t values[buffer_length];
  int16_t residuals[buffer_length];
  const Stored copy{{values, target.value.dtype}, residuals, target.rounding, target.key};
  store(copy, 0, length, index, elements);
  load(copy, 0, length, elements);
}

// Compute the new s and M, and u, of `length` <= buffer_length elements. An element of u that is not finite is 0. If
// COUNTS, return whether there is an infinite one. A NaN is 0/0, of an element without any gradient so far.
template <bool COUNTS>
static bool compute(const DiagonalChunk& p, const ScaledScalars& shared_scalars, int64_t start, int64_t length,
                    Directions& out) {
  alignas(64) float grads[buffer_length], squares[buffer_length], buffers[buffer_length];
  const ScaledScalars c = shared_scalars;  // a local copy, which no store can alias
  const float* ROOTFREE_RESTRICT g = load(p.grad, start, length, grads);
  const float* ROOTFREE_RESTRICT old_s = load(p.square, start, length, squares);
  const float* ROOTFREE_RESTRICT old_m = load(p.buffer, start, length, buffers);
  float* ROOTFREE_RESTRICT s = out.square;
  float* ROOTFREE_RESTRICT m = out.buffer;
  float* ROOTFREE_RESTRICT u = out.along;
  for (int64_t i = 0; i < length; ++i) {
    const float x = g[i] * c.grad_factor;
    s[i] = old_s[i] * c.decay + c.growth * x * x;
  }
  round_as_stored(p.square, p.first + static_cast<uint32_t>(start), length, s);
  const float alpha = c.weight.momentum, beta = 1 - alpha;
  uint32_t lost = 0;
  for (int64_t i = 0; i < length; ++i) {
    const float x = g[i] * c.grad_factor;
    const float average = alpha * old_m[i] + beta * x;
    const float ahead = select(c.nesterov, beta * x + alpha * average, average);
    const float root = select(c.whitened, sqrtf(s[i]), s[i]);
    const float along = select(c.weight.averages, ahead, x) / (root + c.damping);
    m[i] = select(c.weight.averages, average, old_m[i]);
    u[i] = select(is_finite(along), along, 0.0f);
    if (COUNTS) {
      lost |= (bits_of(along) & 0x7FFFFFFFu) == 0x7F800000u ? 1u : 0u;
    }
  }
  return lost != 0;
}

double gradient_squares(const DiagonalChunk& p, float factor) {
  alignas(64) float grads[buffer_length], scaled[buffer_length];
  double total = 0;
  for (int64_t start = 0; start < p.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, p.length - start);
    const float* ROOTFREE_RESTRICT g = load(p.grad, start, count, grads);
    for (int64_t i = 0; i < count; ++i) {
      scaled[i] = g[i] * factor;
    }
    Lanes sums;
    add_squares(sums, scaled, count);
    total += sums.total();
  }
  return total;
}

double scaled_squares(const DiagonalChunk& p, const ScaledScalars& scalars) {
  Directions x;
  double total = 0;
  for (int64_t start = 0; start < p.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, p.length - start);
    compute<false>(p, scalars, start, count, x);
    Lanes sums;
    add_squares(sums, x.along, count);
    total += sums.total();
  }
  return total;
}

// Gradients are below 2e19, the root of the largest FP32 number, since the sum of their squares is finite. Divided by
// this or more, neither they nor their averages overflow, and nothing has to be looked for.
constexpr float safe_damping = 1e-18f;

bool scaled_rmsprop(const DiagonalChunk& p, const ScaledScalars& scalars) {
  const auto compute_all = scalars.damping >= safe_damping ? compute<false> : compute<true>;
  alignas(64) float params[buffer_length];
  bool lost = false;
  Directions x;
  for (int64_t start = 0; start < p.length; start += buffer_length) {
    const int64_t count = minimum(buffer_length, p.length - start);
    const uint32_t index = p.first + static_cast<uint32_t>(start);
    lost |= compute_all(p, scalars, start, count, x);
    float* weights = load(p.param, start, count, params);
    step_weights(weights, x.buffer, x.along, count, scalars.scale, scalars.weight);
    store(p.square, start, count, index, x.square);
    store(p.buffer, start, count, x.buffer);
    store(p.param, start, count, index, weights);
  }
  return lost;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
