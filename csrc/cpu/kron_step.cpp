// torch.ops.rootfree_native.kron_step on a CPU: precondition the gradient, U = CC'GKK' = P_C G P_K or U = CGK, and step
// the weights along U (rootfree_kernels/eager/kron_step.py). Each of these is one pass over memory:
//
//   - the average M of gradients, if the momentum is theirs; it takes the place of G,
//   - the norm of U, if updates have a fixed size,
//   - the step of the weights, with heavy-ball momentum unless the momentum is that of gradients.

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "blocks.h"
#include "products.h"
#include "slices.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Return U [L, p, d]. If `cached`, the two matrices multiply G as they are.
//
// Threads work on different slices, so that preconditioning and stepping overlap in time. PyTorch's profiler shows the
// work of the calling thread under the name of the scope. Without a profiler a scope costs next to nothing.
at::Tensor precondition(const at::Tensor& c,  // C or P_C [L, p, p]
                        const at::Tensor& k,  // K or P_K [L, d, d]
                        bool cached,
                        const at::Tensor& grad) {  // [L, p, d]
  if (cached) {
    return product(product(c, grad), k);
  }
  return product(product(c, product(product(c.mT(), grad), k)), k.mT());
}

// Weights, momentum and residuals as matrices, the places of their blocks, and how weights are rounded.
struct WeightBlocks {
  std::vector<Matrix> weights, buffers, residuals;
  std::vector<Block> blocks;
  Rounding rounding;
  bool averages;  // whether the momentum averages gradients

  // Return row i of the momentum of a block, and of its gradient, which is `grad`.
  GradientRow gradient_row(int64_t block, int64_t i, const TypedPointer& grad, int64_t cols) const {
    const Block& place = blocks[block];
    const Matrix buffer = block_of(buffers[place.index], place);
    return {buffer.elements.offset(i * buffer.row_stride), grad, buffer.col_stride, cols};
  }

  // Return row i of a block. `direction` is the same row of U, and `key` belongs to the block's random bits.
  WeightRow row(int64_t block, int64_t i, uint32_t key, const TypedPointer& direction, int64_t cols) const {
    const Block& place = blocks[block];
    const Matrix weight = block_of(weights[place.index], place);
    WeightRow row{};
    row.weight = {weight.elements.offset(i * weight.row_stride), nullptr, rounding, key};
    row.direction = direction;
    row.scale = 1;
    row.weight_stride = weight.col_stride;
    if (!averages) {
      const Matrix buffer = block_of(buffers[place.index], place);
      row.buffer = buffer.elements.offset(i * buffer.row_stride);
      row.buffer_stride = buffer.col_stride;
    }
    if (!residuals.empty()) {
      const Matrix residual = block_of(residuals[place.index], place);
      row.weight.residual = static_cast<int16_t*>(residual.elements.offset(i * residual.row_stride).data);
      row.residual_stride = residual.col_stride;
    }
    row.first = static_cast<uint32_t>(i * cols);
    row.length = cols;
    return row;
  }
};

// View the residuals as matrices. They are int16 and are viewed as BF16, a dtype of the same size: only their addresses
// and strides are used.
std::vector<Matrix> residual_matrices_of(at::TensorList residuals) {
  std::vector<Matrix> matrices;
  for (const at::Tensor& x : residuals) {
    matrices.push_back(matrix_of(x.view(at::kBFloat16)));
  }
  return matrices;
}

// Raise unless every tensor can be viewed as a matrix and every list has one dtype.
void check_weights(at::TensorList params, at::TensorList buffers, at::TensorList residuals) {
  TORCH_CHECK_VALUE(!params.empty(), "there are no parameters: pass at least one.");
  for (const at::TensorList& tensors : {params, buffers, residuals}) {
    for (const at::Tensor& x : tensors) {
      TORCH_CHECK_VALUE(x.dim() == 2 || x.is_contiguous(), "a tensor has shape ", x.sizes(), " and strides ",
                        x.strides(), ": pass a contiguous tensor, or one with two axes.");
      TORCH_CHECK_VALUE(x.scalar_type() == tensors[0].scalar_type(), "a list has tensors of ", tensors[0].scalar_type(),
                        " and ", x.scalar_type(), ": pass tensors of one dtype.");
    }
  }
}

// Call f(i) for the rows i = 0, 1, ... of a slice of blocks, in parallel.
template <typename F>
void for_rows(int64_t num_rows, int64_t cols, const F& f) {
  at::parallel_for(0, num_rows, std::max<int64_t>(1, 16384 / cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  });
}

using Flags = std::vector<std::atomic<bool>>;

// Return the factors [L] that scale U [L, p, d] to its norms. Without norms they are 1. A block whose sum of squares
// overflows gets 0, and its flag in `lost`.
std::vector<float> scales_of(const at::Tensor& u, const float* norms, Flags& lost) {
  const Kernels& kernel = kernels();
  const int64_t rows = u.size(1), cols = u.size(2), num_rows = u.size(0) * rows;
  std::vector<float> scales(u.size(0), 1.0f), squares(norms ? num_rows : 0);
  if (norms) {
    const TypedPointer directions = pointer_to(u);
    for_rows(num_rows, cols,
             [&](int64_t i) { squares[i] = kernel.direction_squares(directions.offset(i * cols), cols); });
    for (int64_t block = 0; block < u.size(0); ++block) {
      const float total = sum_of(squares.data() + block * rows, rows);
      scales[block] = scale_to_norm(norms[block], total);
      lost[block] = !is_finite(total);
    }
  }
  return scales;
}

