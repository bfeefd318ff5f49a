// Lists of tensors that the diagonal operators step: checks, layouts, and chunks for threads.
//
// The elements of all tensors together are divided evenly among threads, in chunks of one tensor each. Chunks do not
// depend on the number of threads.

#pragma once

#include <ATen/Parallel.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "tensors.h"

namespace rootfree::cpu {

constexpr int64_t chunk_size = 1 << 14;  // elements of a tensor that one call of a kernel steps
constexpr int64_t grain_size = 1 << 15;  // fewer elements are not worth another thread

// ---- checks ---------------------------------------------------------------------------------------------------------

// Return the name by which Python knows a dtype.
inline std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// Raise unless all tensors of a list have one dtype, and kernels support it.
inline void check_dtypes(const char* name, at::TensorList tensors, bool may_be_f16) {
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
inline void check_length(const char* name, at::TensorList tensors, at::TensorList params, bool may_be_empty) {
  TORCH_CHECK_VALUE(tensors.size() == params.size() || (may_be_empty && tensors.empty()), tensors.size(), " ", name,
                    " for ", params.size(), " parameters: pass one for each.");
}

// ---- one parameter --------------------------------------------------------------------------------------------------

// The rounding modes of the parameters and of s.
struct RoundingModes {
  Rounding weight, square;

  bool is_stochastic() const { return weight == Rounding::stochastic || square == Rounding::stochastic; }
};

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

// ---- lists ----------------------------------------------------------------------------------------------------------

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

  RoundingModes modes(c10::string_view rounding, c10::string_view weight_rounding) const {
    return {rounding_of(weight_rounding, !weight_residuals.empty(), params[0].scalar_type()),
            rounding_of(rounding, !square_residuals.empty(), squares[0].scalar_type())};
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

// All parameters as chunks. Tensors whose layout no kernel reads are copied, and `write_back` copies them back.
class WholeTensors {
 public:
  std::vector<DiagonalChunk> chunks;  // one for each parameter
  std::vector<int32_t*> skipped;

  WholeTensors(const TensorLists& lists, const RoundingModes& modes, const Draws& draws) {
    const size_t num_params = lists.params.size();
    entries_.reserve(num_params);
    chunks.reserve(num_params);
    for (size_t t = 0; t < num_params; ++t) {
      entries_.push_back(lists.tensors_of(t));
      entries_[t].check_shapes();
      skipped.push_back(lists.skipped[t].mutable_data_ptr<int32_t>());
      if (!entries_[t].layouts_match(!modes.is_stochastic())) {
        copied_.emplace_back(t, entries_[t]);
        entries_[t] = entries_[t].contiguous();
      }
      const auto key = [&](Rounding mode, Slot slot) { return mode == Rounding::stochastic ? draws.key(t, slot) : 0u; };
      chunks.push_back(entries_[t].chunk(modes, key(modes.weight, slot_weight), key(modes.square, slot_square)));
    }
  }

  void write_back() const {
    for (const auto& [t, original] : copied_) {
      entries_[t].write_back(original);
    }
  }

 private:
  std::vector<ParamTensors> entries_;
  std::vector<std::pair<size_t, ParamTensors>> copied_;  // the originals of the entries that are copies
};

// ---- chunks ---------------------------------------------------------------------------------------------------------

// Return the elements from index `start` on.
inline Stored part_at(const Stored& x, int64_t start) {
  return {x.value.offset(start), x.residual ? x.residual + start : nullptr, x.rounding, x.key};
}

// Return `length` elements of a chunk, the first at index `start`.
inline DiagonalChunk part_at(const DiagonalChunk& x, int64_t start, int64_t length) {
  return {part_at(x.param, start), part_at(x.square, start),     x.buffer.offset(start),
          x.grad.offset(start),    static_cast<uint32_t>(start), length};
}

// Call f(t, i, chunk) for chunk i of every tensor t, in parallel. A chunk has chunk_size elements, or the last ones of
// its tensor.
template <typename F>
void for_chunks(const std::vector<DiagonalChunk>& tensors, const F& f) {
  std::vector<int64_t> starts{0};  // elements are counted over all tensors; the last entry is the total
  starts.reserve(tensors.size() + 1);
  for (const DiagonalChunk& tensor : tensors) {
    starts.push_back(starts.back() + tensor.length);
  }
  at::parallel_for(0, starts.back(), grain_size, [&](int64_t begin, int64_t end) {
    // The chunks whose first element is in [begin, end).
    size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; t < tensors.size() && starts[t] < end; ++t) {
      const int64_t first = std::max<int64_t>(begin - starts[t], 0);
      const int64_t stop = std::min(end - starts[t], tensors[t].length);
      for (int64_t i = (first + chunk_size - 1) / chunk_size; i * chunk_size < stop; ++i) {
        const int64_t start = i * chunk_size;
        f(t, i, part_at(tensors[t], start, std::min(chunk_size, tensors[t].length - start)));
      }
    }
  });
}

}  // namespace rootfree::cpu
