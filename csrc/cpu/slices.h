// How the blocks of a batch are shared among threads, and how many are worked on at a time.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace rootfree::cpu {

constexpr int64_t cache_numbers = 1 << 18;  // numbers of G that, with all that is made of them, stay near a core

// How many blocks are worked on at a time: what fits the cache, but no more than a thread's share.
inline int64_t slice_length(int64_t num_blocks, int64_t rows, int64_t cols) {
  const int64_t fair = (num_blocks + at::get_num_threads() - 1) / at::get_num_threads();
  return std::max<int64_t>(1, std::min(cache_numbers / std::max<int64_t>(rows * cols, 1), fair));
}

// Call f(first block, number of blocks) for slices of a batch: a thread a slice as long as there is one for each, then
// all threads within each of those that are left.
template <typename F>
void for_slices(int64_t num_blocks, int64_t rows, int64_t cols, const F& f) {
  const int64_t length = slice_length(num_blocks, rows, cols);
  const int64_t slices = (num_blocks + length - 1) / length, threads = at::get_num_threads();
  const int64_t shared = threads > 1 ? slices / threads * threads : 0;
  const auto run = [&](int64_t slice) {
    const at::NoGradGuard no_grad;  // which a thread does not take over from the one that calls it
    const c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    f(slice * length, std::min(length, num_blocks - slice * length));
  };
  at::parallel_for(0, shared, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      run(slice);
    }
  });
  for (int64_t slice = shared; slice < slices; ++slice) {
    run(slice);
  }
}

}  // namespace rootfree::cpu
