// torch.ops.rootfree_native.rf_rmsprop on a CPU: the diagonal step of a list of tensors, in one pass.
//
// Threads share the numbers of all tensors evenly, in chunks of one tensor each. A result does not depend on how.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tensors.h"

namespace rootfree::cpu {
namespace {

constexpr int64_t chunk = 1 << 14;
constexpr int64_t grain = 1 << 15;  // numbers that are worth another thread

struct Step {
  const DiagonalRow* rows;
  const int64_t* grads;
  int64_t num_tensors;
  const int32_t* seeds;
  const float* steps;
  int64_t seed_stride, step_stride;
  float step;
  at::ScalarType param, grad, square, buffer;
  Rounding rounding, weight_rounding;
};

Stored stored(int64_t address, at::ScalarType type, int64_t residual, Rounding rounding, uint32_t key) {
  return {numbers_at(address, type), reinterpret_cast<int16_t*>(residual), rounding, key};
}

// Tensor `t` as one piece.
DiagonalPiece whole(const Step& call, int64_t t) {
  const DiagonalRow& row = call.rows[t];
  const int32_t seed = call.seeds[t * call.seed_stride];
  const float step = call.step + call.steps[t * call.step_stride];
  return {stored(row.param, call.param, row.weight_residual, call.weight_rounding,
                 random_key(seed, step, slot_weight)),
          stored(row.square, call.square, row.square_residual, call.rounding, random_key(seed, step, slot_square)),
          numbers_at(row.buffer, call.buffer),
          numbers_at(call.grads[t], call.grad),
          0,
          row.size};
}

Stored part_of(const Stored& x, int64_t start) {
  return {x.value.from(start), x.residual ? x.residual + start : nullptr, x.rounding, x.key};
}

DiagonalPiece part_of(const DiagonalPiece& x, int64_t start, int64_t length) {
  return {part_of(x.param, start), part_of(x.square, start), x.buffer.from(start), x.grad.from(start),
          static_cast<uint32_t>(start), length};
}

// Step those chunks of all tensors whose first number is one of [begin, end), counted over all tensors; `starts` says
// where each begins. Tensors that leave a number out are marked.
void step_chunks(const Step& call, const DiagonalNumbers& numbers, const std::vector<int64_t>& starts, int64_t begin,
                 int64_t end, std::vector<std::atomic<bool>>& left_out) {
  const Kernels& k = kernels();
  int64_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (; t < call.num_tensors && starts[t] < end; ++t) {
    const DiagonalPiece tensor = whole(call, t);
    const int64_t behind = std::max<int64_t>(begin - starts[t], 0);
    const int64_t stop = std::min(end - starts[t], tensor.length);
    for (int64_t start = (behind + chunk - 1) / chunk * chunk; start < stop; start += chunk) {
      const int64_t length = std::min(chunk, tensor.length - start);
      if (k.rf_rmsprop(part_of(tensor, start, length), numbers)) {
        left_out[t].store(true, std::memory_order_relaxed);
      }
    }
  }
}

void rf_rmsprop(const at::Tensor& rows, const at::Tensor& grads, const at::Tensor& owners, const at::Tensor& counters,
                const at::Tensor& seeds, const at::Tensor& steps, const at::Tensor& lr, const at::Tensor& grad_scale,
                const at::Tensor& found_inf, int64_t seed_stride, int64_t step_stride, double step, double lr_value,
                double sign, double decay, double growth, double momentum, double damping, double weight_decay,
                double decoupled_decay, at::ScalarType param, at::ScalarType grad, at::ScalarType square,
                at::ScalarType buffer, int64_t rounding, int64_t weight_rounding) {
  const Step call{static_cast<const DiagonalRow*>(rows.const_data_ptr()),
                  grads.const_data_ptr<int64_t>(),
                  grads.numel(),
                  seeds.const_data_ptr<int32_t>(),
                  steps.const_data_ptr<float>(),
                  seed_stride,
                  step_stride,
                  static_cast<float>(step),
                  param,
                  grad,
                  square,
                  buffer,
                  static_cast<Rounding>(rounding),
                  static_cast<Rounding>(weight_rounding)};
  const bool overflow = found_inf.item<float>() != 0;
  const float rate = static_cast<float>(lr_value) + lr.item<float>();
  const DiagonalNumbers numbers{overflow ? NAN : static_cast<float>(sign) / grad_scale.item<float>(),
                                rate,
                                static_cast<float>(decay),
                                static_cast<float>(growth),
                                static_cast<float>(momentum),
                                static_cast<float>(damping),
                                static_cast<float>(weight_decay),
                                rate * static_cast<float>(decoupled_decay)};

  std::vector<int64_t> starts(call.num_tensors + 1);
  for (int64_t t = 0; t < call.num_tensors; ++t) {
    starts[t + 1] = starts[t] + call.rows[t].size;
  }
  std::vector<std::atomic<bool>> left_out(call.num_tensors);
  at::parallel_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
    step_chunks(call, numbers, starts, begin, end, left_out);
  });
  for (int64_t t = 0; t < call.num_tensors; ++t) {
    *reinterpret_cast<int32_t*>(call.rows[t].skipped) += left_out[t];
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("rf_rmsprop", &rf_rmsprop); }

}  // namespace rootfree::cpu
