// torch.ops.rootfree_native.rf_rmsprop on a CPU: step a list of tensors in one pass (see csrc/rf_rmsprop.h).
//
// The elements of all tensors together are divided evenly among threads, in chunks of one tensor each. Results do not
// depend on the number of threads, since every element is stepped by itself.

#include <ATen/Parallel.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "tensors.h"

namespace rootfree::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t chunk_size = 1 << 14;  // elements of a tensor that one call of the kernel steps
constexpr int64_t grain_size = 1 << 15;  // fewer elements are not worth another thread

// ---- tensors --------------------------------------------------------------------------------------------------------

// The rounding modes of the parameters and of s.
struct RoundingModes {
  Rounding weight, square;

  bool is_stochastic() const { return weight == Rounding::stochastic || square == Rounding::stochastic; }
};

// Return the name by which Python knows a dtype.
std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// Raise unless all tensors of a list have one dtype, and kernels support it.
void check_dtypes(const char* name, at::TensorList tensors, bool may_be_f16) {
  const at::ScalarType dtype = tensors[0].scalar_type();
  const bool is_known = dtype == at::kFloat || dtype == at::kBFloat16 || (may_be_f16 && dtype == at::kHalf);
  for (const at::Tensor& x : tensors) {
    if (!is_known || x.scalar_type() != dtype) {
      const std::string found = name_of(dtype) + (x.scalar_type() == dtype ? "" : ", " + name_of(x.scalar_type()));
      TORCH_CHECK_VALUE(false, name, " of ", found, ": pass tensors of one dtype, torch.float32 or torch.bfloat16",
                        may_be_f16 ? " or torch.float16." : ".");
    }
  }
}

// Raise unless a list has one tensor for each parameter.
void check_length(const char* name, at::TensorList tensors, at::TensorList params, bool may_be_empty) {
  TORCH_CHECK_VALUE(tensors.size() == params.size() || (may_be_empty && tensors.empty()), tensors.size(), " ", name,
                    " for ", params.size(), " parameters: pass one for each.");
}

// A parameter, its state and its gradient. Residuals are undefined unless rounding is compensated.
struct ParamTensors {
  at::Tensor param, square, buffer, square_residual, weight_residual, grad;

  // Return whether element i of memory is the same element in all tensors: all are contiguous or, if `in_any_order`,
  // all share the parameter's strides and have no gaps. Random bits need contiguous tensors, since they depend on the
  // index.
  bool layouts_match(bool in_any_order) const {
    const bool contiguous = param.is_contiguous();
    if (!contiguous && !(in_any_order && param.is_non_overlapping_and_dense())) {
      return false;
    }
    for (const at::Tensor* x : {&square, &buffer, &square_residual, &weight_residual, &grad}) {
      if (x->defined() && !(contiguous ? x->is_contiguous() : x->strides() == param.strides())) {
        return false;
      }
    }
    return true;
  }

  // Raise unless all tensors have the parameter's shape.
  void check_shapes() const {
    for (const at::Tensor* x : {&square, &buffer, &square_residual, &weight_residual, &grad}) {
      TORCH_CHECK_VALUE(!x->defined() || x->sizes() == param.sizes(), "a tensor has shape ", x->sizes(),
                        " and its parameter ", param.sizes(), ": pass tensors of one shape.");
    }
  }

  // Return contiguous tensors: copies, or the same ones if they are contiguous.
  ParamTensors contiguous() const {
    const auto copy = [](const at::Tensor& x) { return x.defined() ? x.contiguous() : x; };
    return {copy(param), copy(square), copy(buffer), copy(square_residual), copy(weight_residual), copy(grad)};
  }

  // Copy the new values into the original tensors.
  void write_back(const ParamTensors& original) const {
    const auto copy = [](const at::Tensor& to, const at::Tensor& from) {
      if (to.defined() && !to.is_same(from)) {
        at::Tensor(to).copy_(from);
      }
    };
    copy(original.param, param);
    copy(original.square, square);
    copy(original.buffer, buffer);
    copy(original.square_residual, square_residual);
    copy(original.weight_residual, weight_residual);
  }

  // Return all elements as a chunk.
  DiagonalChunk chunk(const RoundingModes& modes, uint32_t weight_key, uint32_t square_key) const {
    const auto residual = [](const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr<int16_t>() : nullptr; };
    return {{pointer_to(param), residual(weight_residual), modes.weight, weight_key},
            {pointer_to(square), residual(square_residual), modes.square, square_key},
            pointer_to(buffer),
            pointer_to(grad),
            0,
            param.numel()};
  }
};

// ---- the step -------------------------------------------------------------------------------------------------------

// Return the elements from index `start` on.
Stored part_at(const Stored& x, int64_t start) {
  return {x.value.offset(start), x.residual ? x.residual + start : nullptr, x.rounding, x.key};
}

// Return `length` elements of a chunk, the first at index `start`.
DiagonalChunk part_at(const DiagonalChunk& x, int64_t start, int64_t length) {
  return {part_at(x.param, start), part_at(x.square, start),     x.buffer.offset(start),
          x.grad.offset(start),    static_cast<uint32_t>(start), length};
}

