// Symmetric matrices of which one triangle is stored (rootfree_kernels/packing.py): with k = (n + 1) / 2 rows of A,
//
//     S = [A  B']    even n: n + 1 rows of n / 2,    row i of B: row k + 1 + i    of A's lower triangle: row i + 1
//         [B  D ]    odd n:  n rows of (n + 1) / 2               row k + i                               row i
//
// and column j of D's lower triangle in row j, from column j on (odd n: j + 1).

#pragma once

#include <ATen/core/Tensor.h>

namespace rootfree::cpu {

// Whether m [L, ., .] of factors [L, n, n] is packed. An error where it has neither shape.
bool is_packed(const at::Tensor& m, const at::Tensor& factor);

// Matrices [L, n, n] whose lower triangles are those of packed ones; what is above may be anything.
at::Tensor lower_triangles(const at::Tensor& packed, int64_t n);

// Pack those of the symmetric matrices [L, n, n] that are `chosen` [L].
void pack(const at::Tensor& matrices, const bool* chosen, const at::Tensor& packed);

}  // namespace rootfree::cpu
