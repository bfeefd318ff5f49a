// The arguments of kron_factor: C and K of a batch with the state that belongs to them, and its options.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

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

// The options of the operator, in FP32. `clips` and `row_sum` say which norm clips m, `overflow` skips every block.
struct FactorOptions {
  float batch_size, beta2, riemannian_momentum, damping, gamma;
  bool clips, row_sum, overflow;
  c10::string_view rounding;
  bool whitened, relative_damping, starts_from_gradient;
};

// What the blocks of a batch have besides their tensors, and the operator's result.
struct BatchValues {
  std::vector<float> squares_c, squares_k;  // squared norms of C and K
  std::vector<float> dampings;              // lambda, or lambda q for relative damping
  std::vector<Curvature> curvatures;
  bool* ok;
};

// Return what the blocks have besides their tensors. Start C and K of blocks whose first gradient has come.
BatchValues start_blocks(const FactorState& c, const FactorState& k,
                         const std::optional<at::Tensor>& curvature,  // q [L]
                         const at::Tensor& squares,                   // [1 or 3, L, shares], of G, and of C and K
                         const FactorOptions& o);

// Store q of the blocks that were updated. Blocks whose gradient is 0 stay as they are, and are ok.
void store_curvatures(const std::optional<at::Tensor>& curvature, const BatchValues& values);

}  // namespace rootfree::cpu
