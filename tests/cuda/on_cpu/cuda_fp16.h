// CUDA on the CPU: FP16 as FP32 and back, rounded half to even.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  uint32_t pattern = (x.bits & 0x7FFFu) << 13;
  if (pattern >= 0x7C00u << 13) pattern |= 0x7F800000u;
  float magnitude;
  std::memcpy(&magnitude, &pattern, sizeof magnitude);
  magnitude *= pattern < 0x7F800000u ? 0x1p112f : 1.0f;  // the difference of the exponents' biases
  return x.bits & 0x8000u ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000u : 0u);
  const float magnitude = std::fabs(x);
  uint32_t bits;
  if (std::isnan(x)) {
    bits = 0x7FFFu;
  } else if (magnitude >= 65520.0f) {
    bits = 0x7C00u;
  } else if (magnitude < 0x1p-14f) {  // subnormal: whole multiples of 2^-24
    bits = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits = (bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}
