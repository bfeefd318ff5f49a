// The diagonal step of a piece of a tensor: see csrc/rf_rmsprop.h.
//
// The usual kinds of storage have a loop of their own, from memory to memory. All others go through FP32 in the cache,
// which takes more instructions and gives the same bits.

#include "numbers.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// ---- loops from memory to memory ------------------------------------------------------------------------------------

struct F32 {
  float* ROOTFREE_RESTRICT data;

  explicit F32(const Numbers& x) : data(static_cast<float*>(x.data)) {}
  explicit F32(const Stored& x) : F32(x.value) {}

  float load(int64_t i) const { return data[i]; }
  void store(int64_t i, uint32_t, float x) const { data[i] = x; }
};

struct BF16 {
  uint16_t* ROOTFREE_RESTRICT data;

  explicit BF16(const Numbers& x) : data(static_cast<uint16_t*>(x.data)) {}
  explicit BF16(const Stored& x) : BF16(x.value) {}

  float load(int64_t i) const { return bf16_to_float(data[i]); }
  void store(int64_t i, uint32_t, float x) const { data[i] = bf16_nearest(x); }
};

struct Stochastic : BF16 {
  uint32_t key;

  explicit Stochastic(const Stored& x) : BF16(x.value), key(x.key) {}

  void store(int64_t i, uint32_t index, float x) const { data[i] = bf16_stochastic(x, random_bits(key, index)); }
};

struct Compensated : BF16 {
  int16_t* ROOTFREE_RESTRICT low;

  explicit Compensated(const Stored& x) : BF16(x.value), low(x.residual) {}

  float load(int64_t i) const { return join_compensated(data[i], low[i]); }
  void store(int64_t i, uint32_t, float x) const {
    data[i] = compensated_high(x);
    low[i] = compensated_low(x);
  }
};

template <class Param, class Square, class Buffer, class Grad>
static bool step(const DiagonalPiece& p, const DiagonalNumbers& shared) {
  const Param params(p.param);
  const Square squares(p.square);
  const Buffer buffers(p.buffer);
  const Grad grads(p.grad);
  const DiagonalNumbers numbers = shared;
  const uint32_t first = p.first;
  uint32_t left_out = 0;
  for (int64_t i = 0; i < p.length; ++i) {
    bool keep;
    const DiagonalValues old{squares.load(i), buffers.load(i), params.load(i)};
    const DiagonalValues x = diagonal_step(grads.load(i), old, numbers, keep);
    const uint32_t index = first + static_cast<uint32_t>(i);
    squares.store(i, index, x.square);
    buffers.store(i, index, x.buffer);
    params.store(i, index, x.weight);
    left_out |= keep ? 0u : 1u;
  }
  return left_out != 0;
}

template <class Param, class Grad>
static bool step(const DiagonalPiece& p, const DiagonalNumbers& numbers) {
  if (p.square.value.dtype == Dtype::f32) {
    return step<Param, F32, F32, Grad>(p, numbers);
  }
  switch (p.square.rounding) {
    case Rounding::stochastic:
      return step<Param, Stochastic, BF16, Grad>(p, numbers);
    case Rounding::compensated:
      return step<Param, Compensated, BF16, Grad>(p, numbers);
    default:
      return step<Param, BF16, BF16, Grad>(p, numbers);
  }
}

// ---- loops over pieces in the cache ---------------------------------------------------------------------------------

static bool step_pieces(const DiagonalPiece& p, const DiagonalNumbers& numbers) {
  alignas(64) float grads[piece], squares[piece], buffers[piece], params[piece];
  uint32_t left_out = 0;
  for (int64_t start = 0; start < p.length; start += piece) {
    const int64_t length = smaller(piece, p.length - start);
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

bool rf_rmsprop(const DiagonalPiece& p, const DiagonalNumbers& numbers) {
  const Dtype param = p.param.value.dtype, grad = p.grad.dtype;
  const bool is_usual = p.square.value.dtype == p.buffer.dtype && param == grad && param != Dtype::f16;
  if (!is_usual) {
    return step_pieces(p, numbers);
  }
  if (param == Dtype::f32) {
    return step<F32, F32>(p, numbers);
  }
  switch (p.param.rounding) {
    case Rounding::stochastic:
      return step<Stochastic, BF16>(p, numbers);
    case Rounding::compensated:
      return step<Compensated, BF16>(p, numbers);
    default:
      return step<BF16, BF16>(p, numbers);
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
