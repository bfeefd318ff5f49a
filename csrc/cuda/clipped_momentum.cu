// The clipped Riemannian momentum of a list of tensors [L, ...] of any sizes, in two launches:
//
//     m <- alpha2 m + (1 - alpha2) delta,    clip <- 1 / max(1, norm of m)
//
// The first launch computes the norm of the new m, in one partial sum for each share of a block. The second finds the
// blocks that are finite on all sides, writes their clips and their m, and skips the others. Both launches compute the
// new m from the old one: reading m twice costs no more than storing it in between, and less if m is BF16. Sums are
// added in the same order on every GPU, so that results are reproducible.

#include "clipped_momentum.h"

#include <cmath>

#include "vector_access.h"

namespace rootfree::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
// Programs of norms_kernel that share a multiprocessor, at least. Without this bound ptxas aims at 8 and spills
// registers.
constexpr int kMinNorms = 4;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Elements that a thread takes at a time: 128 bits of m. If m is BF16, delta is read in two accesses.
template <Dtype M>
constexpr int kVector = M == Dtype::fp32 ? 4 : 8;

// ---- kernels --------------------------------------------------------------------------------------------------------

// The operations of a reduction.
struct Sum {
  static __device__ __forceinline__ float combine(float x, float y) { return x + y; }
};

// The arguments must not be NaN: fmaxf would return the other one.
struct Maximum {
  static __device__ __forceinline__ float combine(float x, float y) { return fmaxf(x, y); }
};

__device__ __forceinline__ float finite_or_infinity(float x) { return is_finite(x) ? x : float_of(0x7F800000u); }

// Reduce x over the lanes of a warp. Every lane gets the same bits.
template <class Operation>
__device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = Operation::combine(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Reduce x over the threads of a program. The result is valid on its first thread.
template <class Operation>
__device__ __forceinline__ float program_reduce(float x) {
  __shared__ float of_warps[kWarps];
  x = warp_reduce<Operation>(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = Operation::combine(x, of_warps[warp]);
  return x;
}

// The work of one program: `length` elements of a block of a side, at the addresses `momentum` and `delta`.
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

  // Return how many of the first `n` elements can be accessed kVector at a time.
  __device__ __forceinline__ int64_t vectorized(int64_t n) const {
    return (momentum | delta) % kAlignment == 0 ? n / kVector<M> * kVector<M> : 0;
  }
};

// Return the new m of N elements, the first at `offset`.
template <Dtype M, int N>
__device__ __forceinline__ AlignedVector<float, N> new_momentum(const MomentumArguments& arguments,
                                                                const Share<M>& share, int64_t offset) {
  const auto m = vector_at<Storage<M>, N>(share.momentum, offset);
  auto x = vector_at<float, N>(share.delta, offset);
#pragma unroll
  for (int i = 0; i < N; ++i) x.val[i] = arguments.alpha * to_float<M>(m.val[i]) + arguments.one_minus_alpha * x.val[i];
  return x;
}

// Return this thread's part of the sum of |m|, or of m^2, over the `n` elements of a share that begin at `start`.
// `threads` threads share the work; this one is number `thread`. The first `vectorized` elements go kVector at a time.
template <bool SQUARES, Dtype M>
__device__ __forceinline__ float partial_sum(const MomentumArguments& arguments, const Share<M>& share, int64_t start,
                                             int64_t n, int64_t vectorized, int thread, int threads) {
  constexpr int N = kVector<M>;
  float sums[N] = {};
#pragma unroll 2
  for (int64_t i = thread * N; i < vectorized; i += threads * N) {
    const auto x = new_momentum<M, N>(arguments, share, start + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += SQUARES ? x.val[j] * x.val[j] : fabsf(x.val[j]);
  }
#pragma unroll 1
  for (int64_t i = vectorized + thread; i < n; i += threads) {
    const float x = new_momentum<M, 1>(arguments, share, start + i).val[0];
    sums[0] += SQUARES ? x * x : fabsf(x);
  }
#pragma unroll
  for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// Return the largest absolute row sum among the rows of this warp, or infinity if one is not finite. A warp sums one
// row at a time.
template <Dtype M>
__device__ __forceinline__ float largest_row_sum(const MomentumArguments& arguments, const Share<M>& share) {
  const int64_t cols = share.row.cols;
  const int64_t vectorized = cols % kVector<M> == 0 ? share.vectorized(cols) : 0;
  float largest = 0.0f;
  for (int64_t start = threadIdx.x / kWarp * cols; start < share.length; start += kWarps * cols) {
    const float sum = partial_sum<false>(arguments, share, start, cols, vectorized, threadIdx.x % kWarp, kWarp);
    largest = Maximum::combine(largest, finite_or_infinity(warp_reduce<Sum>(sum)));
  }
  return largest;
}

// Write the partial norm of every share to `sums`: its sum of squares, or its largest absolute row sum.
template <Dtype M, bool ROW_SUM>
__global__ void __launch_bounds__(kThreads, kMinNorms) norms_kernel(const MomentumArguments arguments) {
  const Share<M> share(arguments);
  float norm;
  if constexpr (ROW_SUM) {
    norm = program_reduce<Maximum>(largest_row_sum(arguments, share));
  } else {
    const int64_t vectorized = share.vectorized(share.length);
    norm = program_reduce<Sum>(partial_sum<true>(arguments, share, 0, share.length, vectorized, threadIdx.x, kThreads));
  }
  if (threadIdx.x == 0) arguments.sums[blockIdx.x] = norm;
}

// Return the norm of a block of a side, infinity or NaN if the block is not finite. Every warp computes it for itself,
// which needs no synchronization.
__device__ __forceinline__ float norm_of(const MomentumArguments& arguments, const SideRow& row, int64_t block,
                                         bool row_sum) {
  const float* sums = arguments.sums + row.first_program + block * row.shares;
  float total = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < row.shares; i += kWarp)
    total = row_sum ? Maximum::combine(total, sums[i]) : total + sums[i];
  return row_sum ? warp_reduce<Maximum>(total) : sqrtf(warp_reduce<Sum>(total));
}

// Write the new m of N elements, the first at `offset`.
template <Dtype M, int N>
__device__ __forceinline__ void step(const MomentumArguments& arguments, const Share<M>& share, int64_t offset) {
  const auto x = new_momentum<M, N>(arguments, share, offset);
  AlignedVector<Storage<M>, N> m;
#pragma unroll
  for (int i = 0; i < N; ++i) m.val[i] = to_nearest<M>(x.val[i]);
  vector_at<Storage<M>, N>(share.momentum, offset) = m;
}

// Write m and the clips of the blocks that are finite on all sides. The clip of any other block is 0.
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
  if (share.share == 0 && threadIdx.x == 0)  // one program a block writes its clip
    arguments.clips[share.side * arguments.num_blocks + share.block] = ok ? 1.0f / bound : 0.0f;
  if (!ok) return;

  constexpr int N = kVector<M>;
  const int64_t vectorized = share.vectorized(share.length);
#pragma unroll 1
  for (int64_t i = threadIdx.x * N; i < vectorized; i += kThreads * N) step<M, N>(arguments, share, i);
#pragma unroll 1
  for (int64_t i = vectorized + threadIdx.x; i < share.length; i += kThreads) step<M, 1>(arguments, share, i);
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
