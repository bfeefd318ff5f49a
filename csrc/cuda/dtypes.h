// What a launcher's header needs: dtypes, and the CUDA runtime's names for errors and streams. No device code.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rootfree::cuda {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

}  // namespace rootfree::cuda
