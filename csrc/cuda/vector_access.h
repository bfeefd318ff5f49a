// Device code that reads and writes several elements of a tensor in one access, in the dtypes of storage.
// Only .cu files include this header.

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "../rounding.h"
#include "dtypes.h"

namespace rootfree::cuda {

// The type that holds an element in memory. 16-bit floats are kept as their bit patterns.
template <Dtype DTYPE>
using Storage = std::conditional_t<DTYPE == Dtype::fp32, float, uint16_t>;

template <Dtype DTYPE>
__device__ __forceinline__ float to_float(Storage<DTYPE> x) {
  if constexpr (DTYPE == Dtype::bf16) {
    return bf16_to_float(x);
  } else if constexpr (DTYPE == Dtype::fp16) {
    return __half2float(__ushort_as_half(x));
  } else {
    return x;
  }
}

// Round half to even.
template <Dtype DTYPE>
__device__ __forceinline__ Storage<DTYPE> to_nearest(float x) {
  if constexpr (DTYPE == Dtype::bf16) {
    return bf16_nearest(x);
  } else if constexpr (DTYPE == Dtype::fp16) {
    return __half_as_ushort(__float2half_rn(x));
  } else {
    return x;
  }
}

// Bytes of the widest access. A tensor is aligned if its address is a multiple of this.
constexpr int64_t kAlignment = 16;

// N neighbouring elements of a tensor. Up to 128 bits are read or written in one access, more in several.
template <class T, int N>
struct alignas(sizeof(T) * N < kAlignment ? sizeof(T) * N : kAlignment) AlignedVector {
  T val[N];
};

// Return N elements, the first at index `offset` from an address in global memory. An address that was read from a
// table is only a number to the compiler: without the conversion it would emit generic accesses, which are slower.
template <class T, int N>
__device__ __forceinline__ AlignedVector<T, N>& vector_at(int64_t address, int64_t offset) {
  const auto first = static_cast<size_t>(address + offset * static_cast<int64_t>(sizeof(T)));
  return *static_cast<AlignedVector<T, N>*>(__cvta_global_to_generic(first));
}

// Launch `kernel` with `programs` thread blocks of `threads` threads. Without programs, launch nothing: CUDA refuses an
// empty grid.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t programs, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (programs == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(programs));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace rootfree::cuda
