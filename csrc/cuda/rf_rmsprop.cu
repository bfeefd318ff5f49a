// RF-RMSProp and RF-AdaGrad: the whole diagonal step of a list of tensors in one launch.
//
//     s <- (1 - beta2 gamma) s + beta2 B g^2,    m <- alpha1 m + g / (s + lambda) + kappa mu,    mu <- mu - beta1 m
//
// A program takes a chunk of one tensor. Where all tensors of a row begin on 16 bytes, a thread takes 4 or 8
// neighbouring numbers at a time, the same ones of each; what is left, and all else, goes number by number.
//
// The last program of a tensor to finish counts the step in `skipped` where any of them left a number out. Which one is
// the last is told by a counter that it sets back to 0: the same launch can be replayed in a CUDA graph.

#include "rf_rmsprop.h"

#include "stored.h"

namespace rootfree::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes 4 numbers at a time where FP32 is stored, else 8: 128 bits of what is stored widest, so that
// neighbouring threads store without gaps. FP32 gradients next to 8 narrow numbers are read in two halves.
template <Dtype... STORED>
constexpr int kVector = ((STORED == Dtype::fp32) || ...) ? 4 : 8;

// Programs that share a multiprocessor, at least: 64 registers a thread, or 80 where it holds 8 numbers. Either way
// 40 KiB or more are on their way, several times what the memory's latency needs.
template <Dtype... STORED>
constexpr int kMinPrograms = kVector<STORED...> == 4 ? 4 : 3;

// ---- kernel ---------------------------------------------------------------------------------------------------------

// What is the same for all numbers of a program.
struct Program {
  DiagonalRow row;
  int64_t grad;
  DiagonalNumbers numbers;
  Rounding square_rounding, weight_rounding;
  uint32_t square_key, weight_key;
};

template <Dtype DTYPE, int N>
__device__ __forceinline__ void decode(const Pack<Storage<DTYPE>, N>& value, const Pack<int16_t, N>& residual,
                                       Rounding rounding, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float<DTYPE>(value.at[i]);
  if constexpr (DTYPE == Dtype::bf16) {
    if (rounding != Rounding::compensated) return;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = join_compensated(value.at[i], residual.at[i]);
  }
}

// Round x as its dtype and mode want, and store it; `index` is that of x[0] in its tensor.
template <Dtype DTYPE, int N>
__device__ __forceinline__ void store(const float (&x)[N], int64_t address, int64_t residual_address, int64_t offset,
                                      Rounding rounding, uint32_t key) {
  Pack<Storage<DTYPE>, N> value;
  if constexpr (DTYPE == Dtype::bf16) {
    if (rounding == Rounding::compensated) {
      Pack<int16_t, N> residual;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value.at[i] = compensated_high(x[i]);
        residual.at[i] = compensated_low(x[i]);
      }
      pack_at<int16_t, N>(residual_address, offset) = residual;
    } else if (rounding == Rounding::stochastic) {
      const auto index = static_cast<uint32_t>(offset);
#pragma unroll
      for (int i = 0; i < N; ++i) value.at[i] = bf16_stochastic(x[i], random_bits(key, index + i));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) value.at[i] = bf16_nearest(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) value.at[i] = to_nearest<DTYPE>(x[i]);
  }
  pack_at<Storage<DTYPE>, N>(address, offset) = value;
}

// N neighbouring numbers of all tensors of a row, as they are stored.
template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER, int N>
struct Numbers {
  Pack<Storage<PARAM>, N> param;
  Pack<Storage<GRAD>, N> grad;
  Pack<Storage<SQUARE>, N> square;
  Pack<Storage<BUFFER>, N> buffer;
  Pack<int16_t, N> square_residual, weight_residual;

  __device__ __forceinline__ void load(const Program& program, int64_t offset) {
    grad = pack_at<Storage<GRAD>, N>(program.grad, offset);
    square = pack_at<Storage<SQUARE>, N>(program.row.square, offset);
    buffer = pack_at<Storage<BUFFER>, N>(program.row.buffer, offset);
    param = pack_at<Storage<PARAM>, N>(program.row.param, offset);
    if (SQUARE == Dtype::bf16 && program.square_rounding == Rounding::compensated)
      square_residual = pack_at<int16_t, N>(program.row.square_residual, offset);
    if (PARAM == Dtype::bf16 && program.weight_rounding == Rounding::compensated)
      weight_residual = pack_at<int16_t, N>(program.row.weight_residual, offset);
  }

  // Step the numbers and store them; whether all were finite.
  __device__ __forceinline__ bool step(const Program& program, int64_t offset) const {
    const DiagonalRow& row = program.row;
    float s[N], m[N], w[N];
    decode<SQUARE>(square, square_residual, program.square_rounding, s);
    decode<PARAM>(param, weight_residual, program.weight_rounding, w);
    bool all_finite = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bool keep;
      const DiagonalValues old{s[i], to_float<BUFFER>(buffer.at[i]), w[i]};
      const DiagonalValues now = diagonal_step(to_float<GRAD>(grad.at[i]), old, program.numbers, keep);
      s[i] = now.square, m[i] = now.buffer, w[i] = now.weight;
      all_finite &= keep;
    }
    store<SQUARE>(s, row.square, row.square_residual, offset, program.square_rounding, program.square_key);
    store<BUFFER>(m, row.buffer, 0, offset, Rounding::nearest, 0);
    store<PARAM>(w, row.param, row.weight_residual, offset, program.weight_rounding, program.weight_key);
    return all_finite;
  }
};

