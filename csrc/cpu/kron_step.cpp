// torch.ops.rootfree_native.kron_step on a CPU: U = CC'GKK' = P_C G P_K, and the heavy-ball step of the weights along
// it in one pass over weights and momentum, wherever their blocks lie.

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <vector>

#include "blocks.h"
#include "products.h"
#include "slices.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Threads take slices of a batch each for itself, so that the two phases have no border in time: profilers of PyTorch,
// which look at the calling thread, are told of its own share. Without one a scope costs a look at a flag.
at::Tensor preconditioned(const at::Tensor& c, const at::Tensor& k, bool cached, const at::Tensor& grad) {
  RECORD_USER_SCOPE("precondition");
  if (cached) {
    return product(product(c, grad), k);
  }
  return product(product(c, product(product(c.mT(), grad), k)), k.mT());
}

// Weights, momentum and remainders as matrices, and how they are stored.
struct Lists {
  std::vector<Matrix> weights, buffers, residuals;
  std::vector<Block> blocks;
  Rounding rounding;

  WeightRow row(int64_t block, int64_t i, uint32_t key, const Numbers& direction, int64_t cols) const {
    const Block& place = blocks[block];
    const Matrix weight = block_of(weights[place.index], place), buffer = block_of(buffers[place.index], place);
    WeightRow row{};
    row.weight = {weight.numbers.from(i * weight.row_stride), nullptr, rounding, key};
    row.buffer = buffer.numbers.from(i * buffer.row_stride);
    row.direction = direction;
    row.weight_stride = weight.col_stride;
    row.buffer_stride = buffer.col_stride;
    if (!residuals.empty()) {
      const Matrix residual = block_of(residuals[place.index], place);
      row.weight.residual = static_cast<int16_t*>(residual.numbers.from(i * residual.row_stride).data);
      row.residual_stride = residual.col_stride;
    }
    row.first = static_cast<uint32_t>(i * cols);
    row.length = cols;
    return row;
  }
};

// Remainders are int16; only how far they lie apart matters, which is as in BF16.
std::vector<Matrix> residuals_of(at::TensorList residuals) {
  std::vector<Matrix> matrices;
  for (const at::Tensor& x : residuals) {
    matrices.push_back(matrix_of(x.view(at::kBFloat16)));
  }
  return matrices;
}

void kron_step(at::TensorList params, at::TensorList buffers, at::TensorList residuals, at::IntArrayRef tiles,
               const at::Tensor& skipped, const at::Tensor& factor_c, const at::Tensor& factor_k,
               const at::Tensor& grad, const at::Tensor& squares, const at::Tensor& lr, const OptionalTensor& ok,
               const at::Tensor& seeds, const at::Tensor& steps, const OptionalTensor& found_inf, bool cached,
               double momentum, double weight_decay, bool decoupled, c10::string_view rounding) {
  TORCH_CHECK_VALUE(!params.empty(), "no parameters: pass one at least.");
  for (const at::TensorList& tensors : {params, buffers, residuals}) {
    for (const at::Tensor& x : tensors) {
      TORCH_CHECK_VALUE(x.dim() == 2 || x.is_contiguous(), "a tensor of shape ", x.sizes(), " and strides ",
                        x.strides(), ": pass a contiguous one, or one of two axes.");
      TORCH_CHECK_VALUE(x.scalar_type() == tensors[0].scalar_type(), "tensors of several dtypes: pass one dtype.");
    }
  }
  check_contiguous("squares", squares);
  check_contiguous("skipped", skipped);
  const Kernels& kernel = kernels();
  const int64_t num_blocks = grad.size(0), rows = grad.size(1), cols = grad.size(2), shares = squares.size(2);
  const auto rate = lr.item<float>();
  const auto decay = static_cast<float>(weight_decay);
  const WeightStep numbers{rate, static_cast<float>(momentum), decoupled ? 0 : decay, decoupled ? rate * decay : 0};
  const Lists lists{matrices_of(params), matrices_of(buffers), residuals_of(residuals), blocks_of(tiles, rows, cols),
                    rounding_of(rounding, !residuals.empty(), params[0].scalar_type())};
  const Draws draws(seeds, steps);
  const bool overflow = value_of(found_inf, 0.0f) != 0;
  const auto* sums = squares.const_data_ptr<float>();
  auto* skips = skipped.mutable_data_ptr<int32_t>();

  for_slices(num_blocks, rows, cols, [&](int64_t first, int64_t length) {
    const auto part = [&](const at::Tensor& x) { return x.narrow(0, first, length); };
    const at::Tensor c = part(factor_c).to(grad.scalar_type()), k = part(factor_k).to(grad.scalar_type());
    const at::Tensor u = preconditioned(c, k, cached, part(grad));
    RECORD_USER_SCOPE("apply");
    const Numbers directions = numbers_of(u);
    std::vector<char> takes_part(length);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t block = first + i;
      const bool finite = is_finite(total_of(sums + block * shares, shares));
      takes_part[i] = finite && !overflow && (!ok || ok->const_data_ptr<bool>()[block]);
      skips[block] += takes_part[i] ? 0 : 1;
    }
    at::parallel_for(0, length * rows, std::max<int64_t>(1, 16384 / cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = first + i / rows;
        if (takes_part[i / rows]) {
          const uint32_t key = lists.rounding == Rounding::stochastic ? draws.key(block, slot_weight) : 0;
          kernel.weight_row(lists.row(block, i % rows, key, directions.from(i * cols), cols), numbers);
        }
      }
    });
  });
  for (const at::TensorList& tensors : {params, buffers, residuals, at::TensorList(skipped), at::TensorList(grad)}) {
    for (const at::Tensor& x : tensors) {
      changed(x);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("kron_step", &kron_step); }

}  // namespace rootfree::cpu
