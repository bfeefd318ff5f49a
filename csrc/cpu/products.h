// Matrix products of batches of blocks. PyTorch's libraries compute them; this code saves half the work of a symmetric
// product.

#pragma once

#include <ATen/core/Tensor.h>

namespace rootfree::cpu {

// Return A B [L, m, n]. Both have one dtype.
at::Tensor product(const at::Tensor& a,   // [L, m, k]
                   const at::Tensor& b);  // [L, k, n]

// Return A A' [L, m, m]. Only its lower triangle is defined.
at::Tensor symmetric_product(const at::Tensor& a);  // [L, m, k]

// Write A A' to `out`, bitwise symmetric.
void symmetric_product(const at::Tensor& a,     // [L, m, k]
                       const at::Tensor& out);  // [L, m, m]

}  // namespace rootfree::cpu
