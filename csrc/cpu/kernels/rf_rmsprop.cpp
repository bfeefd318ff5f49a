// Step a chunk of a tensor: csrc/rf_rmsprop.h has the formula for one element.
//
// The usual combinations of dtypes and rounding modes have loops of their own, which convert elements in registers. All
// others go through FP32 buffers in the cache, which takes more instructions and returns the same bits.

#include "load_store.h"

namespace rootfree::cpu::ROOTFREE_ISA {

// ---- loops that convert in registers --------------------------------------------------------------------------------

// Accessors: one type for each way of storing a tensor, so that the loop is compiled without a branch on the dtype.

struct F32 {
  float* ROOTFREE_RESTRICT data;

  explicit F32(const TypedPointer& x) : data(static_cast<float*>(x.data)) {}
  explicit F32(const Stored& x) : F32(x.value) {}

  float load(int64_t i) const { return data[i]; }
  void store(int64_t i, uint32_t, float x) const { data[i] = x; }
};

struct BF16 {
  uint16_t* ROOTFREE_RESTRICT data;

  explicit BF16(const TypedPointer& x) : data(static_cast<uint16_t*>(x.data)) {}
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

// Step a chunk whose tensors have these accessors. Return whether an element was skipped.
template <class Param, class Square, class Buffer, class Grad>
static bool step(const DiagonalChunk& p, const DiagonalScalars& shared_scalars) {
  const Param params(p.param);
  const Square squares(p.square);
  const Buffer buffers(p.buffer);
  const Grad grads(p.grad);
  const DiagonalScalars scalars = shared_scalars;  // a local copy, which no store can alias
  const uint32_t first = p.first;
  uint32_t skipped_any = 0;
  for (int64_t i = 0; i < p.length; ++i) {
    bool keep;
    const DiagonalValues old{squares.load(i), buffers.load(i), params.load(i)};
    const DiagonalValues x = diagonal_step(grads.load(i), old, scalars, keep);
    const uint32_t index = first + static_cast<uint32_t>(i);
    squares.store(i, index, x.square);
    buffers.store(i, index, x.buffer);
    params.store(i, index, x.weight);
    skipped_any |= keep ? 0u : 1u;
  }
  return skipped_any != 0;
}

// Choose the accessors of s and m.
template <class Param, class Grad>
static bool step(const DiagonalChunk& p, const DiagonalScalars& scalars) {
  if (p.square.value.dtype == Dtype::f32) {
    return step<Param, F32, F32, Grad>(p, scalars);
  }
  switch (p.square.rounding) {
    case Rounding::stochastic:
      return step<Param, Stochastic, BF16, Grad>(p, scalars);
    case Rounding::compensated:
      return step<Param, Compensated, BF16, Grad>(p, scalars);
    default:
      return step<Param, BF16, BF16, Grad>(p, scalars);
  }
}

// ---- loops over buffers in the cache --------------------------------------------------------------------------------

// Step a chunk of any dtypes and rounding modes. Return whether an element was skipped.
static bool step_buffered(const DiagonalChunk& p, const DiagonalScalars& scalars) {
  alignas(64) float grads[buffer_length], squares[buffer_length], buffers[buffer_length], params[buffer_length];
  uint32_t skipped_any = 0;
  for (int64_t start = 0; start < p.length; start += buffer_length) {
    const int64_t length = minimum(buffer_length, p.length - start);
    const float* ROOTFREE_RESTRICT g = load(p.grad, start, length, grads);
    float* ROOTFREE_RESTRICT s = load(p.square, start, length, squares);
    float* ROOTFREE_RESTRICT m = load(p.buffer, start, length, buffers);
    float* ROOTFREE_RESTRICT w = load(p.param, start, length, params);
    for (int64_t i = 0; i < length; ++i) {
      bool keep;
      const DiagonalValues x = diagonal_step(g[i], {s[i], m[i], w[i]}, scalars, keep);
      s[i] = x.square;
      m[i] = x.buffer;
      w[i] = x.weight;
      skipped_any |= keep ? 0u : 1u;
    }
    const uint32_t index = p.first + static_cast<uint32_t>(start);
    store(p.square, start, length, index, s);
    store(p.buffer, start, length, m);
    store(p.param, start, length, index, w);
  }
  return skipped_any != 0;
}

bool rf_rmsprop(const DiagonalChunk& p, const DiagonalScalars& scalars) {
  const Dtype param = p.param.value.dtype, grad = p.grad.dtype;
  const bool is_usual = p.square.value.dtype == p.buffer.dtype && param == grad && param != Dtype::f16;
  if (!is_usual) {
    return step_buffered(p, scalars);
  }
  if (param == Dtype::f32) {
    return step<F32, F32>(p, scalars);
  }
  switch (p.param.rounding) {
    case Rounding::stochastic:
      return step<Stochastic, BF16>(p, scalars);
    case Rounding::compensated:
      return step<Compensated, BF16>(p, scalars);
    default:
      return step<BF16, BF16>(p, scalars);
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
