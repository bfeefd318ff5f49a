// The normalised Riemannian momentum of a list of tensors [L, ...] of any sizes, in two launches.
//
//     m <- alpha2 m + (1 - alpha2) delta,    factor <- 1 / max(1, norm of m)
//
// The first launch sums up the norm of the new m, the second decides which blocks are finite on all sides, makes the
// factors and writes m. Both compute the new m from the old one: to read it twice costs no more than to write it in
// between, and less where m is BF16. A program takes a share of one block; sums are added up in the same order every
// time, whatever the GPU.

#include "clipped_momentum.h"

#include <cmath>

#include "stored.h"

namespace rootfree::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kMinNorms = 4;  // of norms_kernel on a multiprocessor; left to itself, ptxas wants 8, and spills for that
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// How many numbers a thread takes at a time: 128 bits of m. Next to BF16, delta is read in two halves.
template <Dtype M>
constexpr int kVector = M == Dtype::fp32 ? 4 : 8;

// ---- kernels --------------------------------------------------------------------------------------------------------

struct Sum {
  static __device__ __forceinline__ float of(float x, float y) { return x + y; }
};

// Of numbers among which there is no NaN, which it would lose.
struct Maximum {
  static __device__ __forceinline__ float of(float x, float y) { return fmaxf(x, y); }
};

__device__ __forceinline__ float finite_or_infinity(float x) { return is_finite(x) ? x : float_of(0x7F800000u); }

