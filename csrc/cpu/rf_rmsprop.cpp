// torch.ops.rootfree_native.rf_rmsprop on a CPU: the diagonal step of a list of tensors, in one pass.
//
// Threads share the numbers of all tensors evenly, in chunks of one tensor each. A result does not depend on how.

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

constexpr int64_t chunk = 1 << 14;
constexpr int64_t grain = 1 << 15;  // numbers that are worth another thread

// ---- tensors --------------------------------------------------------------------------------------------------------

// How lists of tensors are stored: parameters and s in these modes.
struct Modes {
  Rounding weight, square;

  bool is_stochastic() const { return weight == Rounding::stochastic || square == Rounding::stochastic; }
};

std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// Raise unless all tensors of a list are of one dtype that kernels know.
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

void check_length(const char* name, at::TensorList tensors, at::TensorList params, bool may_be_empty) {
  TORCH_CHECK_VALUE(tensors.size() == params.size() || (may_be_empty && tensors.empty()), tensors.size(), " ", name,
                    " for ", params.size(), " parameters: pass one for each.");
}

// What a parameter is stepped with; residuals may be undefined.
struct Member {
  at::Tensor param, square, buffer, square_residual, weight_residual, grad;

  // Whether the numbers of all tensors lie alike in memory: row by row or, where no random bits need their index, in
  // any order without gaps.
  bool lies_alike(bool in_any_order) const {
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

  void check_shapes() const {
    for (const at::Tensor* x : {&square, &buffer, &square_residual, &weight_residual, &grad}) {
      TORCH_CHECK_VALUE(!x->defined() || x->sizes() == param.sizes(), "a tensor of shape ", x->sizes(),
                        " next to a parameter of shape ", param.sizes(), ": pass tensors of one shape.");
    }
  }

  Member contiguous() const {
    const auto copy = [](const at::Tensor& x) { return x.defined() ? x.contiguous() : x; };
    return {copy(param), copy(square), copy(buffer), copy(square_residual), copy(weight_residual), copy(grad)};
  }

  void write_back(const Member& original) const {
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

  DiagonalPiece piece(const Modes& modes, uint32_t weight_key, uint32_t square_key) const {
    const auto lower = [](const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr<int16_t>() : nullptr; };
    return {{numbers_of(param), lower(weight_residual), modes.weight, weight_key},
            {numbers_of(square), lower(square_residual), modes.square, square_key},
            numbers_of(buffer),
            numbers_of(grad),
            0,
            param.numel()};
  }
};

// ---- the step -------------------------------------------------------------------------------------------------------

Stored part_of(const Stored& x, int64_t start) {
  return {x.value.from(start), x.residual ? x.residual + start : nullptr, x.rounding, x.key};
}

DiagonalPiece part_of(const DiagonalPiece& x, int64_t start, int64_t length) {
  return {part_of(x.param, start), part_of(x.square, start), x.buffer.from(start), x.grad.from(start),
          static_cast<uint32_t>(start), length};
}

// Step those chunks of all tensors whose first number is one of [begin, end), counted over all tensors; `starts` says
// where each begins. Tensors that leave a number out are marked.
void step_chunks(const std::vector<DiagonalPiece>& tensors, const DiagonalNumbers& numbers,
                 const std::vector<int64_t>& starts, int64_t begin, int64_t end,
                 std::vector<std::atomic<bool>>& left_out) {
  const Kernels& k = kernels();
  size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  for (; t < tensors.size() && starts[t] < end; ++t) {
    const int64_t behind = std::max<int64_t>(begin - starts[t], 0);
    const int64_t stop = std::min(end - starts[t], tensors[t].length);
    for (int64_t start = (behind + chunk - 1) / chunk * chunk; start < stop; start += chunk) {
      const int64_t length = std::min(chunk, tensors[t].length - start);
      if (k.rf_rmsprop(part_of(tensors[t], start, length), numbers)) {
        left_out[t].store(true, std::memory_order_relaxed);
      }
    }
  }
}

// Step all tensors; `skipped` are their counts of steps that left a number out.
void step_all(const std::vector<DiagonalPiece>& tensors, const DiagonalNumbers& numbers,
              const std::vector<int32_t*>& skipped) {
  std::vector<int64_t> starts{0};
  starts.reserve(tensors.size() + 1);
  for (const DiagonalPiece& tensor : tensors) {
    starts.push_back(starts.back() + tensor.length);
  }
  std::vector<std::atomic<bool>> left_out(tensors.size());
  at::parallel_for(0, starts.back(), grain, [&](int64_t begin, int64_t end) {
    step_chunks(tensors, numbers, starts, begin, end, left_out);
  });
  for (size_t t = 0; t < tensors.size(); ++t) {
    *skipped[t] += left_out[t];
  }
}

void rf_rmsprop(at::TensorList params, at::TensorList squares, at::TensorList buffers, at::TensorList skipped,
                at::TensorList square_residuals, at::TensorList weight_residuals, at::TensorList grads,
                const at::Tensor& lr, const at::Tensor& seeds, const at::Tensor& steps,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf, double batch_size, double beta2,
                double gamma, double momentum, double damping, double weight_decay, bool decoupled, bool maximize,
                c10::string_view rounding, c10::string_view weight_rounding) {
  if (params.empty()) {
    return;
  }
  for (const auto& [name, tensors] : {std::pair("squares", squares), std::pair("buffers", buffers),
                                      std::pair("skipped", skipped), std::pair("grads", grads)}) {
    check_length(name, tensors, params, false);
  }
  check_length("square_residuals", square_residuals, params, true);
  check_length("weight_residuals", weight_residuals, params, true);
  check_dtypes("params", params, true);
  check_dtypes("squares", squares, false);
  check_dtypes("buffers", buffers, false);
  const Modes modes{rounding_of(weight_rounding, !weight_residuals.empty(), params[0].scalar_type()),
                    rounding_of(rounding, !square_residuals.empty(), squares[0].scalar_type())};
  const bool overflow = value_of(found_inf, 0.0f) != 0;
  const auto rate = lr.item<float>(), decay = static_cast<float>(weight_decay);
  const DiagonalNumbers numbers{overflow ? NAN : (maximize ? -1.0f : 1.0f) / value_of(grad_scale, 1.0f),
                                rate,
                                static_cast<float>(1 - beta2 * gamma),
                                static_cast<float>(beta2 * batch_size),
                                static_cast<float>(momentum),
                                static_cast<float>(damping),
                                decoupled ? 0.0f : decay,
                                decoupled ? rate * decay : 0.0f};

  const Draws draws(seeds, steps);
  std::vector<Member> members;
  std::vector<std::pair<size_t, Member>> copied;  // the originals of those that are copies
  std::vector<DiagonalPiece> pieces;
  std::vector<int32_t*> counts;
  members.reserve(params.size());
  pieces.reserve(params.size());
  for (size_t t = 0; t < params.size(); ++t) {
    const at::Tensor none;
    const bool is_double = grads[t].scalar_type() == at::kDouble;
    members.push_back({params[t], squares[t], buffers[t], square_residuals.empty() ? none : square_residuals[t],
                       weight_residuals.empty() ? none : weight_residuals[t],
                       is_double ? grads[t].to(at::kFloat) : grads[t]});
    members[t].check_shapes();
    counts.push_back(skipped[t].mutable_data_ptr<int32_t>());
    if (!members[t].lies_alike(!modes.is_stochastic())) {
      copied.emplace_back(t, members[t]);
      members[t] = members[t].contiguous();
    }
    const auto key = [&](Rounding mode, Slot slot) { return mode == Rounding::stochastic ? draws.key(t, slot) : 0u; };
    pieces.push_back(members[t].piece(modes, key(modes.weight, slot_weight), key(modes.square, slot_square)));
  }
  step_all(pieces, numbers, counts);
  for (const auto& [t, original] : copied) {
    members[t].write_back(original);
  }
  for (const at::TensorList& tensors : {params, squares, buffers, skipped, square_residuals, weight_residuals}) {
    for (const at::Tensor& x : tensors) {
      changed(x);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(rootfree_native, CPU, m) { m.impl("rf_rmsprop", &rf_rmsprop); }

}  // namespace rootfree::cpu
