// The diagonal step of a piece of a tensor: see csrc/rf_rmsprop.h.

#include "numbers.h"

namespace rootfree::cpu::ROOTFREE_ISA {

static bool is_all_f32(const DiagonalPiece& p) {
  return p.grad.dtype == Dtype::f32 && p.square.value.dtype == Dtype::f32 && p.buffer.dtype == Dtype::f32 &&
         p.param.value.dtype == Dtype::f32;
}

bool rf_rmsprop(const DiagonalPiece& p, const DiagonalNumbers& numbers) {
  alignas(64) float grads[piece], squares[piece], buffers[piece], params[piece];
  uint32_t left_out = 0;
  const int64_t step = is_all_f32(p) ? p.length : piece;  // in place, nothing has to fit a cache
  for (int64_t start = 0; start < p.length; start += step) {
    const int64_t length = smaller(step, p.length - start);
    const float* ROOTFREE_RESTRICT g = load(p.grad, start, length, grads);
    float* ROOTFREE_RESTRICT s = load(p.square, start, length, squares);
    float* ROOTFREE_RESTRICT m = load(p.buffer, start, length, buffers);
    float* ROOTFREE_RESTRICT w = load(p.param, start, length, params);
    for (int64_t i = 0; i < length; ++i) {
      bool keep;
      const DiagonalValues x = diagonal_step(g[i], {s[i], m[i], w[i]}, numbers, keep);
      s[i] = x.square;
      m[i] = x.buffer;
      w[i] = x.weight;
      left_out |= keep ? 0u : 1u;
    }
    const uint32_t index = p.first + static_cast<uint32_t>(start);
    store(p.square, start, length, index, s);
    store(p.buffer, start, length, m);
    store(p.param, start, length, index, w);
  }
  return left_out != 0;
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
