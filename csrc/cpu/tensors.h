// Conversion of PyTorch's tensors and options to the arguments of kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "kernels.h"

namespace rootfree::cpu {

// Return the kernels' name of a dtype. Raise if they do not support it.
inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_VALUE(false, "there is no kernel for dtype ", type, ": pass float32, bfloat16 or float16 tensors.");
  }
}

// Return a tensor's address and dtype.
inline TypedPointer pointer_to(const at::Tensor& x) { return {x.mutable_data_ptr(), dtype_of(x.scalar_type())}; }

// Return a pointer to elements of `type` at an address that was read from a table.
inline TypedPointer pointer_at(int64_t address, at::ScalarType type) {
  return {reinterpret_cast<void*>(address), dtype_of(type)};
}

// Return the value of a one-element tensor, or `otherwise` if there is none.
inline float item_or(const std::optional<at::Tensor>& scalar, float otherwise) {
  return scalar ? scalar->item<float>() : otherwise;
}

// Return the rounding mode of a tensor (rootfree_kernels/rounding.py). A residual makes it compensated, whatever `name`
// says. Only BF16 has modes.
inline Rounding rounding_of(c10::string_view name, bool has_residual, at::ScalarType type) {
  if (type != at::kBFloat16) {
    return Rounding::nearest;
  }
  return has_residual ? Rounding::compensated : name == "stochastic" ? Rounding::stochastic : Rounding::nearest;
}

// Return the scalars of a step of weights. Decay is always decoupled if the momentum averages gradients.
inline WeightScalars weight_scalars(float lr, double momentum, double weight_decay, bool decoupled,
                                    c10::string_view momentum_on) {
  const bool averages = momentum_on == "gradient", shrinks = averages || decoupled;
  const auto decay = static_cast<float>(weight_decay);
  return {lr, static_cast<float>(momentum), shrinks ? 0 : decay, shrinks ? lr * decay : 0, averages};
}

// Return the factor that scales an update, whose sum of squares is given, to a norm; 0 if the update is 0.
inline float scale_to_norm(float norm, double squares) {
  return squares > 0 ? static_cast<float>(norm / std::sqrt(squares)) : 0.0f;
}

// Raise unless the tensor is contiguous.
inline void check_contiguous(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " is not contiguous: pass a contiguous tensor.");
}

inline void check_contiguous(const char* name, const std::optional<at::Tensor>& x) {
  if (x) {
    check_contiguous(name, *x);
  }
}

// Return the sum of partial sums. They are added in FP64 and in order, so that the result is reproducible.
inline float sum_of(const float* partial_sums, int64_t length) {
  double total = 0;
  for (int64_t i = 0; i < length; ++i) {
    total += partial_sums[i];
  }
  return static_cast<float>(total);
}

// The keys of the random bits of L blocks or tensors. Both tensors may hold anything if no bits are drawn.
class Draws {
 public:
  Draws(const at::Tensor& seeds,  // int32 [L]
        const at::Tensor& steps)  // [L], or one element for all: whole numbers of any dtype
      : seeds_(seeds.contiguous()), steps_(steps.to(at::kLong).contiguous()) {}

  uint32_t key(int64_t block, Slot slot) const {
    const int64_t step = steps_.const_data_ptr<int64_t>()[steps_.numel() == 1 ? 0 : block];
    return random_key(seeds_.const_data_ptr<int32_t>()[block], static_cast<uint32_t>(step), slot);
  }

 private:
  at::Tensor seeds_, steps_;
};

// Tell autograd that a tensor has changed. Inference tensors have no version counter.
inline void bump_version(const at::Tensor& x) {
  if (!x.is_inference()) {
    x.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace rootfree::cpu
