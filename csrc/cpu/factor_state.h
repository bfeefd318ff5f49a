// C (or K) of the blocks of a batch with the state that belongs to it, as kron_factor updates it.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "curvature.h"
#include "tensors.h"

namespace rootfree::cpu {

// C (or K) of some blocks and the state that belongs to it.
struct FactorState {
  at::Tensor factor;                   // [L, n, n]
  at::Tensor momentum;                 // [L, n, n], or packed (packing.h)
  std::optional<at::Tensor> residual;  // int16 [L, n, n], for compensated rounding
  std::optional<at::Tensor> product;   // P_C [L, n, n], a cache that is written if it is there
  Slot slot;

  // Return the state of `length` blocks.
  FactorState narrow(int64_t first, int64_t length) const {
    const auto part = [&](const std::optional<at::Tensor>& x) {
      return x ? std::optional<at::Tensor>(x->narrow(0, first, length)) : x;
    };
    return {factor.narrow(0, first, length), momentum.narrow(0, first, length), part(residual), part(product), slot};
  }
};

// The factors of some blocks as kernels read and write them. `first_block` is the index of the first in its batch.
class StoredFactors {
 public:
  StoredFactors(const FactorState& state, const Draws& draws, int64_t first_block, c10::string_view rounding)
      : values_(pointer_to(state.factor)),
        residuals_(state.residual ? state.residual->mutable_data_ptr<int16_t>() : nullptr),
        mode_(rounding_of(rounding, state.residual.has_value(), state.factor.scalar_type())),
        slot_(state.slot),
        size_(state.factor.size(-1) * state.factor.size(-1)),
        first_block_(first_block),
        draws_(draws) {}

  // Return the elements of a block from index `first` on.
  Stored at(int64_t block, int64_t first) const {
    const int64_t start = block * size_ + first;
    const uint32_t key = mode_ == Rounding::stochastic ? draws_.key(first_block_ + block, slot_) : 0;
    return {values_.offset(start), residuals_ ? residuals_ + start : nullptr, mode_, key};
  }

 private:
  TypedPointer values_;
  int16_t* residuals_;
  Rounding mode_;
  Slot slot_;
  int64_t size_, first_block_;
  const Draws& draws_;
};

// Set C of a block to value * I, rounded to nearest, and return its squared norm. A compensated pair is exact.
inline float start_factor(const FactorState& state, int64_t block, float value) {
  const int64_t n = state.factor.size(-1), start = block * n * n;
  const TypedPointer matrix = pointer_to(state.factor).offset(start);
  int16_t* residual = state.residual ? state.residual->mutable_data_ptr<int16_t>() + start : nullptr;
  std::memset(matrix.data, 0, n * n * state.factor.element_size());
  if (residual) {
    std::memset(residual, 0, n * n * sizeof(int16_t));
  }
  const uint16_t narrow = residual ? compensated_high(value) : bf16_nearest(value);
  for (int64_t i = 0; i < n * n; i += n + 1) {
    if (matrix.dtype == Dtype::f32) {
      static_cast<float*>(matrix.data)[i] = value;
    } else {
      static_cast<uint16_t*>(matrix.data)[i] = narrow;
    }
    if (residual) {
      residual[i] = compensated_low(value);
    }
  }
  const float stored = matrix.dtype == Dtype::f32 ? value : bf16_to_float(narrow);
  return static_cast<float>(n) * stored * stored;
}

}  // namespace rootfree::cpu
