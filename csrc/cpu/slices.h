// Slices of a batch: how its blocks are divided among threads, and how many are worked on at a time.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace rootfree::cpu {

constexpr int64_t cache_elements =
    1 << 18;  // elements of G that fit a core's cache together with their intermediate results

// Return how many blocks are worked on at a time: as many as fit the cache, but no more than one thread's fair share.
inline int64_t slice_length(int64_t num_blocks, int64_t rows, int64_t cols) {
  const int64_t per_thread = (num_blocks + at::get_num_threads() - 1) / at::get_num_threads();
  return std::max<int64_t>(1, std::min(cache_elements / std::max<int64_t>(rows * cols, 1), per_thread));
}

// Call f(first block, number of blocks) for every slice of a batch. As long as there is a slice for every thread, each
// thread works on a slice of its own. The remaining slices run one after another, each on all threads.
template <typename F>
void for_slices(int64_t num_blocks, int64_t rows, int64_t cols, const F& f) {
  const int64_t length = slice_length(num_blocks, rows, cols);
  const int64_t num_slices = (num_blocks + length - 1) / length, threads = at::get_num_threads();
  const int64_t num_concurrent = threads > 1 ? num_slices / threads * threads : 0;
  const auto run = [&](int64_t slice) {
    const at::NoGradGuard no_grad;  // worker threads do not inherit it from the calling thread
    const c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    f(slice * length, std::min(length, num_blocks - slice * length));
  };
  at::parallel_for(0, num_concurrent, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      run(slice);
    }
  });
  for (int64_t slice = num_concurrent; slice < num_slices; ++slice) {
    run(slice);
  }
}

}  // namespace rootfree::cpu