// Step the chunks whose first element is in [begin, end). Elements are counted over all tensors, and tensor t begins at
// starts[t]. Mark the tensors in which an element was skipped.
void step_chunks(const std::vector<DiagonalChunk>& tensors, const DiagonalScalars& scalars,
                 const std::vector<int64_t>& starts, int64_t begin, int64_t end,
                 std::vector<std::atomic<bool>>& skipped_any) {
  const Kernels& k = kernels();
  size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (; t < tensors.size() && starts[t] < end; ++t) {
    const int64_t first = std::max<int64_t>(begin - starts[t], 0);
    const int64_t stop = std::min(end - starts[t], tensors[t].length);
    for (int64_t start = (first + chunk_size - 1) / chunk_size * chunk_size; start < stop; start += chunk_size) {
      const int64_t length = std::min(chunk_size, tensors[t].length - start);
      if (k.rf_rmsprop(part_at(tensors[t], start, length), scalars)) {
        skipped_any[t].store(true, std::memory_order_relaxed);
      }
    }
  }
}

// Step all tensors. Add 1 to the count in `skipped` of those in which an element was skipped.
void step_all(const std::vector<DiagonalChunk>& tensors, const DiagonalScalars& scalars,
              const std::vector<int32_t*>& skipped) {
  std::vector<int64_t> starts{0};  // the last entry is the total
  starts.reserve(tensors.size() + 1);
  for (const DiagonalChunk& tensor : tensors) {
    starts.push_back(starts.back() + tensor.length);
  }
  std::vector<std::atomic<bool>> skipped_any(tensors.size());
  at::parallel_for(0, starts.back(), grain_size,
                   [&](int64_t begin, int64_t end) { step_chunks(tensors, scalars, starts, begin, end, skipped_any); });
  for (size_t t = 0; t < tensors.size(); ++t) {
    *skipped[t] += skipped_any[t];
  }
}

// ---- the operator ---------------------------------------------------------------------------------------------------

// The arguments that are lists of tensors, one for each parameter. The lists of residuals may be empty.
struct TensorLists {
  at::TensorList params, squares, buffers, skipped, square_residuals, weight_residuals, grads;

  // Raise unless lengths and dtypes fit.
  void check() const {
    for (const auto& [name, tensors] : {std::pair("squares", squares), std::pair("buffers", buffers),
                                        std::pair("skipped", skipped), std::pair("grads", grads)}) {
      check_length(name, tensors, params, false);
    }
    check_length("square_residuals", square_residuals, params, true);
    check_length("weight_residuals", weight_residuals, params, true);
    check_dtypes("params", params, true);
    check_dtypes("squares", squares, false);
    check_dtypes("buffers", buffers, false);
  }

  // Return the tensors of parameter t. FP64 gradients are cast, since no kernel reads them.
  ParamTensors tensors_of(size_t t) const {
    const at::Tensor none;
    const bool is_double = grads[t].scalar_type() == at::kDouble;
    return {params[t],
            squares[t],
            buffers[t],
            square_residuals.empty() ? none : square_residuals[t],
            weight_residuals.empty() ? none : weight_residuals[t],
            is_double ? grads[t].to(at::kFloat) : grads[t]};
  }

  void bump_versions() const {
    for (const at::TensorList& tensors : {params, squares, buffers, skipped, square_residuals, weight_residuals}) {
      for (const at::Tensor& x : tensors) {
        bump_version(x);
      }
    }
  }
};

// Step all parameters. Tensors whose layout no kernel reads are stepped as contiguous copies, which are written back.
void step_lists(const TensorLists& lists, const RoundingModes& modes, const DiagonalScalars& scalars,
                const Draws& draws) {
  const size_t num_params = lists.params.size();
  std::vector<ParamTensors> entries;
  std::vector<std::pair<size_t, ParamTensors>> copied;  // the originals of the entries that are copies
  std::vector<DiagonalChunk> whole_tensors;
  std::vector<int32_t*> counts;
  entries.reserve(num_params);
  whole_tensors.reserve(num_params);
  for (size_t t = 0; t < num_params; ++t) {
    entries.push_back(lists.tensors_of(t));
    entries[t].check_shapes();
    counts.push_back(lists.skipped[t].mutable_data_ptr<int32_t>());
    if (!entries[t].layouts_match(!modes.is_stochastic())) {
      copied.emplace_back(t, entries[t]);
      entries[t] = entries[t].contiguous();
    }
    const auto key = [&](Rounding mode, Slot slot) { return mode == Rounding::stochastic ? draws.key(t, slot) : 0u; };
    whole_tensors.push_back(entries[t].chunk(modes, key(modes.weight, slot_weight), key(modes.square, slot_square)));
  }
  step_all(whole_tensors, scalars, counts);
  for (const auto& [t, original] : copied) {
    entries[t].write_back(original);
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
  const RoundingModes modes{rounding_of(weight_rounding, !weight_residuals.empty(), params[0].scalar_type()),
                            rounding_of(rounding, !square_residuals.empty(), squares[0].scalar_type())};
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
  step_lists(lists, modes, scalars, Draws(seeds, steps));
  lists.bump_versions();
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("rf_rmsprop", &rf_rmsprop); }

}  // namespace rootfree::cpu