__device__ __forceinline__ Program program_of(const DiagonalArguments& arguments, int32_t tensor) {
  Program program{arguments.rows[tensor], arguments.grads[tensor], {}, arguments.rounding, arguments.weight_rounding};
  const float lr = arguments.lr_value + *arguments.lr;
  // Where GradScaler found an overflow, gradients count as NaN, so that no number steps.
  const float grad_factor = *arguments.found_inf != 0 ? float_of(0x7FC00000u) : arguments.sign / *arguments.grad_scale;
  program.numbers = {grad_factor,        lr,                arguments.decay,        arguments.growth,
                     arguments.momentum, arguments.damping, arguments.weight_decay, lr * arguments.decoupled_decay};
  if (arguments.rounding == Rounding::stochastic || arguments.weight_rounding == Rounding::stochastic) {
    const int32_t seed = arguments.seeds[tensor * arguments.seed_stride];
    const float step = arguments.step + arguments.steps[tensor * arguments.step_stride];
    program.square_key = random_key(seed, step, slot_square);
    program.weight_key = random_key(seed, step, slot_weight);
  }
  return program;
}

// Whether every tensor of a row begins on 16 bytes; residuals that there are not have address 0.
__device__ __forceinline__ bool is_aligned(const DiagonalRow& row, int64_t grad) {
  const int64_t addresses = row.param | row.square | row.buffer | row.square_residual | row.weight_residual | grad;
  return addresses % kAlignment == 0;
}

// Step a chunk of `length` numbers from `start` on; whether this thread left any out.
template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER>
__device__ __forceinline__ bool step_chunk(const Program& program, int64_t start, int length) {
  constexpr int N = kVector<PARAM, SQUARE, BUFFER>;
  const int whole = is_aligned(program.row, program.grad) ? length / N * N : 0;
  const int thread = static_cast<int>(threadIdx.x);
  bool all_finite = true;

#pragma unroll 1
  for (int i = thread * N; i < whole; i += kThreads * N) {
    Numbers<PARAM, GRAD, SQUARE, BUFFER, N> several;
    several.load(program, start + i);
    all_finite &= several.step(program, start + i);
  }
#pragma unroll 1
  for (int i = whole + thread; i < length; i += kThreads) {
    Numbers<PARAM, GRAD, SQUARE, BUFFER, 1> one;
    one.load(program, start + i);
    all_finite &= one.step(program, start + i);
  }
  return !all_finite;
}

// Count a program of a tensor; the last one counts the step in `skipped` where any was bad.
__device__ __forceinline__ void finish(unsigned long long* counter, const DiagonalRow& row, bool bad) {
  const unsigned long long before = atomicAdd(counter, bad ? (1ull << 32) + 1 : 1ull);
  const int64_t programs = (row.size + kDiagonalChunk - 1) / kDiagonalChunk;
  if (static_cast<int64_t>(before & 0xFFFFFFFFull) == programs - 1) {
    *counter = 0;
    if (bad || before >> 32 > 0) ++pack_at<int32_t, 1>(row.skipped, 0).at[0];
  }
}

template <Dtype PARAM, Dtype GRAD, Dtype SQUARE, Dtype BUFFER>
__global__ void __launch_bounds__(kThreads, kMinPrograms<PARAM, SQUARE, BUFFER>)
    rf_rmsprop_kernel(const DiagonalArguments arguments) {
  const int32_t tensor = arguments.owners[blockIdx.x];
  const Program program = program_of(arguments, tensor);
  const int64_t start = (blockIdx.x - program.row.first_program) * kDiagonalChunk;
  const int64_t left = program.row.size - start;
  const int length = left < kDiagonalChunk ? static_cast<int>(left) : kDiagonalChunk;
  const bool bad = step_chunk<PARAM, GRAD, SQUARE, BUFFER>(program, start, length);
  const bool any_bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) finish(arguments.counters + tensor, program.row, any_bad);
}

// ---- configuration --------------------------------------------------------------------------------------------------

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

// The kernel of these dtypes, or nullptr.
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

bool is_served(const DiagonalDtypes& dtypes) { return kernel_of(dtypes) != nullptr; }

cudaError_t rf_rmsprop(const DiagonalArguments& arguments, const DiagonalDtypes& dtypes, int64_t programs,
                       cudaStream_t stream) {
  const Kernel kernel = kernel_of(dtypes);
  return kernel == nullptr ? cudaErrorInvalidValue : launch(kernel, programs, kThreads, stream, arguments);
}

}  // namespace rootfree::cuda
