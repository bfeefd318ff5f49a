// The matrix products of a batch of blocks, by PyTorch's libraries: what is ours is to save half of a symmetric one.

#pragma once

#include <ATen/core/Tensor.h>

namespace rootfree::cpu {

// A B [L, m, n] of A [L, m, k] and B [L, k, n] of one dtype.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// The lower triangle, at least, of A A' [L, m, m] of A [L, m, k]; what is above may be anything.
at::Tensor symmetric_product(const at::Tensor& a);

// All of A A' into `out` [L, m, m], symmetric to the bit.
void symmetric_product(const at::Tensor& a, const at::Tensor& out);

}  // namespace rootfree::cpu
