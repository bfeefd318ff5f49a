// What PyTorch calls: torch.ops.rootfree_native on CUDA tensors. Arguments are checked, no value on the device is read,
// and nothing is allocated or waited for, so that a CUDA graph can capture the calls.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "clipped_momentum.h"
#include "rf_rmsprop.h"

namespace rootfree::cuda {
namespace {

using at::ScalarType;
using at::Tensor;

// The memory of a contiguous tensor of `dtype` on `device` that has `numel` numbers or more.
template <class T>
T* memory_of(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, at::Device device) {
  TORCH_CHECK(x.scalar_type() == dtype && x.device() == device && x.is_contiguous() && x.numel() >= numel, name,
              " is a tensor of ", x.scalar_type(), " ", x.sizes(), " with strides ", x.strides(), " on ", x.device(),
              ": pass a contiguous one of ", dtype, " with at least ", numel, " numbers on ", device, ".");
  return static_cast<T*>(x.data_ptr());
}

int64_t num_rows(const Tensor& table, const char* name) {
  TORCH_CHECK(table.dim() == 1 || (table.dim() == 2 && table.size(1) == 8), name, " has shape ", table.sizes(),
              ": pass a table [n, 8], or its numbers in one row.");
  TORCH_CHECK(table.numel() % 8 == 0, name, " has ", table.numel(), " numbers: pass 8 for each row.");
  return table.numel() / 8;
}

Dtype dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    default:
      TORCH_CHECK(false, name, " is ", dtype, ": pass torch.float32, torch.bfloat16 or torch.float16.");
  }
}

// A mode of rounding; only BF16 knows any but 0.
Rounding rounding_of(int64_t mode, Dtype dtype, const char* name) {
  TORCH_CHECK(mode >= 0 && mode <= 2, name, " is ", mode, ": pass 0 (nearest), 1 (stochastic) or 2 (compensated).");
  return dtype == Dtype::bf16 ? static_cast<Rounding>(mode) : Rounding::nearest;
}

void rf_rmsprop_cuda(const Tensor& rows, const Tensor& grads, const Tensor& owners, const Tensor& counters,
                     const Tensor& seeds, const Tensor& steps, const Tensor& lr, const Tensor& grad_scale,
                     const Tensor& found_inf, int64_t seed_stride, int64_t step_stride, double step, double lr_value,
                     double sign, double decay, double growth, double momentum, double damping, double weight_decay,
                     double decoupled_decay, ScalarType param, ScalarType grad, ScalarType square, ScalarType buffer,
                     int64_t rounding, int64_t weight_rounding) {
  const at::Device device = rows.device();
  const int64_t n = num_rows(rows, "rows");
  if (n == 0) return;
  const DiagonalDtypes dtypes{dtype_of(param, "param"), dtype_of(grad, "grad"), dtype_of(square, "square"),
                              dtype_of(buffer, "buffer")};
  TORCH_CHECK(is_served(dtypes), "no kernel has parameters of ", param, ", gradients of ", grad, ", s of ", square,
              " and m of ", buffer, ": pass gradients of FP32 or of the parameters' dtype, and FP32 or BF16 state.");

  DiagonalArguments arguments{};
  arguments.rows = memory_of<DiagonalRow>(rows, "rows", ScalarType::Long, 8 * n, device);
  arguments.grads = memory_of<int64_t>(grads, "grads", ScalarType::Long, n, device);
  arguments.owners = memory_of<int32_t>(owners, "owners", ScalarType::Int, 0, device);
  arguments.counters = memory_of<unsigned long long>(counters, "counters", ScalarType::Long, n, device);
  arguments.seeds = memory_of<int32_t>(seeds, "seeds", ScalarType::Int, (n - 1) * seed_stride + 1, device);
  arguments.steps = memory_of<float>(steps, "steps", ScalarType::Float, (n - 1) * step_stride + 1, device);
  arguments.lr = memory_of<float>(lr, "lr", ScalarType::Float, 1, device);
  arguments.grad_scale = memory_of<float>(grad_scale, "grad_scale", ScalarType::Float, 1, device);
  arguments.found_inf = memory_of<float>(found_inf, "found_inf", ScalarType::Float, 1, device);
  arguments.seed_stride = seed_stride;
  arguments.step_stride = step_stride;
  arguments.step = static_cast<float>(step);
  arguments.lr_value = static_cast<float>(lr_value);
  arguments.sign = static_cast<float>(sign);
  arguments.decay = static_cast<float>(decay);
  arguments.growth = static_cast<float>(growth);
  arguments.momentum = static_cast<float>(momentum);
  arguments.damping = static_cast<float>(damping);
  arguments.weight_decay = static_cast<float>(weight_decay);
  arguments.decoupled_decay = static_cast<float>(decoupled_decay);
  arguments.rounding = rounding_of(rounding, dtypes.square, "rounding");
  arguments.weight_rounding = rounding_of(weight_rounding, dtypes.param, "weight_rounding");

  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(rf_rmsprop(arguments, dtypes, owners.numel(), c10::cuda::getCurrentCUDAStream()));
}

void clipped_momentum_cuda(const Tensor& sides, const Tensor& owners, const Tensor& sums, const Tensor& found_inf,
                           const Tensor& clips, double riemannian_momentum, ScalarType dtype, int64_t clip) {
  const at::Device device = sides.device();
  const int64_t num_sides = num_rows(sides, "sides"), programs = owners.numel();
  TORCH_CHECK(clips.dim() == 2 && clips.size(0) == num_sides, "clips has shape ", clips.sizes(),
              ": pass one of [sides, L], which is [", num_sides, ", L] here.");
  TORCH_CHECK(clip >= 0 && clip <= 2, "clip is ", clip, ": pass 0 (frobenius), 1 (row_sum) or 2 (none).");
  TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype is ", dtype,
              ": pass m of torch.float32 or torch.bfloat16.");

  MomentumArguments arguments{};
  arguments.sides = memory_of<SideRow>(sides, "sides", ScalarType::Long, 8 * num_sides, device);
  arguments.owners = memory_of<int32_t>(owners, "owners", ScalarType::Int, 0, device);
  arguments.sums = memory_of<float>(sums, "sums", ScalarType::Float, programs, device);
  arguments.found_inf = memory_of<float>(found_inf, "found_inf", ScalarType::Float, 1, device);
  arguments.clips = memory_of<float>(clips, "clips", ScalarType::Float, 0, device);
  arguments.alpha = static_cast<float>(riemannian_momentum);
  arguments.one_minus_alpha = static_cast<float>(1.0 - riemannian_momentum);
  arguments.num_sides = static_cast<int>(num_sides);
  arguments.num_blocks = clips.size(1);

  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(clipped_momentum(arguments, dtype_of(dtype, "dtype"), static_cast<Clip>(clip), programs,
                                  c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace rootfree::cuda

TORCH_LIBRARY_IMPL(rootfree_native, CUDA, m) {
  m.impl("rf_rmsprop_table", &rootfree::cuda::rf_rmsprop_cuda);
  m.impl("clipped_momentum", &rootfree::cuda::clipped_momentum_cuda);
}

// How many numbers of a tensor a program of rf_rmsprop works on: the caller cuts tensors up by it.
TORCH_LIBRARY_FRAGMENT(rootfree_native, m) {
  m.def("cuda_chunk() -> int", []() -> int64_t { return rootfree::cuda::kDiagonalChunk; });
}