// Step the blocks in place. A block is skipped, and counted in `skipped`, if its gradient is not finite, if `ok` is
// false for it, or if GradScaler found an overflow. It is counted too if elements of U are not finite: these count as 0.
void kron_step(at::TensorList params,               // contiguous, or with two axes
               at::TensorList buffers,              // shapes of params
               at::TensorList residuals,            // int16, shapes of params, or an empty list
               at::IntArrayRef tiles,               // four integers for each parameter
               const at::Tensor& skipped,           // int32 [L]
               const OptionalTensor& update_norms,  // [L]
               const at::Tensor& factor_c,          // C or P_C [L, p, p]
               const at::Tensor& factor_k,          // K or P_K [L, d, d]
               const at::Tensor& grad,              // [L, p, d], overwritten by averages
               const at::Tensor& squares,           // [1 or 3, L, shares], as kron_gather returns them
               const at::Tensor& lr,                // [1]
               const OptionalTensor& ok,            // [L], as kron_factor returns it
               const at::Tensor& seeds,             // int32 [L]
               const at::Tensor& steps,             // [L] or [1]
               const OptionalTensor& found_inf,     // [1]
               bool cached, double momentum, double weight_decay, bool decoupled, c10::string_view rounding,
               c10::string_view momentum_on, bool nesterov) {
  check_weights(params, buffers, residuals);
  check_contiguous("squares", squares);
  check_contiguous("skipped", skipped);
  check_contiguous("grad", grad);
  const Kernels& kernel = kernels();
  const int64_t num_blocks = grad.size(0), rows = grad.size(1), cols = grad.size(2), shares = squares.size(2);
  const WeightScalars scalars = weight_scalars(lr.item<float>(), momentum, weight_decay, decoupled, momentum_on);
  const WeightBlocks weights{matrices_of(params),
                             matrices_of(buffers),
                             residual_matrices_of(residuals),
                             blocks_of(tiles, rows, cols),
                             rounding_of(rounding, !residuals.empty(), params[0].scalar_type()),
                             scalars.averages};
  const Draws draws(seeds, steps);
  const bool overflow = item_or(found_inf, 0.0f) != 0;
  const at::Tensor norms = update_norms ? update_norms->to(at::kFloat).contiguous() : at::Tensor();
  const auto* sums = squares.const_data_ptr<float>();
  auto* num_skipped = skipped.mutable_data_ptr<int32_t>();

  for_slices(num_blocks, rows, cols, [&](int64_t first, int64_t length) {
    const auto part = [&](const at::Tensor& x) { return x.narrow(0, first, length); };
    std::vector<char> is_stepped(length);  // not vector<bool>, which packs bits
    for (int64_t i = 0; i < length; ++i) {
      const int64_t block = first + i;
      const bool finite = is_finite(sum_of(sums + block * shares, shares));
      is_stepped[i] = finite && !overflow && (!ok || ok->const_data_ptr<bool>()[block]);
    }
    Flags lost(length);
    const auto for_stepped_rows = [&](const auto& f) {  // f(block of the slice, row of the block, row of the slice)
      for_rows(length * rows, cols, [&](int64_t i) {
        if (is_stepped[i / rows]) {
          f(i / rows, i % rows, i);
        }
      });
    };
    const at::Tensor u = [&] {
      RECORD_USER_SCOPE("precondition");
      const at::Tensor g = part(grad);
      if (scalars.averages) {
        const TypedPointer grads = pointer_to(g);
        for_stepped_rows([&](int64_t block, int64_t row, int64_t i) {
          const GradientRow both = weights.gradient_row(first + block, row, grads.offset(i * cols), cols);
          kernel.average_gradient_row(both, scalars.momentum, nesterov);
        });
      }
      const at::Tensor c = part(factor_c).to(grad.scalar_type()), k = part(factor_k).to(grad.scalar_type());
      return precondition(c, k, cached, g);
    }();
    RECORD_USER_SCOPE("apply");
    const float* const norm = norms.defined() ? norms.const_data_ptr<float>() + first : nullptr;
    const std::vector<float> scales = scales_of(u, norm, lost);
    const TypedPointer directions = pointer_to(u);
    for_stepped_rows([&](int64_t block, int64_t row, int64_t i) {
      const uint32_t key = weights.rounding == Rounding::stochastic ? draws.key(first + block, slot_weight) : 0;
      WeightRow weight = weights.row(first + block, row, key, directions.offset(i * cols), cols);
      weight.scale = scales[block];
      if (kernel.step_weight_row(weight, scalars)) {
        lost[block].store(true, std::memory_order_relaxed);
      }
    });
    for (int64_t i = 0; i < length; ++i) {
      num_skipped[first + i] += !is_stepped[i] || lost[i];
    }
  });
  // The schema says that grad is written, since other backends and averages overwrite it.
  for (const at::TensorList& tensors : {params, buffers, residuals, at::TensorList(skipped), at::TensorList(grad)}) {
    for (const at::Tensor& x : tensors) {
      bump_version(x);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("kron_step", &kron_step); }

}  // namespace rootfree::cpu
