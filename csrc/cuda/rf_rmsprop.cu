// RF-RMSProp and RF-AdaGrad: the whole step of a list of tensors in one launch.
//
//     s <- (1 - beta2 gamma) s + beta2 B g^2,    m <- alpha1 m + g / (s + lambda) + kappa mu,    mu <- mu - beta1 m
//
// A program takes a chunk of one tensor. If all tensors of a row of the table are aligned to 16 bytes, a thread takes 4
// or 8 neighbouring elements at a time. It takes the remaining elements, and tensors that are not aligned, one by one.
//
// If any program of a tensor skipped an element, the last one to finish adds 1 to `skipped`. A counter tells which one
// is the last. That program resets the counter to 0, so that a CUDA graph can replay the launch.

#include "rf_rmsprop.h"

#include "vector_access.h"

namespace rootfree::cuda {
namespace {

constexpr int kThreads = 256;

// Elements that a thread takes at a time: 4 if any stored tensor is FP32, else 8. That is 128 bits of the widest dtype,
// so that neighbouring threads store without gaps. If it is 8, FP32 gradients are read in two accesses.
template <Dtype... STORED>
constexpr int kVector = ((STORED == Dtype::fp32) || ...) ? 4 : 8;

// Programs that share a multiprocessor, at least. This leaves a thread 64 registers, or 80 if it holds 8 elements.
// Either way at least 40 KiB of loads are in flight, several times what it takes to hide the latency of memory.
template <Dtype... STORED>
constexpr int kMinPrograms = kVector<STORED...> == 4 ? 4 : 3;

// ---- kernel ---------------------------------------------------------------------------------------------------------

// Values that all elements of a program share.
struct ProgramContext {
  DiagonalRow row;
  int64_t grad;
  DiagonalScalars scalars;
  Rounding square_rounding, weight_rounding;
  uint32_t square_key, weight_key;
};

// Convert N stored elements to FP32. The residual is read only if rounding is compensated.
template <Dtype DTYPE, int N>
__device__ __forceinline__ void decode(const AlignedVector<Storage<DTYPE>, N>& value,
                                       const AlignedVector<int16_t, N>& residual, Rounding rounding, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float<DTYPE>(value.val[i]);
  if constexpr (DTYPE == Dtype::bf16) {
    if (rounding != Rounding::compensated) return;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = join_compensated(value.val[i], residual.val[i]);
  }
}

// Round x to DTYPE by the rounding mode and store it. `offset` is the index of x[0] in its tensor.
template <Dtype DTYPE, int N>
__device__ __forceinline__ void store(const float (&x)[N], int64_t address, int64_t residual_address, int64_t offset,
                                      Rounding rounding, uint32_t key) {
  AlignedVector<Storage<DTYPE>, N> value;
  if constexpr (DTYPE == Dtype::bf16) {
    if (rounding == Rounding::compensated) {
      AlignedVector<int16_t, N> residual;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value.val[i] = compensated_high(x[i]);
        residual.val[i] = compensated_low(x[i]);
      }
      vector_at<int16_t, N>(residual_address, offset) = residual;
    } else if (rounding == Rounding::stochastic) {
      const auto index = static_cast<uint32_t>(offset);
#pragma unroll
      for (int i = 0; i < N; ++i) value.val[i] = bf16_stochastic(x[i], random_bits(key, index + i));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value.val[i] = bf16_nearest(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) value.val[i] = to_nearest<DTYPE>(x[i]);
  }
  vector_at<Storage<DTYPE>, N>(address, offset) = value;
}

// N neighbouring elements of a parameter, its gradient and its state, in their stored dtypes.
template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER, int N>
struct Elements {
  AlignedVector<Storage<PARAM>, N> param;
  AlignedVector<Storage<GRAD>, N> grad;
  AlignedVector<Storage<SQUARE>, N> square;
  AlignedVector<Storage<BUFFER>, N> buffer;
  AlignedVector<int16_t, N> square_residual, weight_residual;

