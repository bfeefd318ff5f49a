// torch.ops.rootfree_native on CUDA tensors: check the arguments and call the launchers.
//
// A CUDA graph can capture the calls: they read no value from the device, allocate nothing and never synchronize.

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

// Return the address of a tensor's memory. Raise unless it is contiguous, of `dtype`, on `device`, and has at least
// `numel` elements: the kernels would read past the end of a smaller one.
template <class T>
T* checked_pointer(const Tensor& x, const char* name, ScalarType dtype, int64_t numel, at::Device device) {
  TORCH_CHECK(x.scalar_type() == dtype && x.device() == device && x.is_contiguous() && x.numel() >= numel, name,
              " has dtype ", x.scalar_type(), ", shape ", x.sizes(), " and strides ", x.strides(), " on ", x.device(),
              ": pass a contiguous tensor of ", dtype, " with at least ", numel, " elements on ", device, ".");
  return static_cast<T*>(x.data_ptr());
}

// Return the number of rows of a table of addresses, each of which has 8 columns.
int64_t num_rows(const Tensor& table, const char* name) {
  TORCH_CHECK(table.dim() == 1 || (table.dim() == 2 && table.size(1) == 8), name, " has shape ", table.sizes(),
              ": pass a table of shape [n, 8], or the same flattened to one axis.");
  TORCH_CHECK(table.numel() % 8 == 0, name, " has ", table.numel(), " elements: pass 8 for each row.");
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

// Return the rounding mode with this index. Tensors that are not BF16 are always rounded to nearest.
Rounding rounding_of(int64_t mode, Dtype dtype, const char* name) {
  TORCH_CHECK(mode >= 0 && mode <= 2, name, " is ", mode, ": pass 0 (nearest), 1 (stochastic) or 2 (compensated).");
  return dtype == Dtype::bf16 ? static_cast<Rounding>(mode) : Rounding::nearest;
}

void rf_rmsprop_cuda(const Tensor& rows,        // int64 [n, 8]
                     const Tensor& grads,       // int64 [n]
                     const Tensor& owners,      // int32 [programs]
                     const Tensor& counters,    // int64 [n]
                     const Tensor& seeds,       // int32 [n], or any one element if seed_stride is 0
                     const Tensor& steps,       // int64 [n], or one element if step_stride is 0
                     const Tensor& lr,          // float32 [1]
                     const Tensor& grad_scale,  // float32 [1]
                     const Tensor& found_inf,   // float32 [1]
                     int64_t seed_stride, int64_t step_stride, int64_t step, double lr_value, double sign, double decay,
                     double growth, double momentum, double damping, double weight_decay, double decoupled_decay,
                     ScalarType param, ScalarType grad, ScalarType square, ScalarType buffer, int64_t rounding,
                     int64_t weight_rounding) {
  const at::Device device = rows.device();
  const int64_t n = num_rows(rows, "rows");
  if (n == 0) return;
  const DiagonalDtypes dtypes{dtype_of(param, "param"), dtype_of(grad, "grad"), dtype_of(square, "square"),
                              dtype_of(buffer, "buffer")};
  TORCH_CHECK(is_supported(dtypes), "there is no kernel for parameters of ", param, ", gradients of ", grad,
              ", squares of ", square, " and buffers of ", buffer,
              ": pass gradients in FP32 or the parameters' dtype, and squares and buffers in FP32 or BF16.");

  DiagonalArguments arguments{};
  arguments.rows = checked_pointer<DiagonalRow>(rows, "rows", ScalarType::Long, 8 * n, device);
  arguments.grads = checked_pointer<int64_t>(grads, "grads", ScalarType::Long, n, device);
  arguments.owners = checked_pointer<int32_t>(owners, "owners", ScalarType::Int, 0, device);
  arguments.counters = checked_pointer<unsigned long long>(counters, "counters", ScalarType::Long, n, device);
  arguments.seeds = checked_pointer<int32_t>(seeds, "seeds", ScalarType::Int, (n - 1) * seed_stride + 1, device);
  arguments.steps = checked_pointer<int64_t>(steps, "steps", ScalarType::Long, (n - 1) * step_stride + 1, device);
  arguments.lr = checked_pointer<float>(lr, "lr", ScalarType::Float, 1, device);
  arguments.grad_scale = checked_pointer<float>(grad_scale, "grad_scale", ScalarType::Float, 1, device);
  arguments.found_inf = checked_pointer<float>(found_inf, "found_inf", ScalarType::Float, 1, device);
  arguments.seed_stride = seed_stride;
  arguments.step_stride = step_stride;
  arguments.step = step;
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

void clipped_momentum_cuda(const Tensor& sides,      // int64 [sides, 8]
                           const Tensor& owners,     // int32 [programs]
                           const Tensor& sums,       // float32 [programs]
                           const Tensor& found_inf,  // float32 [1]
                           const Tensor& clips,      // float32 [sides, L]
                           double riemannian_momentum, ScalarType dtype, int64_t clip) {
  const at::Device device = sides.device();
  const int64_t num_sides = num_rows(sides, "sides"), programs = owners.numel();
  TORCH_CHECK(clips.dim() == 2 && clips.size(0) == num_sides, "clips has shape ", clips.sizes(),
              ": pass a tensor of shape [sides, L], where sides is ", num_sides, " here.");
  TORCH_CHECK(clip >= 0 && clip <= 2, "clip is ", clip, ": pass 0 (frobenius), 1 (row_sum) or 2 (none).");
  TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype is ", dtype,
              ": pass momenta of torch.float32 or torch.bfloat16.");

  MomentumArguments arguments{};
  arguments.sides = checked_pointer<SideRow>(sides, "sides", ScalarType::Long, 8 * num_sides, device);
  arguments.owners = checked_pointer<int32_t>(owners, "owners", ScalarType::Int, 0, device);
  arguments.sums = checked_pointer<float>(sums, "sums", ScalarType::Float, programs, device);
  arguments.found_inf = checked_pointer<float>(found_inf, "found_inf", ScalarType::Float, 1, device);
  arguments.clips = checked_pointer<float>(clips, "clips", ScalarType::Float, 0, device);
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

// Return how many elements of a tensor one program of rf_rmsprop works on. The Python caller counts programs by it.
TORCH_LIBRARY_FRAGMENT(rootfree_native, m) {
  m.def("cuda_chunk() -> int", []() -> int64_t { return rootfree::cuda::kDiagonalChunk; });
}
