// Loading elements of any dtype into FP32 buffers in the first-level cache, and storing them.
//
// The loops are plain, so that compilers vectorize them for the instruction set that a file is compiled for. That
// includes the integer arithmetic of rounding.

#pragma once

#include "../kernels.h"

#if defined(_MSC_VER)
#define ROOTFREE_RESTRICT __restrict
#else
#define ROOTFREE_RESTRICT __restrict__
#endif

// Code that is compiled for several instruction sets is static or in a namespace of its set. Otherwise the linker,
// which keeps one copy of an inline function, could choose one with instructions that the processor lacks. For the same
// reason kernels do not call inline functions of the standard library, such as std::min.
namespace rootfree::cpu::ROOTFREE_ISA {

constexpr int64_t buffer_length = 512;  // elements that are worked on at a time: 2 KiB of each tensor

static inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// Convert FP16 to FP32 by integer arithmetic, since not every instruction set has a conversion. Normal numbers are
// multiplied by 2^-112 and subnormal ones are computed by a subtraction. Both are exact.
static inline float f16_to_float(uint16_t x) {
  const uint32_t magnitude = x & 0x7FFFu;
  const float normal = float_of((magnitude << 13) + 0x70000000u) * float_of(0x07800000u);
  const float subnormal = float_of(magnitude | 0x3F000000u) - 0.5f;
  const uint32_t bits = magnitude < 0x0400u ? bits_of(subnormal) : bits_of(normal);
  return float_of(bits | static_cast<uint32_t>(x & 0x8000u) << 16);
}

// Round half to even. From 65520 on the result is infinite, and NaN stays NaN. Adding 0.5 rounds a subnormal number to
// the right bit, since 0.5 has the exponent whose unit is the smallest FP16 number.
static inline uint16_t f16_nearest(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t bits = bits_of(x) ^ sign;
  const uint32_t normal = (bits + 0x0FFFu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3F000000u;
  uint32_t half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x477FF000u ? 0x7C00u : half;
  half = bits > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(half | sign >> 16);
}

// ---- loading --------------------------------------------------------------------------------------------------------

// Return `length` <= buffer_length elements as FP32: the tensor's own memory if it is FP32, else a copy in `buffer`.
static inline float* load(const TypedPointer& x, int64_t start, int64_t length, float* buffer) {
  if (x.dtype == Dtype::f32) {
    return static_cast<float*>(x.data) + start;
  }
  const uint16_t* ROOTFREE_RESTRICT source = static_cast<const uint16_t*>(x.data) + start;
  float* ROOTFREE_RESTRICT target = buffer;
  if (x.dtype == Dtype::bf16) {
    for (int64_t i = 0; i < length; ++i) {
      target[i] = bf16_to_float(source[i]);
    }
  } else {
    for (int64_t i = 0; i < length; ++i) {
      target[i] = f16_to_float(source[i]);
    }
  }
  return buffer;
}

// Likewise, with the remainders of compensated rounding added.
static inline float* load(const Stored& x, int64_t start, int64_t length, float* buffer) {
  if (x.rounding != Rounding::compensated) {
    return load(x.value, start, length, buffer);
  }
  const uint16_t* ROOTFREE_RESTRICT high = static_cast<const uint16_t*>(x.value.data) + start;
  const int16_t* ROOTFREE_RESTRICT low = x.residual + start;
  float* ROOTFREE_RESTRICT target = buffer;
  for (int64_t i = 0; i < length; ++i) {
    target[i] = join_compensated(high[i], low[i]);
  }
  return buffer;
}

// Copy target[i * target_stride] = source[i * source_stride].
template <typename T>
static inline void copy_strided(const void* source, int64_t source_stride, void* target, int64_t target_stride,
                                int64_t length) {
  const T* from = static_cast<const T*>(source);
  T* to = static_cast<T*>(target);
  for (int64_t i = 0; i < length; ++i) {
    to[i * target_stride] = from[i * source_stride];
  }
}

// ---- storing --------------------------------------------------------------------------------------------------------

// Store elements that `load` returned and a loop has changed, rounded to nearest. FP32 elements may already be in
// place.
static inline void store(const TypedPointer& x, int64_t start, int64_t length, const float* buffer) {
  if (x.dtype == Dtype::f32) {
    float* target = static_cast<float*>(x.data) + start;
    if (target != buffer) {
      std::memcpy(target, buffer, length * sizeof(float));
    }
    return;
  }
  uint16_t* ROOTFREE_RESTRICT target = static_cast<uint16_t*>(x.data) + start;
  const float* ROOTFREE_RESTRICT source = buffer;
  if (x.dtype == Dtype::bf16) {
    for (int64_t i = 0; i < length; ++i) {
      target[i] = bf16_nearest(source[i]);
    }
  } else {
    for (int64_t i = 0; i < length; ++i) {
      target[i] = f16_nearest(source[i]);
    }
  }
}

// Store elements by the tensor's rounding mode. `index` is the first element's, for the random bits.
static inline void store(const Stored& x, int64_t start, int64_t length, uint32_t index, const float* buffer) {
  if (x.rounding == Rounding::nearest) {
    return store(x.value, start, length, buffer);
  }
  uint16_t* ROOTFREE_RESTRICT target = static_cast<uint16_t*>(x.value.data) + start;
  const float* ROOTFREE_RESTRICT source = buffer;
  if (x.rounding == Rounding::compensated) {
    int16_t* ROOTFREE_RESTRICT low = x.residual + start;
    for (int64_t i = 0; i < length; ++i) {
      target[i] = compensated_high(source[i]);
      low[i] = compensated_low(source[i]);
    }
    return;
  }
  for (int64_t i = 0; i < length; ++i) {
    target[i] = bf16_stochastic(source[i], random_bits(x.key, index + static_cast<uint32_t>(i)));
  }
}

}  // namespace rootfree::cpu::ROOTFREE_ISA
