// Stored numbers as FP32 and back, on CPUs and GPUs alike: BF16 and its rounding modes, FP16, the random bits.
//
// The specification, in words and in PyTorch, is rootfree_kernels/rounding.py; results agree with it bit for bit.
// Everything here works on one number, has no branches and no headers but the standard's, so that any compiler can
// vectorise a loop over it.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define ROOTFREE_INLINE __host__ __device__ __forceinline__
#else
#define ROOTFREE_INLINE static inline  // every file its own: some are compiled for other instruction sets
#endif

namespace rootfree {

// How a tensor is stored. BF16 alone knows modes of rounding; all else is rounded to nearest.
enum class Rounding : int { nearest = 0, stochastic = 1, compensated = 2 };

enum Slot : uint32_t { slot_factor_c = 0, slot_factor_k = 1, slot_square = 2, slot_weight = 3 };

ROOTFREE_INLINE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

ROOTFREE_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Whether x is neither NaN nor infinite; by its bits, so that no compiler's option for fast arithmetic can lose it.
ROOTFREE_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7FFFFFFFu) < 0x7F800000u; }

ROOTFREE_INLINE bool is_nan(float x) { return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// `yes` or `no`. By bits: compilers vectorise a condition as loads and stores under a mask, which take longer.
ROOTFREE_INLINE float select(bool condition, float yes, float no) {
#ifdef __CUDA_ARCH__
  return condition ? yes : no;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
#endif
}

// ---- random bits ----------------------------------------------------------------------------------------------------

ROOTFREE_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The key of what is rounded in `slot` of the block or tensor of this seed at a step; `step` is a whole number.
ROOTFREE_INLINE uint32_t random_key(int32_t seed, float step, uint32_t slot) {
  const auto count = static_cast<uint32_t>(static_cast<int32_t>(step));
  return mix(mix(static_cast<uint32_t>(seed) ^ count) + slot * 0x9E3779B9u);
}

// 16 random bits for an element; `index` is its row-major index in its block or tensor, modulo 2^32.
ROOTFREE_INLINE uint32_t random_bits(uint32_t key, uint32_t index) { return mix(key ^ index) >> 16; }

// ---- BF16 -----------------------------------------------------------------------------------------------------------

ROOTFREE_INLINE float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Half to even; NaN stays NaN.
ROOTFREE_INLINE uint16_t bf16_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  return static_cast<uint16_t>(is_nan(x) ? 0x7FC0u : rounded);
}

// Of finite x: up with a probability equal to the remainder; `random` has 16 bits.
ROOTFREE_INLINE uint16_t bf16_stochastic(float x, uint32_t random) {
  return static_cast<uint16_t>((bits_of(x) + random) >> 16);
}

// The upper half of a compensated pair: ties away from zero, so that the remainder fits.
ROOTFREE_INLINE uint16_t compensated_high(float x) {
  return static_cast<uint16_t>(is_nan(x) ? 0x7FC0u : (bits_of(x) + 0x8000u) >> 16);
}

// The remainder that, with the upper half, is x bit for bit.
ROOTFREE_INLINE int16_t compensated_low(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t high = (bits + 0x8000u) & 0xFFFF0000u;
  return static_cast<int16_t>(static_cast<uint16_t>(bits - high));
}

// The FP32 value of a pair; of +-0, what is left of another value's negative remainder is dropped, since it would
// give NaN.
ROOTFREE_INLINE float join_compensated(uint16_t high, int16_t low) {
  const uint32_t pattern = static_cast<uint32_t>(high) << 16;
  const bool drop = ((pattern & 0x7FFFFFFFu) == 0) & (low < 0);
  return float_of(pattern + static_cast<uint32_t>(drop ? 0 : static_cast<int32_t>(low)));
}

}  // namespace rootfree
