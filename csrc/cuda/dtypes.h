// The dtypes of launchers, and the CUDA runtime's types for errors and streams. This header has no device code, so that
// a C++ compiler can include it.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rootfree::cuda {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

}  // namespace rootfree::cuda
