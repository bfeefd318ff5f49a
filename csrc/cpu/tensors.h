// From tensors of PyTorch to what kernels take.

#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace rootfree::cpu {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "dtype ", type, ": pass float32, bfloat16 or float16 tensors.");
  }
}

inline Numbers numbers_of(const at::Tensor& x) { return {x.mutable_data_ptr(), dtype_of(x.scalar_type())}; }

inline Numbers numbers_at(int64_t address, at::ScalarType type) {
  return {reinterpret_cast<void*>(address), dtype_of(type)};
}

inline float value_of(const std::optional<at::Tensor>& scalar, float otherwise) {
  return scalar ? scalar->item<float>() : otherwise;
}

// As in rootfree_kernels/rounding.py; only BF16 knows modes.
inline Rounding rounding_of(c10::string_view name, bool has_residual, at::ScalarType type) {
  if (type != at::kBFloat16) {
    return Rounding::nearest;
  }
  return has_residual ? Rounding::compensated : name == "stochastic" ? Rounding::stochastic : Rounding::nearest;
}

inline void check_contiguous(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " is not contiguous: pass a contiguous tensor.");
}

inline void check_contiguous(const char* name, const std::optional<at::Tensor>& x) {
  if (x) {
    check_contiguous(name, *x);
  }
}

// Sums of shares, added up in order.
inline float total_of(const float* shares, int64_t length) {
  double total = 0;
  for (int64_t i = 0; i < length; ++i) {
    total += shares[i];
  }
  return static_cast<float>(total);
}

// The random bits of blocks: `seeds` [L], int32, and `steps` [L] or one for all. Both may be anything where no bits are
// drawn.
class Draws {
 public:
  Draws(const at::Tensor& seeds, const at::Tensor& steps)
      : seeds_(seeds.contiguous()), steps_(steps.to(at::kFloat).contiguous()) {}

  uint32_t key(int64_t block, Slot slot) const {
    const float* steps = steps_.const_data_ptr<float>();
    return random_key(seeds_.const_data_ptr<int32_t>()[block], steps[steps_.numel() == 1 ? 0 : block], slot);
  }

 private:
  at::Tensor seeds_, steps_;
};

// Tell autograd that a tensor has changed.
inline void changed(const at::Tensor& x) {
  if (!x.is_inference()) {
    x.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace rootfree::cpu
