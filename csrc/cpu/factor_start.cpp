// The start of a batch of factors, and the mean curvature q of its blocks (curvature.h): with factor_init = "gradient",
// C = K = (q (1 + lambda))^(-1/4) I when the first gradient comes that is not 0.

#include <cmath>
#include <cstring>

#include "factor_state.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Set C of a block to value * I, rounded to nearest, and return its squared norm. A compensated pair is exact.
float start_factor(const FactorState& state, int64_t block, float value) {
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

// Return the sums [L] of partial sums [L, shares].
std::vector<float> sum_rows(const at::Tensor& partial_sums) {
  std::vector<float> sums;
  const int64_t shares = partial_sums.size(1);
  for (int64_t block = 0; block < partial_sums.size(0); ++block) {
    sums.push_back(sum_of(partial_sums.const_data_ptr<float>() + block * shares, shares));
  }
  return sums;
}

// Return the curvatures [L] after a gradient. Without `old` ones no block starts or is idle.
std::vector<Curvature> follow_all(const OptionalTensor& old,          // [L]
                                  const std::vector<float>& squares,  // [L], sums of squares of G
                                  int64_t numel, const FactorOptions& o) {
  std::vector<Curvature> curvatures(squares.size());
  for (size_t block = 0; old && block < squares.size(); ++block) {
    const float mean_square = squares[block] * (o.batch_size / static_cast<float>(numel));
    curvatures[block] = follow(old->const_data_ptr<float>()[block], mean_square, o.overflow);
  }
  return curvatures;
}

}  // namespace

BatchValues start_blocks(const FactorState& c, const FactorState& k, const OptionalTensor& curvature,
                         const at::Tensor& squares, const FactorOptions& o) {
  const int64_t num_blocks = c.factor.size(0), numel = c.factor.size(-1) * k.factor.size(-1);
  const bool has_squares = o.damping != 0 && !o.whitened;
  const std::vector<float> zeros(num_blocks);
  BatchValues values{has_squares ? sum_rows(squares[1]) : zeros,
                     has_squares ? sum_rows(squares[2]) : zeros,
                     std::vector<float>(num_blocks, o.damping),
                     follow_all(curvature, curvature ? sum_rows(squares[0]) : zeros, numel, o),
                     nullptr};
  for (int64_t block = 0; curvature && block < num_blocks; ++block) {
    const Curvature& q = values.curvatures[block];
    if (o.relative_damping) {
      values.dampings[block] *= q.value;
    }
    if (q.starts && o.starts_from_gradient) {
      const auto value = static_cast<float>(std::pow(static_cast<double>(q.value) * (1.0 + o.damping), -0.25));
      values.squares_c[block] = start_factor(c, block, value);
      values.squares_k[block] = start_factor(k, block, value);
    }
  }
  return values;
}

void store_curvatures(const OptionalTensor& curvature, const BatchValues& values) {
  for (size_t block = 0; curvature && block < values.curvatures.size(); ++block) {
    const Curvature& q = values.curvatures[block];
    if (values.ok[block]) {
      curvature->mutable_data_ptr<float>()[block] = q.value;
    }
    values.ok[block] = values.ok[block] || q.idle;
  }
}

}  // namespace rootfree::cpu
