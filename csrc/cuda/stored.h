// Numbers as they lie in a GPU's memory: their dtypes, and several of them in one access. Kernels alone include this.

#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "../rounding.h"
#include "dtypes.h"

namespace rootfree::cuda {

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

// What an aligned tensor begins at: an access has 128 bits at most.
constexpr int64_t kAlignment = 16;

// N numbers of a tensor. They are one access, or, of more than 128 bits, several.
template <class T, int N>
struct alignas(sizeof(T) * N < kAlignment ? sizeof(T) * N : kAlignment) Pack {
  T at[N];
};

// The `offset`-th and the following N - 1 numbers at an address of global memory. Of an address out of a table the
// compiler does not know what memory it is of, and would make generic accesses, which are slower.
template <class T, int N>
__device__ __forceinline__ Pack<T, N>& pack_at(int64_t address, int64_t offset) {
  const auto first = static_cast<size_t>(address + offset * static_cast<int64_t>(sizeof(T)));
  return *static_cast<Pack<T, N>*>(__cvta_global_to_generic(first));
}

// Launch `kernel` on `programs` blocks of `threads` threads; nothing where there are none.
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