// x of all lanes of a warp taken together, the same bits on each of them.
template <class Operation>
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = Operation::of(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// x of all threads of a program taken together, on its first thread.
template <class Operation>
__device__ __forceinline__ float over_program(float x) {
  __shared__ float of_warps[kWarps];
  x = over_warp<Operation>(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = Operation::of(x, of_warps[warp]);
  return x;
}

// What a program works on: `length` numbers of a block of a side, from these addresses on.
template <Dtype M>
struct Share {
  int32_t side;
  SideRow row;
  int64_t block, share, momentum, delta, length;

  __device__ __forceinline__ explicit Share(const MomentumArguments& arguments)
      : side(arguments.owners[blockIdx.x]), row(arguments.sides[side]) {
    const auto index = static_cast<uint32_t>(blockIdx.x - row.first_program);
    const auto shares = static_cast<uint32_t>(row.shares);
    block = index / shares, share = index % shares;
    const int64_t start = share * row.share_size, left = row.size - start;
    length = left < row.share_size ? left : row.share_size;
    momentum = row.momentum + (block * row.size + start) * static_cast<int64_t>(sizeof(Storage<M>));
    delta = row.delta + (block * row.size + start) * static_cast<int64_t>(sizeof(float));
  }

  // How many of the first `n` numbers can be accessed several at a time.
  __device__ __forceinline__ int64_t whole(int64_t n) const {
    return (momentum | delta) % kAlignment == 0 ? n / kVector<M> * kVector<M> : 0;
  }
};

// The new m of N numbers from `offset` on.
template <Dtype M, int N>
__device__ __forceinline__ Pack<float, N> new_momentum(const MomentumArguments& arguments, const Share<M>& share,
                                                       int64_t offset) {
  const auto m = pack_at<Storage<M>, N>(share.momentum, offset);
  auto x = pack_at<float, N>(share.delta, offset);
#pragma unroll
  for (int i = 0; i < N; ++i)
    x.at[i] = arguments.alpha * to_float<M>(m.at[i]) + arguments.one_minus_alpha * x.at[i];
  return x;
}

// This thread's part of the sum of |x|, or of x x, over `n` numbers of a share from `start` on, which `threads` threads
// go through together, `thread` one of them.
template <bool SQUARES, Dtype M>
__device__ __forceinline__ float sum_up(const MomentumArguments& arguments, const Share<M>& share, int64_t start,
                                        int64_t n, int64_t whole, int thread, int threads) {
  constexpr int N = kVector<M>;
  float sums[N] = {};
#pragma unroll 2
  for (int64_t i = thread * N; i < whole; i += threads * N) {
    const auto x = new_momentum<M, N>(arguments, share, start + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += SQUARES ? x.at[j] * x.at[j] : fabsf(x.at[j]);
  }
#pragma unroll 1
  for (int64_t i = whole + thread; i < n; i += threads) {
    const float x = new_momentum<M, 1>(arguments, share, start + i).at[0];
    sums[0] += SQUARES ? x * x : fabsf(x);
  }
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// The largest row sum of absolute values among the rows of this warp; infinity where one is not finite.
template <Dtype M>
__device__ __forceinline__ float largest_row_sum(const MomentumArguments& arguments, const Share<M>& share) {
  const int64_t cols = share.row.cols;
  const int64_t whole = cols % kVector<M> == 0 ? share.whole(cols) : 0;
  float largest = 0.0f;
  for (int64_t start = threadIdx.x / kWarp * cols; start < share.length; start += kWarps * cols) {
    const float sum = sum_up<false>(arguments, share, start, cols, whole, threadIdx.x % kWarp, kWarp);
    largest = Maximum::of(largest, finite_or_infinity(over_warp<Sum>(sum)));
  }
  return largest;
}

template <Dtype M, bool ROW_SUM>
__global__ void __launch_bounds__(kThreads, kMinNorms) norms_kernel(const MomentumArguments arguments) {
  const Share<M> share(arguments);
  float norm;
  if constexpr (ROW_SUM) {
    norm = over_program<Maximum>(largest_row_sum(arguments, share));
  } else {
    const int64_t whole = share.whole(share.length);
    norm = over_program<Sum>(sum_up<true>(arguments, share, 0, share.length, whole, threadIdx.x, kThreads));
  }
  if (threadIdx.x == 0) arguments.sums[blockIdx.x] = norm;
}

// The norm of a block of a side, or something that is not finite; every warp computes it for itself.
__device__ __forceinline__ float norm_of(const MomentumArguments& arguments, const SideRow& row, int64_t block,
                                         bool row_sum) {
  const float* sums = arguments.sums + row.first_program + block * row.shares;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < row.shares; i += kWarp)
    total = row_sum ? Maximum::of(total, sums[i]) : total + sums[i];
  return row_sum ? over_warp<Maximum>(total) : sqrtf(over_warp<Sum>(total));
}

template <Dtype M, int N>
__device__ __forceinline__ void step(const MomentumArguments& arguments, const Share<M>& share, int64_t offset) {
  const auto x = new_momentum<M, N>(arguments, share, offset);
  Pack<Storage<M>, N> m;
#pragma unroll
  for (int i = 0; i < N; ++i) m.at[i] = to_nearest<M>(x.at[i]);
  pack_at<Storage<M>, N>(share.momentum, offset) = m;
}

template <Dtype M>
__global__ void __launch_bounds__(kThreads) momentum_kernel(const MomentumArguments arguments, Clip clip) {
  const Share<M> share(arguments);
  bool ok = *arguments.found_inf == 0;
  float bound = 1.0f;
  for (int side = 0; side < arguments.num_sides; ++side) {
    const float norm = norm_of(arguments, arguments.sides[side], share.block, clip == Clip::row_sum);
    ok &= is_finite(norm);
    if (side == share.side && clip != Clip::none) bound = fmaxf(norm, 1.0f);
  }
  if (share.share == 0 && threadIdx.x == 0)
    arguments.clips[share.side * arguments.num_blocks + share.block] = ok ? 1.0f / bound : 0.0f;
  if (!ok) return;

  constexpr int N = kVector<M>;
  const int64_t whole = share.whole(share.length);
#pragma unroll 1
  for (int64_t i = threadIdx.x * N; i < whole; i += kThreads * N) step<M, N>(arguments, share, i);
#pragma unroll 1
  for (int64_t i = whole + threadIdx.x; i < share.length; i += kThreads) step<M, 1>(arguments, share, i);
}

// ---- configuration and launcher -------------------------------------------------------------------------------------

template <Dtype M>
cudaError_t launch_both(const MomentumArguments& arguments, Clip clip, int64_t programs, cudaStream_t stream) {
  const auto norms = clip == Clip::row_sum ? norms_kernel<M, true> : norms_kernel<M, false>;
  const cudaError_t error = launch(norms, programs, kThreads, stream, arguments);
  return error == cudaSuccess ? launch(momentum_kernel<M>, programs, kThreads, stream, arguments, clip) : error;
}

}  // namespace

cudaError_t clipped_momentum(const MomentumArguments& arguments, Dtype dtype, Clip clip, int64_t programs,
                             cudaStream_t stream) {
  switch (dtype) {
    case Dtype::fp32:
      return launch_both<Dtype::fp32>(arguments, clip, programs, stream);
    case Dtype::bf16:
      return launch_both<Dtype::bf16>(arguments, clip, programs, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rootfree::cuda
