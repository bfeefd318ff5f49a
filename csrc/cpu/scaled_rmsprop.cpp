// torch.ops.rootfree_native.scaled_rmsprop on a CPU: the diagonal step in which each tensor has a scale of its own
// (rootfree_kernels/eager/scaled_rmsprop.py; cpu/kernels/scaled_rmsprop.cpp has the formulas).
//
// A tensor takes two passes over memory, or three if its updates have a fixed size: the sum of g^2, the sum of u^2, and
// the step, which computes u once more. Sums are in FP64 and in a fixed order, so that results do not depend on the
// number of threads.

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "tensor_lists.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Return the sums of f(t, chunk) over the chunks of every tensor t.
template <typename F>
std::vector<double> sum_chunks(const std::vector<DiagonalChunk>& tensors, const F& f) {
  std::vector<int64_t> starts{0};  // chunks are counted over all tensors
  for (const DiagonalChunk& tensor : tensors) {
    starts.push_back(starts.back() + (tensor.length + chunk_size - 1) / chunk_size);
  }
  std::vector<double> parts(starts.back()), totals(tensors.size());
  for_chunks(tensors, [&](size_t t, int64_t i, const DiagonalChunk& chunk) { parts[starts[t] + i] = f(t, chunk); });
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t i = starts[t]; i < starts[t + 1]; ++i) {
      totals[t] += parts[i];
    }
  }
  return totals;
}

// The options that matter for the curvature of a tensor.
struct CurvatureOptions {
  float batch_size, beta2, damping;
  bool overflow;
};

// What is stepped: the scalars of a tensor, whether it is stepped at all, and whether its update was too large for that.
struct Step {
  ScaledScalars scalars;
  bool ok, lost;
};

// Return the step of a tensor, from the sum of its squared gradient. `curvature` is its q, which is updated, or null.
Step step_of(double squares, int64_t numel, float* curvature, ScaledScalars scalars, const CurvatureOptions& o) {
  const auto count = static_cast<float>(std::max<int64_t>(numel, 1));
  const float mean_square = static_cast<float>(squares) * (o.batch_size / count);
  // The sum bounds every new element of s.
  const bool ok = is_finite(static_cast<float>(squares) * o.batch_size * std::max(1.0f, o.beta2)) && !o.overflow;
  scalars.damping = o.damping;
  if (curvature && ok) {
    if (mean_square == 0) {  // s and q stay
      scalars.decay = 1;
      scalars.growth = 0;
    } else {
      *curvature = scalars.decay * *curvature + o.beta2 * mean_square;
    }
    scalars.damping = o.damping * *curvature;
  }
  scalars.damping = scalars.whitened ? std::sqrt(scalars.damping) : scalars.damping;
  return {scalars, ok, false};
}

// Scale the updates of all tensors to their norms.
void scale_to(const float* norms, const std::vector<DiagonalChunk>& tensors, std::vector<Step>& steps) {
  const Kernels& k = kernels();
  const std::vector<double> squares = sum_chunks(tensors, [&](size_t t, const DiagonalChunk& chunk) {
    return steps[t].ok ? k.scaled_squares(chunk, steps[t].scalars) : 0.0;
  });
  for (size_t t = 0; t < tensors.size(); ++t) {
    steps[t].scalars.scale = scale_to_norm(norms[t], squares[t]);
    steps[t].lost = !is_finite(static_cast<float>(squares[t]));
  }
}

// Return the addresses of q, or null pointers if there are none.
std::vector<float*> pointers_to(at::TensorList curvatures, size_t num_params) {
  std::vector<float*> pointers(num_params);
  for (size_t t = 0; t < curvatures.size(); ++t) {
    pointers[t] = curvatures[t].mutable_data_ptr<float>();
  }
  return pointers;
}

