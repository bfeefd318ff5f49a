// Conversion between FP32 and BF16 in three rounding modes, and the random bits for it, on CPUs and GPUs.
//
// rootfree_kernels/rounding.py is the specification, in words and in PyTorch. Results agree with it bitwise.
// Every function works on one element without branches, so that compilers can vectorize a loop over it. Only standard
// headers are included, so that any compiler can compile this file.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define ROOTFREE_INLINE __host__ __device__ __forceinline__
#else
#define ROOTFREE_INLINE static inline  // a copy in every file, since files are compiled for different instruction sets
#endif

namespace rootfree {

// How FP32 values are rounded to a tensor's dtype. Only BF16 has modes; other dtypes are rounded to nearest.
//   stochastic   up with a probability equal to the remainder, so right on average
//   compensated  BF16 plus an int16 remainder (the "residual"): together the exact FP32 value
enum class Rounding : int { nearest = 0, stochastic = 1, compensated = 2 };

// Distinguishes what is rounded in the same step, so that each tensor draws its own random bits.
enum Slot : uint32_t { slot_factor_c = 0, slot_factor_k = 1, slot_square = 2, slot_weight = 3 };

// Return the bit pattern of x.
ROOTFREE_INLINE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// Return the FP32 value with this bit pattern.
ROOTFREE_INLINE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Return whether x is neither NaN nor infinite. It tests bits, which fast-math compiler options cannot optimize away.
ROOTFREE_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7FFFFFFFu) < 0x7F800000u; }

ROOTFREE_INLINE bool is_nan(float x) { return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// Return `yes` or `no`. On CPUs it combines bits, since compilers turn a branch into slow masked loads and stores.
ROOTFREE_INLINE float select(bool condition, float yes, float no) {
#ifdef __CUDA_ARCH__
  return condition ? yes : no;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
#endif
}

// ---- random bits ----------------------------------------------------------------------------------------------------

// Return a hash of x in which every input bit affects every output bit.
ROOTFREE_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Return the key of the random bits that one block or tensor draws in one step. `step` is the count modulo 2^32.
ROOTFREE_INLINE uint32_t random_key(int32_t seed, uint32_t step, uint32_t slot) {
  return mix(mix(static_cast<uint32_t>(seed) ^ step) + slot * 0x9E3779B9u);
}

// Return 16 random bits for the element at `index`, its row-major index in its block or tensor modulo 2^32.
ROOTFREE_INLINE uint32_t random_bits(uint32_t key, uint32_t index) { return mix(key ^ index) >> 16; }

// ---- BF16 -----------------------------------------------------------------------------------------------------------

ROOTFREE_INLINE float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Round half to even. NaN stays NaN.
ROOTFREE_INLINE uint16_t bf16_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  return static_cast<uint16_t>(is_nan(x) ? 0x7FC0u : rounded);
}

// Round a finite x up with a probability equal to the remainder. `random` has 16 bits.
ROOTFREE_INLINE uint16_t bf16_stochastic(float x, uint32_t random) {
  return static_cast<uint16_t>((bits_of(x) + random) >> 16);
}

// Return the BF16 part of a compensated pair. Ties round away from zero, so that the remainder fits 16 bits.
ROOTFREE_INLINE uint16_t compensated_high(float x) {
  return static_cast<uint16_t>(is_nan(x) ? 0x7FC0u : (bits_of(x) + 0x8000u) >> 16);
}

// Return the remainder of a compensated pair: join_compensated(compensated_high(x), compensated_low(x)) is x.
ROOTFREE_INLINE int16_t compensated_low(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t high = (bits + 0x8000u) & 0xFFFF0000u;
  return static_cast<int16_t>(static_cast<uint16_t>(bits - high));
}

// Return the FP32 value of a compensated pair. A negative remainder is dropped if the BF16 part is +-0: the pair then
// belongs to a weight that was set to zero from outside, and their sum would be the bit pattern of a NaN.
ROOTFREE_INLINE float join_compensated(uint16_t high, int16_t low) {
  const uint32_t pattern = static_cast<uint32_t>(high) << 16;
  const bool drop = ((pattern & 0x7FFFFFFFu) == 0) & (low < 0);
  return float_of(pattern + static_cast<uint32_t>(drop ? 0 : static_cast<int32_t>(low)));
}

}  // namespace rootfree