  __device__ __forceinline__ void load(const ProgramContext& program, int64_t offset) {
    grad = vector_at<Storage<GRAD>, N>(program.grad, offset);
    square = vector_at<Storage<SQUARE>, N>(program.row.square, offset);
    buffer = vector_at<Storage<BUFFER>, N>(program.row.buffer, offset);
    param = vector_at<Storage<PARAM>, N>(program.row.param, offset);
    if (SQUARE == Dtype::bf16 && program.square_rounding == Rounding::compensated)
      square_residual = vector_at<int16_t, N>(program.row.square_residual, offset);
    if (PARAM == Dtype::bf16 && program.weight_rounding == Rounding::compensated)
      weight_residual = vector_at<int16_t, N>(program.row.weight_residual, offset);
  }

  // Step the elements and store them. Return whether all results are finite.
  __device__ __forceinline__ bool step(const ProgramContext& program, int64_t offset) const {
    const DiagonalRow& row = program.row;
    float s[N], m[N], w[N];
    decode<SQUARE>(square, square_residual, program.square_rounding, s);
    decode<PARAM>(param, weight_residual, program.weight_rounding, w);
    bool all_finite = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bool keep;
      const DiagonalValues old{s[i], to_float<BUFFER>(buffer.val[i]), w[i]};
      const DiagonalValues now = diagonal_step(to_float<GRAD>(grad.val[i]), old, program.scalars, keep);
      s[i] = now.square, m[i] = now.buffer, w[i] = now.weight;
      all_finite &= keep;
    }
    store<SQUARE>(s, row.square, row.square_residual, offset, program.square_rounding, program.square_key);
    store<BUFFER>(m, row.buffer, 0, offset, Rounding::nearest, 0);
    store<PARAM>(w, row.param, row.weight_residual, offset, program.weight_rounding, program.weight_key);
    return all_finite;
  }
};

// Collect the values that all elements of a tensor share.
__device__ __forceinline__ ProgramContext program_of(const DiagonalArguments& arguments, int32_t tensor) {
  ProgramContext program{
      arguments.rows[tensor], arguments.grads[tensor], {}, arguments.rounding, arguments.weight_rounding};
  const float lr = arguments.lr_value + *arguments.lr;
  // If GradScaler found an overflow, gradients count as NaN, so that no element changes.
  const float grad_factor = *arguments.found_inf != 0 ? float_of(0x7FC00000u) : arguments.sign / *arguments.grad_scale;
  program.scalars = {grad_factor,
                     lr,
                     arguments.decay,
                     arguments.growth,
                     arguments.momentum,
                     arguments.damping,
                     arguments.weight_decay,
                     lr * arguments.decoupled_decay};
  if (arguments.rounding == Rounding::stochastic || arguments.weight_rounding == Rounding::stochastic) {
    const int32_t seed = arguments.seeds[tensor * arguments.seed_stride];
    const auto step = static_cast<uint32_t>(arguments.step + arguments.steps[tensor * arguments.step_stride]);
    program.square_key = random_key(seed, step, slot_square);
    program.weight_key = random_key(seed, step, slot_weight);
  }
  return program;
}

// Return whether the gradient and every tensor of a row are aligned. The address 0 of a missing residual is.
__device__ __forceinline__ bool is_aligned(const DiagonalRow& row, int64_t grad) {
  const int64_t addresses = row.param | row.square | row.buffer | row.square_residual | row.weight_residual | grad;
  return addresses % kAlignment == 0;
}

// Step the chunk of `length` elements that begins at `start`. Return whether this thread skipped any.
template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER>
__device__ __forceinline__ bool step_chunk(const ProgramContext& program, int64_t start, int length) {
  constexpr int N = kVector<PARAM, SQUARE, BUFFER>;
  const int vectorized = is_aligned(program.row, program.grad) ? length / N * N : 0;
  const int thread = static_cast<int>(threadIdx.x);
  bool all_finite = true;

#pragma unroll 1
  for (int i = thread * N; i < vectorized; i += kThreads * N) {
    Elements<PARAM, GRAD, SQUARE, BUFFER, N> several;
    several.load(program, start + i);
    all_finite &= several.step(program, start + i);
  }
#pragma unroll 1
  for (int i = vectorized + thread; i < length; i += kThreads) {
    Elements<PARAM, GRAD, SQUARE, BUFFER, 1> one;
    one.load(program, start + i);
    all_finite &= one.step(program, start + i);
  }
  return !all_finite;
}

// Count a finished program of a tensor. The last one adds 1 to the tensor's `skipped` if any program skipped elements.
__device__ __forceinline__ void finish(unsigned long long* counter, const DiagonalRow& row, bool skipped_any) {
  const unsigned long long before = atomicAdd(counter, skipped_any ? (1ull << 32) + 1 : 1ull);
  const int64_t programs = (row.size + kDiagonalChunk - 1) / kDiagonalChunk;
  if (static_cast<int64_t>(before & 0xFFFFFFFFull) == programs - 1) {
    *counter = 0;
    if (skipped_any || before >> 32 > 0) ++vector_at<int32_t, 1>(row.skipped, 0).val[0];
  }
}

// Step one chunk of the tensor that `owners` names.
template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER>
__global__ void __launch_bounds__(kThreads, kMinPrograms<PARAM, SQUARE, BUFFER>)
    rf_rmsprop_kernel(const DiagonalArguments arguments) {
  const int32_t tensor = arguments.owners[blockIdx.x];
  const ProgramContext program = program_of(arguments, tensor);
  const int64_t start = (blockIdx.x - program.row.first_program) * kDiagonalChunk;
  const int64_t left = program.row.size - start;
  const int length = left < kDiagonalChunk ? static_cast<int>(left) : kDiagonalChunk;
  const bool skipped_any = step_chunk<PARAM, GRAD, SQUARE, BUFFER>(program, start, length);
  const bool program_skipped_any = __syncthreads_or(skipped_any);
  if (threadIdx.x == 0) finish(arguments.counters + tensor, program.row, program_skipped_any);
}

// ---- configuration --------------------------------------------------------------------------------------------------

// Every combination of dtypes is a kernel of its own. These functions turn dtypes known at run time into template
// arguments, one or two at a time.
using Kernel = void (*)(DiagonalArguments);

template <Dtype PARAM, Dtype GRAD, Dtype SQUARE>
Kernel kernel_of(Dtype buffer) {
  return buffer == Dtype::fp32   ? rf_rmsprop_kernel<PARAM, GRAD, SQUARE, Dtype::fp32>
         : buffer == Dtype::bf16 ? rf_rmsprop_kernel<PARAM, GRAD, SQUARE, Dtype::bf16>
                                 : nullptr;
}

template <Dtype PARAM, Dtype GRAD>
Kernel kernel_of(Dtype square, Dtype buffer) {
  return square == Dtype::fp32   ? kernel_of<PARAM, GRAD, Dtype::fp32>(buffer)
         : square == Dtype::bf16 ? kernel_of<PARAM, GRAD, Dtype::bf16>(buffer)
                                 : nullptr;
}

// Return the kernel of these dtypes, or nullptr.
Kernel kernel_of(const DiagonalDtypes& dtypes) {
  constexpr Dtype fp32 = Dtype::fp32, bf16 = Dtype::bf16, fp16 = Dtype::fp16;
  const auto [param, grad, square, buffer] = dtypes;
  if (param == fp32 && grad == fp32) return kernel_of<fp32, fp32>(square, buffer);
  if (param == fp32 && grad == bf16) return kernel_of<fp32, bf16>(square, buffer);
  if (param == bf16 && grad == bf16) return kernel_of<bf16, bf16>(square, buffer);
  if (param == bf16 && grad == fp32) return kernel_of<bf16, fp32>(square, buffer);
  if (param == fp16 && grad == fp16) return kernel_of<fp16, fp16>(square, buffer);
  if (param == fp16 && grad == fp32) return kernel_of<fp16, fp32>(square, buffer);
  return nullptr;
}

}  // namespace

// ---- launcher -------------------------------------------------------------------------------------------------------

bool is_supported(const DiagonalDtypes& dtypes) { return kernel_of(dtypes) != nullptr; }

cudaError_t rf_rmsprop(const DiagonalArguments& arguments, const DiagonalDtypes& dtypes, int64_t programs,
                       cudaStream_t stream) {
  const Kernel kernel = kernel_of(dtypes);
  return kernel == nullptr ? cudaErrorInvalidValue : launch(kernel, programs, kThreads, stream, arguments);
}

}  // namespace rootfree::cuda