// Step all parameters in place. Every tensor of a list has the shape of its parameter, but for `skipped` and
// `curvatures`, whose tensors have one element.
void scaled_rmsprop(at::TensorList params,               // FP32, BF16 or FP16
                    at::TensorList squares,              // s: FP32 or BF16
                    at::TensorList buffers,              // M or m: FP32 or BF16
                    at::TensorList skipped,              // int32: steps that left out the tensor or elements
                    at::TensorList curvatures,           // q: FP32, for relative damping, or an empty list
                    at::TensorList square_residuals,     // int16, or an empty list
                    at::TensorList weight_residuals,     // int16, or an empty list
                    const OptionalTensor& update_norms,  // [params]
                    at::TensorList grads,
                    const at::Tensor& lr,              // [1]
                    const at::Tensor& seeds,           // int32 [params]
                    const at::Tensor& steps,           // [params], or [1]
                    const OptionalTensor& grad_scale,  // [1]
                    const OptionalTensor& found_inf,   // [1]
                    double batch_size, double beta2, double gamma, double momentum, double damping, double weight_decay,
                    bool decoupled, bool maximize, c10::string_view rounding, c10::string_view weight_rounding,
                    c10::string_view direction, bool relative_damping, c10::string_view momentum_on, bool nesterov) {
  if (params.empty()) {
    return;
  }
  const TensorLists lists{params, squares, buffers, skipped, square_residuals, weight_residuals, grads};
  lists.check();
  check_length("curvatures", curvatures, params, !relative_damping);
  const std::vector<float*> old_curvatures =
      pointers_to(relative_damping ? curvatures : at::TensorList(), params.size());
  const at::Tensor norms = update_norms ? update_norms->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(!update_norms || norms.numel() == static_cast<int64_t>(params.size()), norms.numel(),
                    " update_norms for ", params.size(), " parameters: pass one for each.");
  const WholeTensors tensors(lists, lists.modes(rounding, weight_rounding), Draws(seeds, steps));

  ScaledScalars shared{};
  shared.grad_factor = (maximize ? -1.0f : 1.0f) / item_or(grad_scale, 1.0f);
  shared.decay = static_cast<float>(1 - beta2 * gamma);
  shared.growth = static_cast<float>(beta2 * batch_size);
  shared.scale = 1;
  shared.weight = weight_scalars(lr.item<float>(), momentum, weight_decay, decoupled, momentum_on);
  shared.whitened = direction == "whitened";
  shared.nesterov = nesterov;
  const CurvatureOptions options{static_cast<float>(batch_size), static_cast<float>(beta2),
                                 static_cast<float>(damping), item_or(found_inf, 0.0f) != 0};

  const Kernels& k = kernels();
  const std::vector<double> sums = sum_chunks(tensors.chunks, [&](size_t, const DiagonalChunk& chunk) {
    return k.gradient_squares(chunk, shared.grad_factor);
  });
  std::vector<Step> tensor_steps;
  for (size_t t = 0; t < params.size(); ++t) {
    tensor_steps.push_back(step_of(sums[t], tensors.chunks[t].length, old_curvatures[t], shared, options));
  }
  if (update_norms) {
    scale_to(norms.const_data_ptr<float>(), tensors.chunks, tensor_steps);
  }
  std::vector<std::atomic<bool>> lost_any(params.size());
  for_chunks(tensors.chunks, [&](size_t t, int64_t, const DiagonalChunk& chunk) {
    if (tensor_steps[t].ok && k.scaled_rmsprop(chunk, tensor_steps[t].scalars)) {
      lost_any[t].store(true, std::memory_order_relaxed);
    }
  });
  for (size_t t = 0; t < params.size(); ++t) {
    *tensors.skipped[t] += !tensor_steps[t].ok || tensor_steps[t].lost || lost_any[t];
  }
  tensors.write_back();
  lists.bump_versions();
  for (const at::Tensor& x : curvatures) {
    bump_version(x);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("scaled_rmsprop", &scaled_rmsprop); }

}  // namespace rootfree::cpu
