// torch.ops.rootfree_native.rf_rmsprop on a CPU: step a list of tensors in one pass (see csrc/rf_rmsprop.h).
//
// Results do not depend on the number of threads, since every element is stepped by itself.

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "tensor_lists.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Step all tensors. Add 1 to the count of those in which an element was skipped.
void step_all(const WholeTensors& tensors, const DiagonalScalars& scalars) {
  const Kernels& k = kernels();
  std::vector<std::atomic<bool>> skipped_any(tensors.chunks.size());
  for_chunks(tensors.chunks, [&](size_t t, int64_t, const DiagonalChunk& chunk) {
    if (k.rf_rmsprop(chunk, scalars)) {
      skipped_any[t].store(true, std::memory_order_relaxed);
    }
  });
  for (size_t t = 0; t < skipped_any.size(); ++t) {
    *tensors.skipped[t] += skipped_any[t];
  }
}

// Step all parameters in place. Every tensor of a list has the shape of its parameter, but for `skipped`, whose tensors
// have one element.
void rf_rmsprop(at::TensorList params,            // FP32, BF16 or FP16
                at::TensorList squares,           // s: FP32 or BF16
                at::TensorList buffers,           // m: FP32 or BF16
                at::TensorList skipped,           // int32: steps in which an element was skipped
                at::TensorList square_residuals,  // int16, or an empty list
                at::TensorList weight_residuals,  // int16, or an empty list
                at::TensorList grads,
                const at::Tensor& lr,              // [1]
                const at::Tensor& seeds,           // int32 [params]
                const at::Tensor& steps,           // [params], or [1]
                const OptionalTensor& grad_scale,  // [1]
                const OptionalTensor& found_inf,   // [1]
                double batch_size, double beta2, double gamma, double momentum, double damping, double weight_decay,
                bool decoupled, bool maximize, c10::string_view rounding, c10::string_view weight_rounding) {
  if (params.empty()) {
    return;
  }
  const TensorLists lists{params, squares, buffers, skipped, square_residuals, weight_residuals, grads};
  lists.check();
  const bool overflow = item_or(found_inf, 0.0f) != 0;
  const auto rate = lr.item<float>(), decay = static_cast<float>(weight_decay);
  const DiagonalScalars scalars{overflow ? NAN : (maximize ? -1.0f : 1.0f) / item_or(grad_scale, 1.0f),
                                rate,
                                static_cast<float>(1 - beta2 * gamma),
                                static_cast<float>(beta2 * batch_size),
                                static_cast<float>(momentum),
                                static_cast<float>(damping),
                                decoupled ? 0.0f : decay,
                                decoupled ? rate * decay : 0.0f};
  const WholeTensors tensors(lists, lists.modes(rounding, weight_rounding), Draws(seeds, steps));
  step_all(tensors, scalars);
  tensors.write_back();
  lists.bump_versions();
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("rf_rmsprop", &rf_rmsprop); }

}  // namespace rootfree::cpu
