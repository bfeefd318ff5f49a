// CUDA on the CPU: enough of it that a C++ compiler makes ordinary functions of the kernels in csrc/cuda, to test them
// where there is no GPU. It is no emulator: of memory it checks nothing, and of speed it says nothing.
//
// Blocks run one after the other. The threads of a block are fibers, which change places only where they wait for each
// other: first to last, or last to first (`run_backwards`), so that a result that hangs on the order can be told. A
// barrier that not all threads reach ends the process, where a GPU would hang.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // there is one block at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned size) : x(size) {}
};

inline dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr size_t kStack = 1 << 16;
constexpr unsigned kWarp = 32;

inline int num_launches = 0;
inline bool run_backwards = false;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true;
};

// Where threads wait for each other, as often as they like.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier;
inline std::vector<float> lanes;  // what threads show each other
inline std::vector<int> votes;
inline std::function<void()> body;
inline bool progress;

inline void yield() {
  const unsigned thread = threadIdx.x;
  swapcontext(&fibers[thread].context, &scheduler);
  threadIdx.x = thread;
}

inline void wait_for(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
  progress = true;
}

inline void wait_for_warp() { wait_for(warp_barriers[threadIdx.x / kWarp], kWarp); }

// A fiber runs one thread of every block there is.
inline void run_fiber() {
  for (;;) {
    body();
    fibers[threadIdx.x].done = true;
    progress = true;
    yield();
  }
}

inline void make_fibers(unsigned threads) {
  while (fibers.size() < threads) fibers.emplace_back();
  for (Fiber& fiber : fibers) {
    if (!fiber.stack.empty()) continue;
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

inline void run_block(unsigned threads) {
  block_barrier = {};
  warp_barriers.assign((threads + kWarp - 1) / kWarp, {});
  for (unsigned i = 0; i < threads; ++i) fibers[i].done = false;
  unsigned running = threads;
  while (running > 0) {
    progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = run_backwards ? threads - 1 - i : i;
      if (fibers[thread].done) continue;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
      running -= fibers[thread].done;
    }
    if (!progress) {
      std::fputs("cuda_on_cpu: threads wait at a barrier that others never reach\n", stderr);
      std::abort();
    }
  }
}

inline void run(unsigned blocks, unsigned threads, std::function<void()> function) {
  ++num_launches;
  make_fibers(threads);
  lanes.resize(threads);
  votes.resize(threads);
  body = std::move(function);
  gridDim = dim3(blocks), blockDim = dim3(threads);
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = run_backwards ? blocks - 1 - i : i;
    run_block(threads);
  }
}

}  // namespace cuda_on_cpu

// ---- what kernels call ----------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_cpu::wait_for(cuda_on_cpu::block_barrier, blockDim.x); }

inline int __syncthreads_or(int vote) {
  using cuda_on_cpu::votes;
  votes[threadIdx.x] = vote;
  __syncthreads();
  const bool any = std::any_of(votes.begin(), votes.begin() + blockDim.x, [](int x) { return x != 0; });
  __syncthreads();
  return any;
}

inline float __shfl_xor_sync(unsigned, float x, int distance) {
  cuda_on_cpu::lanes[threadIdx.x] = x;
  cuda_on_cpu::wait_for_warp();
  const float other = cuda_on_cpu::lanes[threadIdx.x ^ static_cast<unsigned>(distance)];
  cuda_on_cpu::wait_for_warp();
  return other;
}

template <class T>
T atomicAdd(T* address, T x) {
  const T before = *address;
  *address = before + x;
  return before;
}

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

// ---- what launchers call --------------------------------------------------------------------------------------------

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_on_cpu::run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
