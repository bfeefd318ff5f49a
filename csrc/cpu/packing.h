// Packed symmetric matrices, of which one triangle is stored (rootfree_kernels/packing.py). A has k = (n + 1) / 2 rows:
//
//     S = [A  B']    n      packed shape            row i of A is in row    row i of B is in row
//         [B  D ]    even   [n + 1, n / 2]          i + 1                   k + 1 + i
//                    odd    [n, (n + 1) / 2]        i                       k + i
//
// Only the lower triangles of A and D are stored. Column j of D is in row j, and begins at column j (odd n: j + 1).

#pragma once

#include <ATen/core/Tensor.h>

namespace rootfree::cpu {

// Return whether the momentum of a factor is packed. Raise if its shape is neither the factor's nor the packed one.
bool is_packed(const at::Tensor& momentum,  // [L, n, n], or [L, rows, cols] as above
               const at::Tensor& factor);   // [L, n, n]

// Return matrices [L, n, n] whose lower triangles are those of the packed ones. The elements above the diagonal are
// uninitialized.
at::Tensor unpack_lower_triangles(const at::Tensor& packed, int64_t n);

// Pack symmetric matrices. Those that are not chosen leave their packed ones unchanged.
void pack(const at::Tensor& matrices,  // [L, n, n]
          const bool* chosen,          // [L]
          const at::Tensor& packed);   // [L, rows, cols] as above

}  // namespace rootfree::cpu
